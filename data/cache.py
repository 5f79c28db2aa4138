"""A copy of a dataset on this node's own disk, made once, for datasets that lie on a slow or distant file system.

    NAME.lmdb   the copy; NAME is the content hash and a digest of the whole manifest, so another dataset, or the same
                images encoded otherwise, gets a file of its own
    NAME.json   its size, CRC and time of change when it was last known to be equal to the original
    NAME.lock   held by whoever makes or checks it

A copy whose size and time of change are those noted is used as it is; another one is read again, and replaced unless
its CRC is right. Nothing is ever removed but damaged or unfinished copies of the dataset that is asked for.
"""

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from data.errors import DataError
from data.store import open_reader

CHUNK = 16 << 20
WAIT = 3600.0  # seconds for another process's copy to be ready


def cache_path(path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> Path:
    """Where in `folder` the copy of a dataset belongs. DataError if `path` is no dataset."""
    manifest = open_reader(Path(path)).manifest
    digest = hashlib.sha256(manifest.to_json().encode()).hexdigest()
    return Path(folder).absolute() / f"{manifest.content_hash[:16]}-{digest[:8]}.lmdb"


def cached(
    path: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    wait: float = WAIT,
    announce: Callable[[str], None] = lambda line: None,
) -> Path:
    """The sound copy in `folder` of the dataset at `path`, made now if there is none.

    Whoever asks meanwhile waits for it. DataError if that takes more than `wait` seconds, there is no room, or the copy
    cannot be written or read.
    """
    source = Path(path)
    before = _identity(source)
    copy = cache_path(path, folder)
    lock = copy.with_suffix(".lock")
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock, timeout=wait):  # released when its holder dies
            if not _is_sound(copy):
                announce(f"copying {source} to {copy}")
                _make(source, copy, before)
    except Timeout:
        raise DataError(f"{lock} has been held for {wait:g} s by another process that copies") from None
    except OSError as error:
        raise DataError(f"cannot keep a copy of {source} in {folder}: {error}") from error
    return copy


def _is_sound(copy: Path) -> bool:
    """Is it what was noted when it was equal to its original? Notes the time if only that has changed."""
    try:
        noted = json.loads(_note(copy).read_text())
        now = _state(copy, noted["crc"])
        if now == noted:
            return True
        if now["bytes"] != noted["bytes"] or _crc(copy) != noted["crc"]:
            return False
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return False
    _note(copy).write_text(json.dumps(now))
    return True


def _identity(source: Path) -> tuple[int, ...]:
    """What is another if a file of this name was replaced or written to; nothing if there is none."""
    if not source.exists():
        return ()
    status = source.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _make(source: Path, copy: Path, identity: tuple[int, ...]) -> None:
    """Copy, read it again, and put it in place. identity: that of the source when the copy was named."""
    size = source.stat().st_size
    part = copy.with_suffix(".part")
    part.unlink(missing_ok=True)
    free = shutil.disk_usage(copy.parent).free + (copy.stat().st_size if copy.exists() else 0)
    if size > free:
        raise DataError(f"{source} has {size >> 20} MB and {copy.parent} {free >> 20} MB free: make room there")
    copy.unlink(missing_ok=True)  # who reads it keeps it
    try:
        crc = _copy(source, part)
        if part.stat().st_size != size or _crc(part) != crc:
            raise DataError(f"{copy.parent} does not give back what was written: is the disk failing?")
        if _identity(source) != identity:
            raise DataError(f"{source} was replaced while it was copied: start again")
        os.replace(part, copy)
    finally:
        part.unlink(missing_ok=True)
    _note(copy).write_text(json.dumps(_state(copy, crc)))


def _copy(source: Path, part: Path) -> int:
    """Copy a file to the disk itself. -> its CRC"""
    crc = 0
    with source.open("rb") as read, part.open("wb") as written:
        while chunk := read.read(CHUNK):
            crc = zlib.crc32(chunk, crc)
            written.write(chunk)
        written.flush()
        os.fsync(written.fileno())
        if hasattr(os, "posix_fadvise"):  # or the check would read what is still in memory
            os.posix_fadvise(written.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return crc


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc


def _note(copy: Path) -> Path:
    return copy.with_suffix(".json")


def _state(copy: Path, crc: int) -> dict[str, Any]:
    status = copy.stat()
    return {"bytes": status.st_size, "changed_ns": status.st_mtime_ns, "crc": crc}
