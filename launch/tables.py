"""Rows of plain values as a table for people and as JSON for programs."""

import json
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.outputs import output_file


def aligned(cells: Sequence[Sequence[str]], right: Container[int] | None = None) -> Iterator[str]:
    """Rows of as many cells each -> lines of columns, to the right in those named: by default all but the first."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        texts = (
            text.rjust(width) if (index > 0 if right is None else index in right) else text.ljust(width)
            for index, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        yield "  ".join(texts).rstrip()


def text_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys -> aligned lines under them; floats to six significant digits."""
    return "\n".join(aligned([list(rows[0]), *([_text(value) for value in row.values()] for row in rows)]))


def _text(value: Any) -> str:
    return "-" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def write_json(path: Path, values: Any) -> None:
    """Write plain values as indented JSON, never half-written. UserError where it cannot be written."""
    with output_file(path) as part:
        part.write_text(json.dumps(values, indent=2) + "\n")
