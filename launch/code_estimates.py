"""`saddle evaluate --codes`: what the content and the style of a VAE with grouped latents say of an image's class."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from gan.errors import UserError
from launch.likelihood_estimates import read_images
from launch.samples import check_match, load_network
from launch.scores import class_labels
from launch.tables import save_rows, text_table

if TYPE_CHECKING:
    import torch

    from data.dataset import Dataset
    from gan.vae.groups import Grouped
    from gan.vae.model import VAE

SHOWN_TOGETHER = (1, 2, 4, 8, 16)  # images of a class whose content is accumulated
HIDDEN = 64  # units of the classifiers
STEPS = 400


def compare_codes(
    paths: Mapping[str, Path], dataset: "Dataset", samples: int, seed: int, json_path: Path | None
) -> None:
    """Print how often small classifiers tell the class of held-out images by their style, by their content, and by what
    several images of a class say of it together.

    Half of the images train the classifiers, of one image each. Raises UserError for networks whose latents are not
    grouped, and datasets without classes.
    """
    from gan.vae.groups import Grouped
    from gan.vae.model import VAE

    labels, classes = class_labels(dataset)
    rows: list[dict[str, Any]] = []
    for name, path in paths.items():
        snapshot = load_network(path)
        check_match(path, snapshot, dataset)
        if not (isinstance(snapshot.G, VAE) and isinstance(snapshot.G.posterior, Grouped)):
            raise UserError(f"{name} has no content apart from style; train with vae.posterior=grouped")
        indices = np.random.RandomState(seed).permutation(len(dataset))[:samples]
        half = len(indices) // 2
        codes = moments(snapshot, dataset, indices, seed)
        for row in code_rows(snapshot.G.posterior, codes, labels[indices], half, classes, seed):
            rows.append({"network": name, **row})
    click.echo(text_table(rows))
    save_rows(json_path, rows)


def moments(snapshot: Any, dataset: "Dataset", indices: np.ndarray, seed: int) -> "torch.Tensor":
    """Means and logarithms of variances of each image's latent, before images are grouped: [N, 2 d]."""
    import torch

    G: VAE = snapshot.G
    found = []
    with torch.no_grad():
        for images, labels in read_images(snapshot, dataset, indices, seed):
            found.append(G.posterior.moments(G.features(images, labels)).cpu())
    return torch.cat(found)


def code_rows(
    posterior: "Grouped", codes: "torch.Tensor", labels: np.ndarray, half: int, classes: int, seed: int
) -> list[dict[str, Any]]:
    """The lines of one network. codes [N, 2 d] and labels [N], of which the first `half` train the classifiers."""
    import torch

    from gan.metrics.sample import groups_of_class
    from gan.vae.gaussians import product_of_gaussians

    mean, log_variance = codes.chunk(2, 1)
    content, style = mean[:, : posterior.content], mean[:, posterior.content :]
    y = torch.from_numpy(labels).long()
    by_style = fit_classifier(style[:half], y[:half], classes, seed)
    by_content = fit_classifier(content[:half], y[:half], classes, seed)

    def line(code: str, images: int, rate: float, held_out: int, deviation: float | None) -> dict[str, Any]:
        return {
            "code": code,
            "images together": images,
            "class told": round(rate, 4),
            "of held out": held_out,
            "deviation": deviation and round(deviation, 4),
        }

    rows = [line("style", 1, accuracy(by_style, style[half:], y[half:]), len(y) - half, None)]
    log_variance = log_variance[:, : posterior.content]
    for together in SHOWN_TOGETHER:
        groups = groups_of_class(labels[half:], together) + half
        if len(groups):
            members = torch.from_numpy(groups.T)
            shared, log_shared = product_of_gaussians(content[members], log_variance[members])
            rate = accuracy(by_content, shared, y[members[0]])
            rows.append(line("content", together, rate, len(groups), float((log_shared / 2).exp().mean())))
    return rows


def fit_classifier(codes: "torch.Tensor", labels: "torch.Tensor", classes: int, seed: int) -> "torch.nn.Module":
    """A network with one hidden layer, trained on all codes [N, d] at once. The caller's random state is restored."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.BatchNorm1d(codes.shape[1], affine=False),  # codes differ in size
            nn.Linear(codes.shape[1], HIDDEN),
            nn.ReLU(),
            nn.Linear(HIDDEN, classes),
        )
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.01, weight_decay=0.01)
        for _ in range(STEPS):
            optimizer.zero_grad()
            F.cross_entropy(network(codes), labels).backward()
            optimizer.step()
    return network.eval()


def accuracy(network: "torch.nn.Module", codes: "torch.Tensor", labels: "torch.Tensor") -> float:
    """The share of codes whose class the network tells."""
    import torch

    with torch.no_grad():
        return float((network(codes).argmax(1) == labels).double().mean())
