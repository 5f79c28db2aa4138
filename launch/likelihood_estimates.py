"""`saddle evaluate --likelihood`: log p(x) of a dataset's images under trained VAEs."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from gan.errors import UserError
from launch.samples import check_match, device, load_network, random_images
from launch.tables import save_rows, text_table

if TYPE_CHECKING:
    import torch

    from data.dataset import Dataset
    from gan.checkpoint import Snapshot
    from gan.metrics.provenance import Provenance
    from gan.vae.estimates import Estimator

BATCH = 100  # images at a time
QUICK = "iwae:draws=200"
QUICK_IMAGES = 500


def estimate_likelihoods(
    names: str, paths: Mapping[str, Path], dataset: "Dataset", samples: int, seed: int, json_path: Path | None
) -> None:
    """Print a table with a row for each network and estimator, of `samples` random images of the dataset.

    Raises UserError for estimators that do not exist, networks that are no likelihood models or do not fit, and
    networks of other pixels than the first, whose likelihoods do not compare.
    """
    from gan.methods.rows import split_names
    from gan.metrics.intervals import mean
    from gan.metrics.provenance import check_comparable
    from gan.vae.estimates import bits_per_number, find_estimator
    from gan.vae.model import VAE

    estimators = {name: find_estimator(name) for name in split_names(names)}
    if not estimators:
        raise UserError("--likelihood is empty; write for example --likelihood=elbo,iwae")
    indices = random_images(dataset, samples, seed)
    if len(indices) < 2:
        raise UserError("the error of a mean needs two images or more; give --samples=500, say")
    rows: list[dict[str, Any]] = []
    snapshots = {network: load_network(path) for network, path in paths.items()}
    for network, snapshot in snapshots.items():
        check_match(paths[network], snapshot, dataset)
        if not isinstance(snapshot.G, VAE):
            raise UserError(f"{network} is a {snapshot.config.model}, which gives images no likelihood")
    origins = {network: origin(snapshot, dataset, len(indices), seed) for network, snapshot in snapshots.items()}
    check_comparable(origins)
    for network, snapshot in snapshots.items():
        numbers = math.prod(dataset.shape(snapshot.stage))
        for name, estimator in estimators.items():
            values = log_likelihoods(estimator, snapshot, dataset, indices, seed)
            found = mean(values)
            rows.append(
                {
                    "network": network,
                    "estimator": name,
                    "images": len(values),
                    "log p(x), nats": round(found.value, 2),
                    "±": round((found.high - found.low) / 2, 2),
                    "bits per number": round(bits_per_number(found.value, numbers), 4),
                }
            )
    click.echo(text_table(rows))
    save_rows(json_path, [{**row, **origins[row["network"]].to_json()} for row in rows])


def origin(snapshot: "Snapshot", dataset: "Dataset", images: int, seed: int) -> "Provenance":
    """Where log p(x) of so many images comes from. Networks of black and white pixels and of levels do not compare."""
    from gan.metrics.provenance import Features, Provenance, versions

    pixels = "black and white pixels" if snapshot.config.vae.binarize else "pixels"
    return Provenance(
        Features(pixels, "", 0, "none"),
        dataset.manifest.content_hash,
        tuple(dataset.shape(snapshot.stage)[:2]),
        images,
        0,
        seed,
        snapshot.sha256,
        versions(device()),
    )


def quick_bound(snapshot: "Snapshot", dataset: "Dataset", seed: int) -> dict[str, Any]:
    """A lower bound of the mean log p(x) of some images of a dataset, with its standard error, and in bits per
    number."""
    from gan.vae.estimates import bits_per_number, find_estimator

    indices = random_images(dataset, QUICK_IMAGES, seed)
    values = log_likelihoods(find_estimator(QUICK), snapshot, dataset, indices, seed)
    nats = float(values.mean())
    return {
        "estimator": QUICK,
        "images": len(values),
        "nats": nats,
        "error": float(values.std(ddof=1)) / len(values) ** 0.5,
        "bits": bits_per_number(nats, math.prod(dataset.shape(snapshot.stage))),
    }


def log_likelihoods(
    estimator: "Estimator", snapshot: "Snapshot", dataset: "Dataset", indices: np.ndarray, seed: int
) -> np.ndarray:
    """log p(x) in nats of images of a dataset, by a VAE that fits it: [len(indices)]."""
    import torch

    from gan.vae.estimates import Scene

    G: Any = snapshot.G
    generator = torch.Generator(G.log_scale.device).manual_seed(seed)
    found = [
        estimator(Scene(G, images, labels, generator, snapshot.images.pictures)).cpu().numpy()
        for images, labels in read_images(snapshot, dataset, indices, seed)
    ]
    return np.concatenate(found)


def read_images(
    snapshot: "Snapshot", dataset: "Dataset", indices: np.ndarray, seed: int
) -> "Iterator[tuple[torch.Tensor, torch.Tensor | None]]":
    """Images of a dataset as a VAE sees them [n, C, H, W], and their labels if it is conditional, batch by batch.

    Where the network is of black and white images, an image is made so by the seed and its index alone: networks and
    estimators are compared on the same pixels.
    """
    import torch

    from gan.parts import prepare_reals
    from gan.vae.likelihoods import binarized

    G: Any = snapshot.G
    device = G.log_scale.device
    for chosen in np.array_split(indices, -(-len(indices) // BATCH)):
        images = prepare_reals(torch.from_numpy(dataset.read(chosen, snapshot.stage)).to(device), None, 1.0, G)
        if snapshot.config.vae.binarize:
            coins = np.stack([np.random.RandomState([seed, index]).rand(*images.shape[1:]) for index in chosen])
            images = binarized(images, torch.from_numpy(coins).to(images))
        labels = None
        if G.classes:
            assert dataset.labels is not None
            labels = torch.from_numpy(dataset.labels[chosen]).to(device)
        yield images, labels
