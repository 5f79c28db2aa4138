"""Degrade real images step by step, and see whether the distances to the originals rise with every step."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from PIL import Image, ImageFilter

from gan.errors import UserError
from launch.cli import run
from launch.samples import device, random_images
from launch.tables import json_option, save_rows, text_table

if TYPE_CHECKING:
    from gan.metrics.features import FeatureNetwork
    from gan.metrics.intervals import Estimate

KEPT = 10  # images that the copies are of


@click.command()
@click.option("--data", required=True, help="The dataset whose images are degraded.")
@click.option(
    "--features", default="lite0", show_default=True, help="lite0, or PATH:SHA256 of a TorchScript file of your own."
)
@click.option(
    "--samples", type=click.IntRange(100), default=2000, show_default=True, help="Images, at most; more than features."
)
@click.option(
    "--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Of the choice of images."
)
@json_option
def main(data: str, features: str, samples: int, seed: int, json_path: Path | None) -> None:
    """Measure distances between real images and ever more degraded ones, as Heusel et al. 2017 (figure 3) do: blurred,
    compressed as JPEG, noisy, or with copies of ten of them in place of others.

    A row has the Fréchet distance and the kernel distance to the originals with 95 % intervals, and whether each is
    above that of the row before by more than their intervals. The kernel distance, a mean over pairs of images, is
    between degraded images and the originals of others. Images with transparency are first put on white.
    """
    from data.dataset import ImageDataset
    from gan.metrics.features import load_features

    dataset = ImageDataset(data)
    network = load_features(features, device())
    if min(samples, len(dataset)) <= network.width:
        raise UserError(
            f"{min(samples, len(dataset))} images of {dataset.path} are too few: {network.name} has {network.width} "
            "features, and needs more images than that; give more --samples or a larger dataset"
        )
    indices = random_images(dataset, samples, seed)
    images = on_white(dataset.read(indices, max(dataset.manifest.levels)))
    rows = ladder_rows(images, network, seed)
    click.echo(text_table(rows))
    provenance = {"name": network.name, "sha256": network.sha256, "side": network.side, "resize": network.resize}
    save_rows(json_path, {"features": provenance, "rows": rows})


def ladder_rows(images: np.ndarray, network: "FeatureNetwork", seed: int) -> list[dict[str, Any]]:
    """A row for each step of each ladder, of images uint8 [N, H, W, 3]."""
    import torch

    from gan.metrics.frechet import frechet_estimate
    from gan.metrics.kernel_distance import kernel_distance

    originals = torch.from_numpy(network(images))
    rows = []
    for name, (amounts, degrade) in LADDERS.items():
        previous: tuple[Estimate, Estimate] | None = None
        for amount in amounts:
            changed = degrade(images, amount, np.random.RandomState(seed))
            degraded = originals[changed] if changed.ndim == 1 else torch.from_numpy(network(changed))
            estimates = (frechet_estimate(originals, degraded), kernel_distance(originals[::2], degraded[1::2]))
            row: dict[str, Any] = {"ladder": name, "amount": float(amount)}
            for index, score in enumerate(("fd", "kid")):
                before = previous[index] if previous else None
                row |= columns(f"{score}-{network.name}", estimates[index], before)
            rows.append(row)
            previous = estimates
            click.echo(f"{name} {amount}: " + ", ".join(f"{found.value:.4g}" for found in estimates), err=True)
    return rows


def columns(name: str, found: "Estimate", before: "Estimate | None") -> dict[str, Any]:
    """The cells of a score: value, interval, and whether this lies above the one before (in the first row: above 0)."""
    above = before.high if before else 0.0
    return {name: found.value, f"{name} low": found.low, f"{name} high": found.high, f"{name} rises": found.low > above}


def on_white(images: np.ndarray) -> np.ndarray:
    """Images uint8 [N, H, W, C] with 1, 3 or 4 channels -> uint8 [N, H, W, 3]."""
    from gan.metrics.features import to_rgb

    return to_rgb(images).permute(0, 2, 3, 1).contiguous().numpy()


def blurred(images: np.ndarray, sigma: float, _random: np.random.RandomState) -> np.ndarray:
    """Smoothed by a Gaussian of `sigma` pixels."""
    blur = ImageFilter.GaussianBlur(sigma)
    return np.stack([np.asarray(Image.fromarray(image).filter(blur)) for image in images])


def compressed(images: np.ndarray, quality: float, _random: np.random.RandomState) -> np.ndarray:
    """Written as JPEG of this quality, and read again."""
    return np.stack([_through_jpeg(image, int(quality)) for image in images])


def _through_jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "jpeg", quality=quality)
    return np.asarray(Image.open(file))


def noisy(images: np.ndarray, deviation: float, random: np.random.RandomState) -> np.ndarray:
    """With normal noise of this standard deviation, of 255, on every number."""
    noise = random.standard_normal(images.shape) * deviation
    return (images + noise).round().clip(0, 255).astype(np.uint8)


def copied(images: np.ndarray, share: float, random: np.random.RandomState) -> np.ndarray:
    """With a share of the images replaced by copies of the same ten: not the images, but their indices, int [N]."""
    order = random.permutation(len(images))
    kept = order[:KEPT]
    replaced = order[KEPT:][: round(share * len(images))]
    rows = np.arange(len(images))
    rows[replaced] = np.resize(kept, len(replaced))
    return rows


Degrade = Callable[[np.ndarray, float, np.random.RandomState], np.ndarray]
LADDERS: dict[str, tuple[tuple[float, ...], Degrade]] = {
    "blur, pixels": ((0.5, 0.75, 1, 1.5, 2, 3), blurred),
    "JPEG quality": ((95, 80, 60, 40, 20, 10), compressed),
    "noise, of 255": ((4, 8, 16, 32, 64), noisy),
    "copies, share": ((0.1, 0.25, 0.5, 0.75, 0.9), copied),
}


if __name__ == "__main__":
    run(main, "saddle benchmark features")
