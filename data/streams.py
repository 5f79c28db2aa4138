"""Files that may be compressed, and archives of arrays, read within bounds."""

import bz2
import gzip
import lzma
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from data.errors import DataError

MAX_ARRAY = 4 << 30  # bytes of an array, which is held in memory
MAX_MEMBER = 256 << 20  # bytes that one file of an archive may unpack to
ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # the others cannot be unpacked within bounds
DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError)  # what reading a damaged compressed file raises

COMPRESSIONS: dict[bytes, Callable[..., Any]] = {  # how such a file begins -> how it is opened
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}


def open_unpacked(path: Path) -> IO[bytes]:
    """A file, uncompressed if it is compressed. Raises some of DAMAGE, now or when read, if it is damaged."""
    with path.open("rb") as file:
        magic = file.read(6)
    opener = next((opener for start, opener in COMPRESSIONS.items() if magic.startswith(start)), None)
    return opener(path) if opener else path.open("rb")


def head(path: Path, size: int) -> bytes:
    """The first bytes of a file, uncompressed if it is compressed; fewer if there are not as many or it is damaged."""
    if not path.is_file():
        return b""
    try:
        with open_unpacked(path) as file:
            return file.read(size)
    except DAMAGE:
        return b""


class Bounded:
    """A file of which nobody reads more than `limit` bytes at once: a header may lie about what follows it."""

    def __init__(self, file: IO[bytes], limit: int) -> None:
        self._file = file
        self._limit = limit
        self.seek = file.seek
        self.tell = file.tell
        self.last = b""  # what was read last

    def read(self, size: int = -1) -> bytes:
        """The next `size` bytes. OSError if that is negative or above the limit."""
        if not 0 <= size <= self._limit:
            raise OSError(f"a part of it claims to have {size} bytes")
        self.last = self._file.read(size)
        return self.last


def read_npz(path: Path, choose: Callable[[Sequence[str]], Sequence[str]]) -> dict[str, np.ndarray]:
    """The arrays of an npz file that are chosen among the names of all. DataError if it is damaged or too large."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: _read_array(path, archive, name) for name in choose(archive.files)}
    except DataError:
        raise
    except Exception as error:  # bad bytes make numpy and zipfile raise nearly anything
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise DataError(f"{path} is refused or damaged: {reason}") from error


def _read_array(path: Path, archive: np.lib.npyio.NpzFile, name: str) -> np.ndarray:
    assert archive.zip is not None
    member = archive.zip.getinfo(name if name in archive.zip.namelist() else f"{name}.npy")
    if member.file_size > MAX_ARRAY:
        raise DataError(f"{name} in {path} unpacks to {member.file_size} bytes; {MAX_ARRAY} are the limit")
    if member.compress_type not in ZIP_METHODS:
        raise DataError(f"{name} in {path} is packed by another method than deflate")
    array = archive[name]
    if not isinstance(array, np.ndarray):
        raise DataError(f"{name} in {path} is no array")
    return array
