"""Rows of plain values as a table for people and as JSON for programs."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.video import replacing


def text_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys -> aligned lines, the first column to the left; floats to six significant digits."""
    cells = [list(rows[0]), *([_text(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in cells)
    return "\n".join("  ".join(line) for line in lines)


def _text(value: Any) -> str:
    return "-" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """As JSON, never half-written. UserError where it cannot be written."""
    part = path.with_name(path.name + ".part")
    with replacing(path, part):
        part.write_text(json.dumps(list(rows), indent=2) + "\n")
