"""`saddle evaluate`: scores of snapshots beside those of the real images; divergences between sets of samples."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from gan.errors import UserError
from launch.cli import run
from launch.generate import find_snapshot, load
from launch.tables import aligned, write_json

if TYPE_CHECKING:
    from data.dataset import ImageDataset
    from gan.checkpoint import Snapshot
    from gan.metrics.score import Reference, Score

MOST_REALS = 50_000
COLUMNS = {  # field of a row -> its heading and format
    "samples": ("samples", "d"),
    "frechet_distance": ("Fréchet", ".2f"),
    "mode_kl": ("mode-KL", ".4f"),
    "mode_kl_floor": ("(by chance)", ".4f"),
    "confidence": ("confidence", ".3f"),
    "accuracy_as_asked": ("as asked", ".3f"),
}


@click.command()
@click.option("--network", "networks", multiple=True, help="A snapshot, run or outdir; may be repeated.")
@click.option("--data", "data", required=True, help="The dataset to compare with, labeled for scores.")
@click.option("--divergence", "divergences", help="Instead of scores: D(data||against), as in kl,js,jsw:pi=0.3.")
@click.option("--against", help="A dataset, a .npy of vectors [n, K] or uint8 [n, H, W, C], a snapshot or a run.")
@click.option("--features", type=bool, default=False, help="Divergence between features of a classifier of the labels.")
@click.option("--samples", type=click.IntRange(100), default=10_000, show_default=True, help="Samples of each network.")
@click.option(
    "--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Of latents and classifier."
)
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write the rows here too.")
def main(
    networks: tuple[str, ...],
    data: str,
    divergences: str | None,
    against: str | None,
    features: bool,
    samples: int,
    seed: int,
    json_path: Path | None,
) -> None:
    """Score snapshots against a labeled dataset, or estimate divergences between two sets of samples.

    Fréchet distance and mode-KL in the features of one small classifier that is trained on the dataset first, beside
    the scores of real images: read the distance as a multiple of that between two halves of the reals.
    """
    if divergences is not None:
        from launch.ruler import compare

        others = [*networks, *([against] if against else [])]
        if len(others) != 1:
            raise UserError("--divergence compares --data with one other set: give --against, or one --network")
        return compare(divergences, data, others[0], samples, seed, features, json_path)
    if not networks:
        raise UserError("give --network to score, or --divergence and --against to compare two sets")

    from data.dataset import ImageDataset

    paths = {network: find_snapshot(network) for network in networks}
    snapshots = {network: load(path) for network, path in paths.items()}
    dataset = ImageDataset(data)
    level = max(check_match(paths[network], snapshot, dataset) for network, snapshot in snapshots.items())
    if dataset.labels is None:
        raise UserError(f"{dataset.path} has no labels, and scores need them: prepare a folder with a folder per class")
    click.echo(f"training a classifier on {data} ...")
    reference = build_reference(dataset, level, seed)
    click.echo(describe(reference))
    rows = {name: score_network(snapshot, reference, level, samples, seed) for name, snapshot in snapshots.items()}
    rows |= reference.floors()
    click.echo(table(rows))
    if json_path:
        write_json(json_path, report(reference, rows, paths))
        click.echo(f"wrote {json_path}")


def check_match(path: Path, snapshot: "Snapshot", dataset: "ImageDataset") -> int:
    """The level of the dataset that a network makes. UserError if its images or classes are not the dataset's."""
    manifest, G = dataset.manifest, snapshot.G
    if (G.channels, tuple(G.base)) != (manifest.channels, manifest.base) or snapshot.stage not in manifest.levels:
        height, width = (side << snapshot.stage for side in G.base)
        raise UserError(
            f"{path} makes images of {height}x{width} with {G.channels} channels, {dataset.path} has "
            f"{'{}x{}'.format(*manifest.resolution)} with {manifest.channels}; give the dataset it was trained on"
        )
    if snapshot.alpha < 1:
        raise UserError(
            f"{path} was saved while its last stage was fading in (alpha {snapshot.alpha:.2f}); "
            "scores are taken at alpha 1 only: give a later snapshot"
        )
    if G.classes and snapshot.class_names != manifest.classes:
        raise UserError(
            f"{path} was trained on other classes than those of {dataset.path}; give the dataset of its run"
        )
    return snapshot.stage


