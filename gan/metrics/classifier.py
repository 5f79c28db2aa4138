"""A small classifier of the user's own labeled images, whose features the metrics use. It is trained anew each time,
with the same result."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gan.errors import UserError

FEATURES = 64
LARGEST_SIDE = 32  # of the network's input; larger images are averaged down to it
SMALLEST_SIDE = 8
HELD_OUT = 0.2  # share of the images, at most 5000, that is not trained on and measures the accuracy
STEPS = 1200
BATCH = 64


@dataclass(frozen=True)
class Classifier:
    """A trained network with its accuracy on `held_out` images that it was not trained on."""

    network: nn.Sequential  # [n, C, h, w] -> logits [n, K]; the last layer reads the features
    classes: int
    accuracy: float
    held_out: int

    @torch.no_grad()
    def __call__(self, images: np.ndarray, batch: int = 500) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 [N, H, W, C] -> float32 (penultimate ReLU features [N, 64], class probabilities [N, K])."""
        body = self.network[:-1]
        parts = [shrink(images[start : start + batch]) for start in range(0, len(images), batch)]
        features = torch.cat([body(to_input(part).to(self.device)) for part in parts]).cpu().numpy()
        return features, self.probabilities(features)

    @torch.no_grad()
    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """Features float32 [N, 64] -> class probabilities [N, K]."""
        return self.network[-1](torch.from_numpy(features).to(self.device)).softmax(1).cpu().numpy()

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device


def to_input(images: np.ndarray) -> Tensor:
    """Images uint8 [N, H, W, C] -> float32 [N, C, H, W] in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def shrink(images: np.ndarray, most: int = LARGEST_SIDE) -> np.ndarray:
    """Images uint8 [N, H, W, C] -> uint8 [N, h, w, C], sides at most `most`, by box averaging; small ones unchanged."""
    height, width = (min(side, most) for side in images.shape[1:3])
    if (height, width) == images.shape[1:3]:
        return images
    means = F.adaptive_avg_pool2d(
        torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float(), (height, width)
    )
    return means.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def build_network(channels: int, classes: int, width: int = 32) -> nn.Sequential:
    """Three convolutions and two linear layers: [n, channels, h, w], h and w from 8 to 32 -> logits [n, classes]."""

    def convolution(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *convolution(channels, width),
        nn.MaxPool2d(2),
        *convolution(width, 2 * width),
        *convolution(2 * width, 2 * width),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(32 * width, FEATURES),
        nn.ReLU(),
        nn.Linear(FEATURES, classes),
    )


def train_classifier(
    images: np.ndarray,
    labels: np.ndarray,
    classes: int,
    *,
    seed: int = 0,
    steps: int = STEPS,
    device: str | torch.device = "cpu",
) -> Classifier:
    """Fit images uint8 [N, H, W, C] with labels int64 [N] in [0, classes): the same arguments give the same classifier.

    On a CPU one thread trains it, so that the number of cores does not change the scores. The caller's random state is
    restored. Raises UserError for fewer than two classes, fewer than ten images, or sides below 8.
    """
    check(len(images), images.shape[1:3], classes)
    images = shrink(images)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    held_out = order[: min(int(len(order) * HELD_OUT), 5000)].numpy()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_network(images.shape[3], classes).to(device)
    with one_thread():
        fit(network, images, torch.as_tensor(labels), order[len(held_out) :], steps, generator)
    network.eval().requires_grad_(False)
    _, probabilities = Classifier(network, classes, 0.0, 0)(images[held_out])
    accuracy = float((probabilities.argmax(1) == np.asarray(labels)[held_out]).mean())
    return Classifier(network, classes, accuracy, len(held_out))


@contextmanager
def one_thread() -> Iterator[None]:
    """Within the block torch uses one thread: so sums have a fixed order, and on a busy machine no thread must wait for
    another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def check(count: int, size: tuple[int, ...], classes: int) -> None:
    """Raises UserError if there are too few classes or images for a classifier, or the images' (H, W) is too small."""
    if classes < 2:
        raise UserError(
            "scores by a classifier need at least two classes: prepare a folder whose sub-folders are classes"
        )
    if count < 10:
        raise UserError(f"scores by a classifier need at least 10 labeled images, not {count}")
    if min(size) < SMALLEST_SIDE:
        raise UserError(f"scores by a classifier need images of at least {SMALLEST_SIDE} pixels a side, not {size}")


def fit(
    network: nn.Sequential, images: np.ndarray, labels: Tensor, order: Tensor, steps: int, generator: torch.Generator
) -> None:
    """Train by AdamW, with a one-cycle learning rate, on batches of images[order]; each batch is shifted a little."""
    device = next(network.parameters()).device
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    for _ in range(steps):
        picks = order[torch.randint(len(order), (BATCH,), generator=generator)]
        x = shift(to_input(images[picks.numpy()]), generator).to(device)
        loss = F.cross_entropy(network(x), labels[picks].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def shift(x: Tensor, generator: torch.Generator) -> Tensor:
    """Move a batch [n, C, h, w] by one random offset of up to a sixteenth of its size, repeating the edge."""
    height, width = x.shape[2:]
    reach = (height // 16, width // 16)
    top, left = (int(torch.randint(2 * r + 1, (), generator=generator)) for r in reach)
    padded = F.pad(x, (reach[1], reach[1], reach[0], reach[0]), mode="replicate")
    return padded[:, :, top : top + height, left : left + width]
