"""`saddle average`: the average of a run's generator over another length of time, after training."""

from dataclasses import asdict
from pathlib import Path

import click

from launch.cli import run
from launch.outputs import output_file, output_option
from launch.samples import find_snapshot


@click.command()
@click.option(
    "--network",
    required=True,
    help="A snapshot of a run that was trained with --set ema.posthoc=0.05,0.1, or a run directory or outdir (its "
    "newest snapshot).",
)
@click.option(
    "--length",
    type=click.FloatRange(0, 0.28),
    required=True,
    help="Standard deviation of the weights over time, as a share of the training time until the snapshot; between "
    "those of ema.posthoc.",
)
@output_option("average.safetensors")
def main(network: str, length: float, output: Path) -> None:
    """Average the generator over another length of time than in training, and write it as a snapshot.

    It is made of the averages that lie beside the snapshot (posthoc-*.safetensors).
    """
    from gan.checkpoint import save_snapshot
    from gan.posthoc import reconstruct

    snapshot, count, left = reconstruct(find_snapshot(network), length)
    where = (snapshot.images, snapshot.stage, snapshot.alpha, snapshot.images_seen)
    with output_file(output) as part:
        save_snapshot(part, snapshot.G, asdict(snapshot.config), *where)
    click.echo(
        f"wrote {output}: length {length:g} after {snapshot.images_seen} images, made of {count} averages; its weights "
        f"over time differ from that length's by {left:.1%}" + (", as there are few averages" if left > 0.05 else "")
    )


if __name__ == "__main__":
    run(main, "saddle average")