def build_reference(dataset: "ImageDataset", level: int, seed: int) -> "Reference":
    """The reals of a labeled dataset at a level, at most MOST_REALS, and a classifier trained on them."""
    import torch

    from gan.metrics.classifier import train_classifier
    from gan.metrics.score import Reference

    assert dataset.labels is not None and dataset.manifest.classes
    images, picks = read_some(dataset, MOST_REALS, level, seed)
    labels = dataset.labels[picks]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    classifier = train_classifier(images, labels, len(dataset.manifest.classes), seed=seed, device=device)
    return Reference(classifier, images, labels, seed)


def read_some(dataset: "ImageDataset", most: int, level: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """At most so many images at a level, uint8 [n, H, W, C] as the classifier sees them, and which they are: [n]."""
    from gan.metrics.classifier import shrink

    picks = np.sort(np.random.RandomState(seed).permutation(len(dataset))[:most])
    parts = [shrink(dataset.read(chunk, level)) for chunk in np.array_split(picks, -(-len(picks) // 500))]
    return np.concatenate(parts), picks


def score_network(snapshot: "Snapshot", reference: "Reference", level: int, samples: int, seed: int) -> "Score":
    """Score samples of a network against reals of a level; a conditional one is asked for all classes in turn."""
    import torch

    from gan.metrics.score import score

    classes = snapshot.G.classes
    labels = torch.arange(samples) % classes if classes else None
    batches = sample_batches(snapshot, labels, level, samples, seed)
    return score(reference, batches, None if labels is None else labels.numpy())


def sample_batches(snapshot: "Snapshot", labels: Any, level: int, samples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield samples uint8 [n, H, W, C] as the classifier sees them; of an early stage, enlarged to the level first."""
    import torch

    from gan.metrics.classifier import shrink
    from gan.sampling import generate_batches, to_uint8

    z = torch.from_numpy(np.random.RandomState(seed).randn(samples, snapshot.G.z_dim).astype(np.float32))
    for batch in generate_batches(snapshot.G, z, labels, stage=snapshot.stage, alpha=snapshot.alpha):
        scale = 2 ** (level - snapshot.stage)
        yield shrink(to_uint8(batch).repeat(scale, axis=1).repeat(scale, axis=2))


def describe(reference: "Reference") -> str:
    """One line on the classifier behind the figures."""
    one, (count, height, width, _) = reference.classifier, reference.images.shape
    return (
        f"classifier of {one.classes} classes at {height}x{width}: {one.accuracy:.1%} right on {one.held_out} held-out "
        f"images of {count}"
    )


def table(rows: Mapping[str, "Score"]) -> str:
    """Scores by name as lines of text; lower is better for Fréchet distance and mode-KL."""
    used = [field for field in COLUMNS if any(getattr(row, field) is not None for row in rows.values())]
    cells = [["", *(COLUMNS[field][0] for field in used)]]
    for name, row in rows.items():
        values = [getattr(row, field) for field in used]
        texts = ["-" if v is None else format(v, COLUMNS[f][1]) for f, v in zip(used, values, strict=True)]
        cells.append([name, *texts])
    return "\n".join(aligned(cells))


def report(reference: "Reference", rows: Mapping[str, "Score"], paths: Mapping[str, Path]) -> dict[str, Any]:
    """The same for programs; `network` is the snapshot that was scored, null in the rows of reals."""
    one = reference.classifier
    return {
        "classifier": {"accuracy": one.accuracy, "held_out": one.held_out, "classes": one.classes},
        "rows": [
            {"name": name, "network": str(paths[name]) if name in paths else None, **asdict(row)}
            for name, row in rows.items()
        ],
    }


if __name__ == "__main__":
    run(main, "saddle evaluate")
