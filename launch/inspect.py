"""`saddle inspect`: what is in a dataset."""

import json
from dataclasses import asdict
from typing import Any

import click
import numpy as np

from data.dataset import ImageDataset
from data.sizes import format_megabytes, format_size
from launch.cli import run


def dataset_facts(dataset: ImageDataset) -> dict[str, Any]:
    """The manifest of a dataset, its size and its counts, as plain values."""
    manifest = dataset.manifest
    classes = manifest.classes
    labels = dataset.labels if classes is not None else None
    counts = None if labels is None else np.bincount(labels, minlength=len(classes or ())).tolist()
    return {
        "path": str(dataset.path),
        "bytes": dataset.path.stat().st_size,
        **asdict(manifest),
        "resolution": manifest.resolution,
        "sizes": [manifest.size(level) for level in manifest.levels],
        "images_per_class": counts,
    }


def show_facts(facts: dict[str, Any]) -> None:
    """Print the result of `dataset_facts` as text."""
    click.echo(f"{facts['path']}: {format_megabytes(facts['bytes'])}, from {facts['source']}")
    click.echo(f"images   {facts['count']}, {format_size(facts['resolution'])}, {facts['channels']} channels")
    click.echo(
        f"levels   {', '.join(map(format_size, facts['sizes']))} ({facts['encoding']}{', lossy' * facts['lossy']})"
    )
    for reason, count in facts["skipped"].items():
        click.echo(f"skipped  {count}: {reason}")
    for change, count in facts["color_changes"].items():
        click.echo(f"colors   {count}: {change}")
    if facts["classes"] is None:
        click.echo("classes  none" if facts["label_dim"] is None else f"labels   {facts['label_dim']} numbers each")
    else:
        counts = facts["images_per_class"]
        click.echo(f"classes  {len(counts)}, of {min(counts)} to {max(counts)} images")
        for name, count in list(zip(facts["classes"], counts, strict=True))[:20]:
            click.echo(f"         {name}: {count}")
    click.echo(f"hash     {facts['content_hash']}")


@click.command()
@click.argument("data", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def main(data: str, as_json: bool) -> None:
    """Show what is in the dataset DATA."""
    facts = dataset_facts(ImageDataset(data))
    if as_json:
        click.echo(json.dumps(facts, indent=1))
    else:
        show_facts(facts)


if __name__ == "__main__":
    run(main, "saddle inspect")
