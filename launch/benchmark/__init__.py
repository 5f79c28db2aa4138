"""`saddle benchmark NAME`: one module per subject, imported when it is called."""

import click

from launch.cli import Saddle

BENCHMARKS = {
    "ops": "Fused ops beside their reference, the best of stock PyTorch, and a copy of the same bytes.",
    "data": "Building and reading datasets beside Pillow on the folder, a copy of the bytes, and litdata.",
    "step": "The training step on several ranks, per stage, and what it would be on many.",
    "dirac": "The smallest GAN: trajectories, eigenvalues, step sizes, phase portraits.",
    "regularizers": "What each regularizer adds to the cost of a D step.",
    "divergences": "A Gaussian fitted to a mixture by each divergence, learned beside exact.",
}


class Benchmarks(Saddle):
    """The group of benchmarks: NAME is the command `main` of launch/benchmark/NAME_benchmark.py."""

    table = BENCHMARKS
    module = "launch.benchmark.{}_benchmark"


@click.group(cls=Benchmarks, invoke_without_command=True)
@click.pass_context
def main(ctx: click.Context) -> None:
    """Measure ops, data and methods; each prints a table and, with --json=FILE, writes the same rows."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
