"""Kinds of cells, as rows of a table: what decides a result, which cells are worked on together, and how."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gan.config import check_name
from gan.errors import UserError
from gan.methods.regularizers import REGULARIZERS
from launch.grid import points, training
from launch.grid.cells import Cell, Work
from launch.tables import fingerprint

FORMAT = 1  # of identities: raised if the same settings come to mean something else


@dataclass(frozen=True)
class Kind:
    """One row of the table."""

    # Raises UserError or DataError for a cell that cannot be. -> what decides its result, beside kind and seed
    decides: Callable[[Cell], Mapping[str, Any]]
    run: Callable[[Sequence[tuple[Cell, Work]]], Iterator[tuple[Cell, dict[str, Any]]]]
    together: bool  # cells that differ in nothing but the seed are worked on together
    best: str  # the beginning of the name of the figure that tables are sorted by; less is better
    floor: str  # a sentence about what that figure is between sets of real data
    regularizers: tuple[str, ...]  # that can be used
    gamma: float | str  # where a plan says none
    # the settings of a plan as this host trains with them; raises UserError for what no method could be trained with
    on_this_host: Callable[[Mapping[str, Any]], Mapping[str, Any]]


KINDS: dict[str, Kind] = {
    "points": Kind(
        points.decides,
        points.run,
        together=True,
        best="mode-kl",
        floor="Samples of the data itself would have {} by chance.",
        regularizers=tuple(name for name in REGULARIZERS if name != "bcr"),
        gamma=1.0,
        on_this_host=points.on_this_host,
    ),
    "training": Kind(
        training.decides,
        training.run,
        together=False,
        best="fd-",
        floor="Between one half of the reals and the other it is {}.",
        regularizers=tuple(REGULARIZERS),
        gamma="auto",
        on_this_host=training.on_this_host,
    ),
}


def find_kind(name: str) -> Kind:
    """The row of a name. Raises UserError for one that does not exist."""
    check_name("kind", name, KINDS)
    return KINDS[name]


@dataclass(frozen=True)
class Unit:
    """Cells that are claimed and worked on together."""

    name: str
    cells: tuple[tuple[str, Cell], ...]  # by identity


def units_of(cells: Sequence[Cell]) -> tuple[list[Unit], list[str]]:
    """(units of work, a line for each method that cannot be). Cells that are the same are counted once.

    Raises UserError if no cell can be.
    """
    units: dict[str, dict[str, Cell]] = {}
    left_out: dict[str, str] = {}  # a line -> its reason alone
    for cell in cells:
        kind = find_kind(cell.kind)
        try:
            decides = kind.decides(cell)
        except UserError as error:
            left_out[f"{cell.objective} with {cell.regularizer}: {error}"] = str(error)
            continue
        shared = {"format": FORMAT, "kind": cell.kind, **decides}
        identity = fingerprint({**shared, "seed": cell.seed})
        unit = fingerprint(shared) if kind.together else identity
        units.setdefault(unit, {}).setdefault(identity, cell)
    if not units:
        reasons = set(left_out.values())  # said once where all have the same
        said = "; ".join(reasons if len(reasons) == 1 else left_out) or "it has none"
        raise UserError(f"no cell of this plan can be: {said}"[:600])
    return [Unit(name, tuple(found.items())) for name, found in units.items()], list(left_out)


def row_of(identity: str, cell: Cell, result: Mapping[str, Any], command: str) -> dict[str, Any]:
    """A result as plain values, as a line of results.jsonl has it."""
    return {"format": FORMAT, "cell": identity, **asdict(cell), **result, "command": command}
