"""What a kind of source is: one row, of which each module in data/sources declares some.

To add a kind, write a module there with a tuple `KINDS`; nothing else has to be told of it.
"""

from collections.abc import Callable
from dataclasses import replace
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

from data.items import Source


class Turn(IntEnum):
    """When a kind is asked whether a source is its own: the first that claims it has it.

    Within a turn the modules are asked in the order of their names, and the rows of a module in their own order. Where
    two kinds claim the same source, as any npz is a zip too, the special one needs an earlier turn, or an earlier row.
    """

    NAME = 0  # by a name that is built in
    CONTENT = 1  # a file by how it begins, a folder by what is in it
    CONTAINER = 2  # any folder, any zip, any tar
    PATTERN = 3  # by a name that stands for several files


class Kind(NamedTuple):
    """A kind of source."""

    description: str  # "a parquet file"; for error messages and --help
    details: str  # what labels it gives and the like, for --help; may be empty
    turn: Turn
    claims: Callable[[str], bool]  # of a source as the user named it, which need not exist; cheap
    open: Callable[[str, int | None], Source]  # (source, max_images); DataError if it is damaged, or without an image


def path_kind(
    description: str,
    claims: Callable[[Path], bool],
    open: Callable[[Path, int | None], Source],
    details: str = "",
    turn: Turn = Turn.CONTENT,
) -> Kind:
    """The row of a kind whose sources are paths. A source that names no files is made of that path alone."""

    def open_path(source: str, max_images: int | None) -> Source:
        opened = open(Path(source), max_images)
        return replace(opened, files=opened.files or (Path(source),))

    return Kind(
        description,
        details,
        turn,
        lambda source: claims(Path(source)),
        open_path,
    )
