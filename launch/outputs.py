"""Writing files to the paths that a command's user gave."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from gan.errors import UserError
from gan.files import replacing


@contextmanager
def output_file(path: Path) -> Iterator[Path]:
    """A temporary path to write to, which is renamed to `path` when the block ends, and removed when the block fails.

    Missing folders are made. Raises UserError if the system refuses to write.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            yield part
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; choose another place") from error


def ending(suffix: str) -> Callable[..., Path]:
    """A callback that refuses an output path with another suffix, before anything is made."""

    def check(ctx: click.Context, param: click.Parameter, path: Path) -> Path:
        if path.suffix != suffix:
            raise click.BadParameter(f"'{path}' does not end in {suffix}; write for example {path.stem or 'x'}{suffix}")
        return path

    return check


def output_option(default: str) -> Callable[..., Any]:
    """The option `--output`, for a path with the same suffix as its default."""
    kind, check = click.Path(path_type=Path), ending(Path(default).suffix)
    return click.option("--output", type=kind, callback=check, default=default, show_default=True)
