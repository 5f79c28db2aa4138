"""Compare regularizers over objectives, gammas, seeds and datasets, and write a page about it."""

import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gan.config import parse_assignment
from gan.errors import UserError
from gan.ranks.signals import PREEMPTED, not_ignored
from launch.cli import run
from launch.ranks import end_with_parent, environment

if TYPE_CHECKING:
    from launch.grid.kinds import Unit
    from launch.grid.plan import Plan

PART = "--part-of-pool"
OUTDIR = "runs/regularizers"


def names(_ctx: click.Context, _param: click.Parameter, text: str | None) -> tuple[str, ...]:
    """ "a,b" -> ("a", "b"); commas before key= belong to a name, as in f:jsw:pi=0.3,form=paper."""
    from gan.methods.rows import split_names

    return tuple(split_names(text)) if text else ()


def numbers(_ctx: click.Context, param: click.Parameter, text: str | None) -> tuple[Any, ...]:
    """ "0,1" -> (0, 1); gammas may also be auto."""
    found = tuple(parse_assignment(f"x={part}")[1] for part in text.split(",")) if text else ()
    for value in found:
        if value != "auto" and type(value) not in (int, float):
            raise UserError(f"--{param.name}={text}: {value!r:.40} is no number")
    return found


def seed_numbers(_ctx: click.Context, _param: click.Parameter, text: str | None) -> tuple[int, ...]:
    """ "0,4-6" -> (0, 4, 5, 6), as in other commands."""
    from gan.sampling import parse_seeds

    return tuple(parse_seeds(text)) if text else ()


@click.command(context_settings={"max_content_width": 120})
@click.option(
    "--plan",
    "plans",
    multiple=True,
    default=["points"],
    show_default=True,
    help="A name in launch/plans, or a .toml file; repeatable.",
)
@click.option("--outdir", type=click.Path(path_type=Path, file_okay=False), help=f"Results.  [default: {OUTDIR}]")
@click.option("--datasets", callback=names, metavar="NAME,...", help="In place of the plan's; for images, LMDBs.")
@click.option("--objectives", callback=names, metavar="NAME,...", help="In place of the plan's.")
@click.option("--regularizers", callback=names, metavar="NAME,...", help="In place of the plan's methods; or all.")
@click.option("--gammas", callback=numbers, metavar="NUMBER,...", help="In place of the plan's; a number, or auto.")
@click.option("--seeds", callback=seed_numbers, metavar="0,1,4-6", help="In place of the plan's.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Set a key of the plan's settings.")
@click.option("--cell", metavar="HASH", help="Work on this cell only; the page has all that are finished.")
@click.option("--jobs", type=click.IntRange(1, 1024), default=1, show_default=True, help="Processes on this host.")
@click.option(
    "--results",
    multiple=True,
    type=click.Path(path_type=Path, exists=True),
    help="Train nothing: make the page from this results.jsonl, or folder of results; repeatable.",
)
@click.option(
    "--penalties",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Show these rows of `saddle benchmark penalties --json` as the price of each method.",
)
@click.option("-n", "--dry-run", is_flag=True, help="Say what would be done, and stop.")
@click.option(PART, "part", is_flag=True, hidden=True)
def main(outdir: Path | None, results: Sequence[Path], penalties: Path | None, **flags: Any) -> int:
    """Train every cell of a grid (dataset x objective x regularizer x gamma x seed), and report on them.

    Run the same command again to go on after a stop, or at the same time on other hosts that share --outdir: nobody
    repeats a cell. The report is regularizers.html in --outdir, with .csv, .md, and results.jsonl.
    """
    from launch.grid import work
    from launch.grid.report import read_results, write_report

    end_with_parent()
    if results and outdir is None:
        raise UserError("--results needs --outdir, the folder of the new page")
    outdir = outdir or Path(OUTDIR)
    if results:
        lines = [line for path in results for line in read_results(path)]
        click.echo(write_report(lines, outdir, penalties))
        return 0
    units, left_out = all_units(chosen_plans(flags))
    chosen = only(units, flags["cell"]) if flags["cell"] else units
    if not flags["part"]:
        for line in left_out:
            click.echo(f"left out: {line}")
    if flags["dry_run"]:
        return describe(chosen)
    if not fill(chosen, outdir, flags) or flags["part"]:
        return 0
    with work.claimed(outdir / "claims" / "report.lock") as claim:
        if claim is not None:
            click.echo(write_report(work.finished_rows(units, outdir), outdir, penalties, left_out))
    return 0


