"""Scoring networks against a labeled dataset, by a classifier of its classes, and showing the scores as a table."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

from gan.errors import UserError
from launch.samples import classes_in_turn, read_reals, sample_batches
from launch.tables import aligned

if TYPE_CHECKING:
    from data.dataset import ImageDataset
    from gan.checkpoint import Snapshot
    from gan.metrics.score import Reference, Score

MOST_REALS = 50_000
COLUMNS = {  # field of a Score -> its heading and format
    "samples": ("samples", "d"),
    "frechet_distance": ("Fréchet", ".2f"),
    "mode_kl": ("mode-KL", ".4f"),
    "mode_kl_floor": ("(by chance)", ".4f"),
    "confidence": ("confidence", ".3f"),
    "accuracy_as_asked": ("as asked", ".3f"),
}


def build_reference(dataset: "ImageDataset", level: int, seed: int) -> "Reference":
    """At most MOST_REALS real images of a dataset at a level, and a classifier trained on them. It prints a line, as
    the training takes a while. Raises UserError for a dataset without classes.
    """
    import torch

    from gan.metrics.classifier import train_classifier
    from gan.metrics.score import Reference

    labels, classes = dataset.labels, dataset.manifest.classes
    if labels is None or classes is None:
        what = "no labels" if labels is None else f"vectors of {dataset.manifest.label_dim} numbers for labels"
        raise UserError(
            f"{dataset.path} has {what}, and a classifier of its images needs classes: prepare a folder with a "
            "sub-folder per class"
        )
    click.echo(f"training a classifier on {dataset.path} ...")
    images, indices = read_reals(dataset, MOST_REALS, level, seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    classifier = train_classifier(images, labels[indices], len(classes), seed=seed, device=device)
    return Reference(classifier, images, labels[indices], seed)


def score_network(snapshot: "Snapshot", reference: "Reference", level: int, samples: int, seed: int) -> "Score":
    """Score samples of a network against the reals of a level. A conditional network makes all classes in turn."""
    from gan.metrics.score import score

    labels = classes_in_turn(snapshot, samples)
    batches = sample_batches(snapshot, labels, level, samples, seed)
    return score(reference, batches, None if labels is None else labels.numpy())


def classifier_summary(reference: "Reference") -> str:
    """One line about the classifier: classes, resolution and accuracy."""
    classifier = reference.classifier
    count, height, width, _ = reference.images.shape
    return (
        f"classifier of {classifier.classes} classes at {height}x{width}: {classifier.accuracy:.1%} right on "
        f"{classifier.held_out} held-out images of {count}"
    )


def score_table(rows: Mapping[str, "Score"]) -> str:
    """A table of scores by name, without columns that are empty in all rows."""
    used = [field for field in COLUMNS if any(getattr(row, field) is not None for row in rows.values())]
    headings = ["", *(COLUMNS[field][0] for field in used)]
    lines = [[name, *(_cell(field, getattr(row, field)) for field in used)] for name, row in rows.items()]
    return "\n".join(aligned([headings, *lines]))


def _cell(field: str, value: float | None) -> str:
    return "-" if value is None else format(value, COLUMNS[field][1])
