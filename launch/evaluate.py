"""`saddle evaluate`: scores of snapshots beside scores of real images; divergences between two sets of samples."""

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
@click.option("--data", "data", required=True, help="The dataset to compare with; scores need one with classes.")
@click.option(
    "--divergence",
    "divergences",
    metavar="NAME,...",
    help="Instead of scores, estimate these divergences D(data||against), for example kl,js,jsw:pi=0.3.",
)
@click.option(
    "--against",
    help="The second set for --divergence: a dataset, a snapshot, a run, or a .npy of vectors [n, K] or uint8 images "
    "[n, H, W, C].",
)
@click.option(
    "--features",
    type=bool,
    default=False,
    help="Estimate divergences between features of a classifier that is trained on the labels of --data.",
)
@click.option(
    "--samples",
    type=click.IntRange(100),
    default=10_000,
    show_default=True,
    help="Samples of each network; with --divergence, at most so many of each set.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    show_default=True,
    help="Seed of the latents and of the classifier.",
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

    Scores are the Fréchet distance and mode-KL, in the features of a small classifier that is first trained on the
    dataset. The table also has scores of real images: compare a Fréchet distance with that between two halves of them.
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
    """The dataset's level with the size of a network's images. Raises UserError if its images or classes differ from
    the dataset's."""
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
    """The table as plain values for JSON; `network` is the scored snapshot's path, null in the rows of reals."""
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
