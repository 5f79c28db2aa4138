"""`saddle benchmark NAME`: one module per subject, imported when it is called."""

import ast
import re
from pathlib import Path

import click

from launch.cli import Saddle

SUFFIX = "_benchmark"


def find_benchmarks(folder: Path) -> dict[str, str]:
    """{NAME: the first sentence of its docstring} of every file NAME_benchmark.py of a folder, in alphabetical order.

    The files are read and not run: `saddle benchmark --help` must not wait for torch.
    """
    found = {}
    for path in sorted(folder.glob(f"*{SUFFIX}.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
        sentence = re.split(r"(?<=\.)\s", docstring, maxsplit=1)[0]
        found[path.stem.removesuffix(SUFFIX)] = " ".join(sentence.split())
    return found


class Benchmarks(Saddle):
    """NAME is the command `main` of launch/benchmark/NAME_benchmark.py. A new benchmark is one file."""

    table = find_benchmarks(Path(__file__).parent)
    module = "launch.benchmark.{}" + SUFFIX


@click.group(cls=Benchmarks, invoke_without_command=True)
@click.pass_context
def main(ctx: click.Context) -> None:
    """Measure ops, training steps, data and methods.

    Each benchmark prints a table and, with --json=FILE, writes its rows to a file.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
