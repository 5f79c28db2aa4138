"""`saddle evaluate`: scores of snapshots beside those of the real images; divergences between sets of samples."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from data.names import composed
from gan.errors import UserError
from launch.cli import run
from launch.samples import find_snapshot, load_network
from launch.scores import build_reference, classifier_summary, score_network, score_table
from launch.tables import json_option, save_rows

if TYPE_CHECKING:
    from data.dataset import ImageDataset
    from gan.checkpoint import Snapshot
    from gan.metrics.score import Reference, Score


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
@json_option
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
        from launch.divergence_estimates import estimate_divergences

        others = [*networks, *([against] if against else [])]
        if len(others) != 1:
            raise UserError("--divergence compares --data with one other set: give --against, or one --network")
        return estimate_divergences(divergences, data, others[0], samples, seed, features, json_path)
    if not networks:
        raise UserError("give --network to score, or --divergence and --against to compare two sets")

    from data.dataset import ImageDataset

    paths = {network: find_snapshot(network) for network in networks}
    snapshots = {network: load_network(path) for network, path in paths.items()}
    dataset = ImageDataset(data)
    level = max(check_match(paths[network], snapshot, dataset) for network, snapshot in snapshots.items())
    reference = build_reference(dataset, level, seed)
    click.echo(classifier_summary(reference))
    rows = {name: score_network(snapshot, reference, level, samples, seed) for name, snapshot in snapshots.items()}
    rows |= reference.floors()
    click.echo(score_table(rows))
    save_rows(json_path, scores_as_json(reference, rows, paths))


def check_match(path: Path, snapshot: "Snapshot", dataset: "ImageDataset") -> int:
    """The level of the dataset that a network makes. UserError if its images or classes are not the dataset's."""
    manifest = dataset.manifest
    made = snapshot.images
    same_format = (made.channels, made.base) == (manifest.channels, manifest.base)
    if not same_format or snapshot.stage not in manifest.levels:
        raise UserError(
            f"{path} makes images of {made.size_name(snapshot.stage)} with {made.channels} channels, "
            f"{dataset.path} has {'{}x{}'.format(*manifest.resolution)} with {manifest.channels}; "
            "give the dataset it was trained on"
        )
    if snapshot.alpha < 1:
        raise UserError(
            f"{path} was saved while its last stage was fading in (alpha {snapshot.alpha:.2f}); "
            "scores are taken at alpha 1 only: give a later snapshot"
        )
    names = [composed(name) for name in made.class_names]
    if snapshot.G.classes and names != [composed(name) for name in manifest.classes or ()]:
        raise UserError(
            f"{path} was trained on other classes than those of {dataset.path}; give the dataset of its run"
        )
    return snapshot.stage


def scores_as_json(reference: "Reference", rows: Mapping[str, "Score"], paths: Mapping[str, Path]) -> dict[str, Any]:
    """The table for programs; `network` is the snapshot that was scored, null in the rows of reals."""
    classifier = reference.classifier
    return {
        "classifier": {
            "accuracy": classifier.accuracy,
            "held_out": classifier.held_out,
            "classes": classifier.classes,
        },
        "rows": [
            {"name": name, "network": str(paths[name]) if name in paths else None, **asdict(row)}
            for name, row in rows.items()
        ],
    }


if __name__ == "__main__":
    run(main, "saddle evaluate")
