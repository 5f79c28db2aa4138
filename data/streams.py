"""Files that may be compressed, read within bounds."""

import bz2
import gzip
import lzma
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

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