def chosen_plans(flags: Mapping[str, Any]) -> "list[Plan]":
    """The plans with what the flags say. Raises UserError for what cannot be."""
    from launch.grid.plan import narrowed, read_plan

    given = ("datasets", "objectives", "regularizers", "gammas", "seeds")
    settings = dict(parse_assignment(text) for text in flags["assignments"])
    replaced = {key: flags[key] for key in given}
    return [narrowed(read_plan(name), **replaced, settings=settings) for name in flags["plans"]]


def all_units(plans: "Sequence[Plan]") -> "tuple[list[Unit], list[str]]":
    """The units of all plans, and lines about what cannot be."""
    from launch.grid.kinds import units_of
    from launch.grid.plan import cells_of

    return units_of([one for plan in plans for one in cells_of(plan)])


def only(units: "Sequence[Unit]", cell: str) -> "list[Unit]":
    """The unit of the one cell whose hash begins like this. Raises UserError if there is not one."""
    from launch.grid.kinds import Unit

    found = [Unit(u.name, tuple(pair for pair in u.cells if pair[0].startswith(cell))) for u in units]
    found = [unit for unit in found if unit.cells]
    if sum(len(unit.cells) for unit in found) != 1:
        raise UserError(f"--cell={cell} is the beginning of {len(found) or 'no'} cells' hashes of this grid; give one")
    return found


def describe(units: "Sequence[Unit]") -> int:
    """Print the cells."""
    from launch.tables import text_table

    keys = ("kind", "dataset", "objective", "regularizer", "gamma", "seed", "label")
    rows = [{"cell": name} | {key: getattr(cell, key) for key in keys} for unit in units for name, cell in unit.cells]
    click.echo(text_table(rows))
    click.echo(f"{len(rows)} cells in {len(units)} units of work")
    return 0


def fill(units: "Sequence[Unit]", outdir: Path, flags: Mapping[str, Any]) -> bool:
    """Work on the cells, in several processes if so asked. -> is none missing?

    Raises UserError, when all others are done, if a cell failed."""
    from launch.grid import work

    work.prepare(outdir)
    with stopping():
        others = pool(outdir, flags) if flags["jobs"] > 1 else []
        try:
            left, failed = work.work_on(units, outdir, source_command(flags))
            for other in others:
                other.wait()
            if others and not failed:  # what others may have had when they were killed
                left, failed = work.work_on(left, outdir, source_command(flags))
        finally:
            for other in others:  # after a signal: let them save, before a scheduler ends what is left of this job
                other.terminate()
                other.wait()
    if failed:
        raise UserError(f"{len(failed)} of {len(units)} units of work failed: {next(iter(failed.values()))}")
    count = sum(len(unit.cells) for unit in units)
    if left and not flags["part"]:
        click.echo(f"others work on {sum(len(work.missing(outdir, unit)) for unit in left)} of {count} cells")
    return not left


@contextmanager
def stopping() -> Iterator[None]:
    """Within the block, a signal ends this process when what is under way has saved."""

    def stop(number: int, _frame: Any) -> None:
        sys.exit(130 if number == signal.SIGINT else PREEMPTED)

    before = {number: signal.signal(number, stop) for number in not_ignored()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def pool(outdir: Path, flags: Mapping[str, Any]) -> "list[subprocess.Popen[bytes]]":
    """Start processes that work beside this one, and end when it does."""
    jobs = flags["jobs"]
    cell = [f"--cell={flags['cell']}"] if flags["cell"] else []
    command = [sys.executable, "-m", "launch.benchmark", *words(flags), *cell, f"--outdir={outdir}", PART]
    return [subprocess.Popen(command, env=environment(jobs)) for _ in range(jobs - 1)]


def words(flags: Mapping[str, Any]) -> list[str]:
    """The arguments of `saddle benchmark` that say which cells there are."""
    keys = ("datasets", "objectives", "regularizers", "gammas", "seeds")
    given = [f"--{key}={','.join(map(str, flags[key]))}" for key in keys if flags[key]]
    plans = [f"--plan={name}" for name in flags["plans"]]
    return ["regularizers", *plans, *given, *(f"--set={text}" for text in flags["assignments"])]


def source_command(flags: Mapping[str, Any]) -> str:
    """The command that works on these cells, without what changes no result."""
    return shlex.join(["saddle", "benchmark", *words(flags)])


if __name__ == "__main__":
    run(main, "saddle benchmark regularizers")
