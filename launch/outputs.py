"""Writing files to the paths that a command's user gave."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click

from gan.errors import UserError
from gan.files import part_path, replacing


@contextmanager
def output_file(path: Path) -> Iterator[Path]:
    """A temporary path to write to, which is renamed to `path` when the block ends, and removed when the block fails.

    Missing folders are made, and what killed processes left of such files is removed. Raises UserError if the system
    refuses to write.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_left_over(path.parent, path.suffix)
        with being_written(part_path(path)), replacing(path) as part:
            yield part
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; choose another place") from error


@contextmanager
def being_written(part: Path) -> Iterator[None]:
    """Create a temporary file, and hold a lock on it within the block. A killed process holds no lock."""
    descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        with suppress(OSError):  # a file system without locks, where `remove_left_over` removes nothing
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def remove_left_over(folder: Path, suffix: str) -> None:
    """Remove the temporary files with this suffix that no process writes any more."""
    for part in folder.glob(f".*.part{suffix}"):
        with suppress(OSError):  # another process writes it, it is another user's, or it is gone
            descriptor = os.open(part, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                part.unlink()
            finally:
                os.close(descriptor)


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
