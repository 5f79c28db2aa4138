"""Files that appear whole or not at all: written beside their place, put on the disk, then renamed."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write a file to, which becomes `path` by one rename when all of it is on the disk, and is removed when
    the block fails. It keeps the suffix, by which encoders know what to write: `.walk.part.mp4` for `walk.mp4`."""
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        yield part
        sync(part)
        os.replace(part, path)
        sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, values: Any) -> None:
    """Write plain values as indented JSON. Raises OSError where that is not possible."""
    with replacing(path) as part:
        part.write_text(json.dumps(values, indent=2) + "\n")


def sync(path: Path) -> None:
    """Wait until a file, or the list of a folder's files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
