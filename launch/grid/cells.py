"""What a cell of a grid is, where it is worked on, and what becomes of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gan.errors import UserError
from gan.methods.pairs import find_pair

BY_CHANCE = "-by-chance"  # in the names of figures: what sets of real data have


@dataclass(frozen=True)
class Cell:
    """One result of the grid: a method on a dataset with a seed."""

    kind: str
    dataset: str
    objective: str
    regularizer: str
    gamma: float | str
    seed: int
    label: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Result:
    """What became of a cell."""

    diverged: str  # why there are no figures; empty if there are
    figures: Mapping[str, Any]  # {name: {"value", "low", "high"}}
    curve: Sequence[Any]  # [[images seen, {name: value}], ...]
    steps: int  # updates of G
    images: int  # reals shown to D
    # measured, of this cell: of several that are trained together, their share; CPU time of points, which one thread
    # trains, and wall time of trainings
    seconds: float
    provenance: Mapping[str, Any]  # as gan.metrics.provenance has it; of one without figures at least dataset_hash
    points: Sequence[Any] = ()  # some samples, where they are points in the plane
    picture: str = ""  # a PNG of samples in base64, where they are images


@dataclass(frozen=True)
class Work:
    """Where a cell is worked on."""

    identity: str  # of the cell
    folder: Path  # of its own
    claim: int  # the file descriptor that holds its lock, for processes started here to keep


def weighted(regularizer: str) -> bool:
    """Does gamma have an effect? A name that does not exist is refused later, with its objective."""
    try:
        _, row = find_pair("f:gan", regularizer)
    except UserError:
        return True
    return bool(row.has_penalty or row.noise or row.constrain)
