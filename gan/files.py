"""Files that appear whole or not at all: each is written under another name, flushed to disk, then renamed."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO


def part_path(path: Path) -> Path:
    """The temporary path beside `path`. It keeps the suffix, from which encoders choose a format: `.walk.part.mp4` for
    `walk.mp4`."""
    return path.with_name(f".{path.stem}.part{path.suffix}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to. When the block ends, the file is flushed to disk and renamed to `path`; when the
    block fails, it is removed."""
    part = part_path(path)
    try:
        yield part
        sync(part)
        os.replace(part, path)
        sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, values: Any) -> None:
    """Write plain values as indented JSON. Raises OSError if that is not possible."""
    with replacing(path) as part:
        part.write_text(json.dumps(values, indent=2) + "\n")


def drop(stream: TextIO) -> None:
    """What is written to a stream of this process goes nowhere from now on: its reader is gone."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def flush_output() -> None:
    """Write what standard output and error still hold, or drop it where nobody reads it any more: at its end Python
    would try that again, fail, and change the exit code to 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            drop(stream)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of files, is on disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
