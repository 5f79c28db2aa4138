"""`saddle verify`: read every record of a dataset and name the bad ones."""

import click

from data.verify import verify
from launch.cli import run
from launch.progress import track

SHOWN = 20


@click.command()
@click.argument("data", type=click.Path())
def main(data: str) -> int:
    """Check every record, the labels, the counts and the content hash of the dataset DATA. Exits 2 if any is bad."""
    problems = verify(data, track)
    for problem in problems[:SHOWN]:
        click.echo(problem, err=True)
    if problems:
        click.echo(
            f"{data}: {len(problems)} problems: run saddle prepare --repair SOURCE {data}, or copy it again", err=True
        )
        return 2
    click.echo(f"{data}: every record is good")
    return 0


if __name__ == "__main__":
    run(main, "saddle verify")
