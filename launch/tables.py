"""Rows of plain values as a table for people and as JSON for programs."""

import hashlib
import json
import tempfile
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from gan.errors import UserError
from launch.outputs import output_file


def aligned(cells: Sequence[Sequence[str]], right: Container[int] | None = None) -> Iterator[str]:
    """Rows with equally many cells -> lines with aligned columns. right: the indices of the columns to align to the
    right, by default all but the first."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    to_the_right = range(1, len(widths)) if right is None else right
    for line in cells:
        texts = [
            text.rjust(width) if index in to_the_right else text.ljust(width)
            for index, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        yield "  ".join(texts).rstrip()


def text_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys -> aligned lines under a line of the keys; floats have six significant digits."""
    return "\n".join(aligned([list(rows[0]), *([_text(value) for value in row.values()] for row in rows)]))


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def write_json(path: Path, values: Any) -> None:
    """Write plain values as indented JSON, never half-written. Raises UserError if the file cannot be written."""
    with output_file(path) as part:
        part.write_text(json.dumps(values, indent=2) + "\n")


def fingerprint(values: Any) -> str:
    """A hash of plain values, 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator that adds `--json=FILE`. The command gets `json_path`, a Path or None, and passes it to `save_rows`.

    A path that cannot be written is refused before the command starts.
    """
    kind = click.Path(path_type=Path, dir_okay=False)
    text = "Also write the rows to this file, as JSON."
    return click.option("--json", "json_path", type=kind, callback=_check_writable, help=text)(command)


def _check_writable(_ctx: click.Context, _option: click.Parameter, path: Path | None) -> Path | None:
    """Return the option's path. Raises UserError if no file can be created there. Leaves no file or folder behind."""
    if path:
        nearest = next(folder for folder in path.absolute().parents if folder.exists())
        try:
            with tempfile.TemporaryFile(dir=nearest):
                pass
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}; choose another place") from error
    return path


def save_rows(json_path: Path | None, values: Any) -> None:
    """Write the values to the file of `--json` and say so; do nothing without `--json`. Raises UserError if the file
    cannot be written."""
    if json_path:
        write_json(json_path, values)
        click.echo(f"wrote {json_path}")
