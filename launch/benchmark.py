"""`saddle benchmark WHAT`: one module per subject, imported when it is called."""

from importlib import import_module

import click

from launch.cli import run

SUBJECTS = {
    "dirac": "The smallest GAN: trajectories, eigenvalues, step sizes, phase portraits.",
    "divergences": "A Gaussian fitted to a mixture by each divergence, learned beside exact.",
}


class Benchmark(click.Group):
    """A group that imports a subject only when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(SUBJECTS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        return import_module(f"launch.benchmark_{name}").main if name in SUBJECTS else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Subjects"):
            formatter.write_dl(list(SUBJECTS.items()))


@click.group(cls=Benchmark)
def main() -> None:
    """Measure one subject; each prints a table and, with --json=FILE, writes the same rows."""


if __name__ == "__main__":
    run(main, "saddle benchmark")
