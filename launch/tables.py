"""Rows of plain values as a table for people and as JSON for programs."""

import json
import tempfile
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from gan.errors import UserError
from launch.outputs import output_file


def aligned(cells: Sequence[Sequence[str]], right: Container[int] | None = None) -> Iterator[str]:
    """Rows of as many cells each -> lines of columns, to the right in those named: by default all but the first."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    to_the_right = range(1, len(widths)) if right is None else right
    for line in cells:
        texts = [
            text.rjust(width) if index in to_the_right else text.ljust(width)
            for index, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        yield "  ".join(texts).rstrip()


def text_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys -> aligned lines under them; floats to six significant digits."""
    return "\n".join(aligned([list(rows[0]), *([_text(value) for value in row.values()] for row in rows)]))


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def write_json(path: Path, values: Any) -> None:
    """Write plain values as indented JSON, never half-written. UserError where it cannot be written."""
    with output_file(path) as part:
        part.write_text(json.dumps(values, indent=2) + "\n")


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: `--json=FILE`, which the command gets as `json_path`, a Path or None, and hands to `save_rows`.

    A place that cannot be written is refused before the command begins.
    """
    kind = click.Path(path_type=Path, dir_okay=False)
    text = "Write the rows here too."
    return click.option("--json", "json_path", type=kind, callback=_check_writable, help=text)(command)


def _check_writable(_ctx: click.Context, _option: click.Parameter, path: Path | None) -> Path | None:
    """The path of an option. UserError if nothing can be created there; no file or folder is left behind."""
    if path:
        nearest = next(folder for folder in path.absolute().parents if folder.exists())
        try:
            with tempfile.TemporaryFile(dir=nearest):
                pass
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}; choose another place") from error
    return path


def save_rows(json_path: Path | None, values: Any) -> None:
    """Write what `--json` asks for and say so; nothing where it was not given. UserError where it cannot be written."""
    if json_path:
        write_json(json_path, values)
        click.echo(f"wrote {json_path}")
