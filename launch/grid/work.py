"""Working on the cells of a grid: any number of processes, on any hosts that share the folder, take what nobody has.

A process claims a unit by a lock on a file, which the system drops when the process and the training that it started
have ended, in whatever way. Each finished cell is a file that appears whole.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from gan.errors import UserError
from gan.files import write_json
from launch.grid.cells import Work
from launch.grid.kinds import Unit, find_kind, row_of


def cell_path(folder: Path, identity: str) -> Path:
    """The file of a finished cell."""
    return folder / "cells" / f"{identity}.json"


def missing(folder: Path, unit: Unit) -> list[tuple[str, Any]]:
    """The cells of a unit that nobody has finished."""
    return [(identity, cell) for identity, cell in unit.cells if not cell_path(folder, identity).exists()]


@contextmanager
def claimed(path: Path) -> Iterator[int | None]:
    """Within the block this process has the claim: the descriptor of its file. None if another process has it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        yield descriptor
    finally:
        os.close(descriptor)


def prepare(folder: Path) -> None:
    """Make the folder of results. Raises UserError if nothing can be written or locked there."""
    try:
        for name in ("cells", "claims", "runs"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        with claimed(folder / "claims" / ".trial"):
            pass
    except OSError as error:
        raise UserError(f"{folder} cannot be used: {error.strerror or error}; choose another outdir") from error


def work_on(units: Sequence[Unit], folder: Path, source: str) -> tuple[list[Unit], dict[str, UserError]]:
    """Work on what is missing until others have the rest. -> (the units that are not finished: theirs, or failed ones;
    why units failed here, by name). A unit that fails does not keep from the others, and is not tried again.

    source: the command that the cells' rows name, without the cell.
    """
    failed: dict[str, UserError] = {}
    while True:
        open_units = [unit for unit in units if missing(folder, unit)]
        done = 0
        for unit in open_units:
            if unit.name not in failed:
                try:
                    done += work_on_unit(unit, folder, source)
                except UserError as error:
                    click.echo(f"failed: {error}", err=True)
                    failed[unit.name] = error
        left = [unit for unit in open_units if missing(folder, unit)]
        if not left or not done:
            return left, failed


def work_on_unit(unit: Unit, folder: Path, source: str) -> int:
    """Claim a unit and finish its cells. -> how many were finished here."""
    with claimed(folder / "claims" / f"{unit.name}.lock") as claim:
        if claim is None:
            return 0
        todo = missing(folder, unit)  # another process may have finished them a moment ago
        if not todo:
            return 0
        identities = {id(cell): identity for identity, cell in todo}
        kind = find_kind(todo[0][1].kind)
        work = [(cell, Work(identity, folder / "runs" / identity, claim)) for identity, cell in todo]
        for cell, result in kind.run(work):
            identity = identities[id(cell)]
            command = f"{source} --cell={identity}"
            write_json(cell_path(folder, identity), row_of(identity, cell, result, command))
            say(cell, result)
        return len(todo)


def say(cell: Any, result: dict[str, Any]) -> None:
    """One line about a finished cell."""
    best = next((n for n in result["figures"] if n.startswith(find_kind(cell.kind).best)), "")
    shown = f"{best} {result['figures'][best]['value']:.4g}" if best else f"diverged: {result['diverged']}"
    name = f"{cell.dataset} {cell.objective} {cell.label or cell.regularizer} gamma {cell.gamma} seed {cell.seed}"
    click.echo(f"{name}: {shown}, {result['seconds']:g} s")


def finished_rows(units: Sequence[Unit], folder: Path) -> list[str]:
    """The lines of results.jsonl: one for each finished cell of the plan, in its order."""
    paths = [cell_path(folder, identity) for unit in units for identity, _ in unit.cells]
    return [one_line(path.read_text(errors="replace")) for path in paths if path.exists()]


def one_line(text: str) -> str:
    """JSON without line breaks; text that is no JSON is kept as it is, for the report to mark."""
    try:
        return json.dumps(json.loads(text))
    except ValueError:
        return " ".join(text.split()) or "an empty file"
