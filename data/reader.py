"""A dataset file open for reading: checked before the first read, once per process, shared by all who read it."""

import ctypes
import math
import mmap
import os
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary, finalize

import numpy as np

from data.errors import DataError
from data.store import CRC_BYTES, ENCODINGS, LABELS, MANIFEST, Manifest, image_key, part_path, without_crc


class Reader:
    """A dataset file open in this process. Get one from `open_reader`; it closes when nobody holds it any longer."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.env = _open_checked(path)
        finalize(self, self.env.close)
        try:
            self.manifest = self._manifest()
        except DataError:
            self.env.close()  # the traceback keeps `self` alive, and the file could not be opened again
            raise

    def _manifest(self) -> Manifest:
        with self._transaction() as transaction:
            text = transaction.get(MANIFEST)
            if text is None:
                raise DataError(f"{self.path} is unfinished (no manifest): remove it and run saddle prepare again")
            try:
                return Manifest.from_json(without_crc(bytes(text)))
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"the manifest of {self.path} cannot be read ({error}): it is damaged or of another version; "
                    "run saddle prepare again"
                ) from error

    @contextmanager
    def _transaction(self) -> Iterator[Any]:
        import lmdb

        try:
            with self.env.begin(buffers=True) as transaction:
                yield transaction
        except lmdb.Error as error:
            raise DataError(f"{self.path} is damaged ({error}): run saddle prepare again") from error

    def read(self, indices: np.ndarray, level: int, check: bool = False, out: np.ndarray | None = None) -> np.ndarray:
        """uint8 [n, H, W, C]: the images `indices` (int [n]) of a level, in `out` (C order) if given.

        DataError names a record that is damaged.
        """
        shape = (*self.manifest.size(level), self.manifest.channels)
        images = np.empty((len(indices), *shape), np.uint8) if out is None else out
        assert images.shape == (len(indices), *shape) and images.dtype == np.uint8 and images.flags.c_contiguous
        encoding = ENCODINGS[self.manifest.encoding]
        pixels, length = memoryview(images.reshape(-1)), math.prod(shape)
        with self._transaction() as transaction:
            get = transaction.get
            for position, index in enumerate(indices.tolist()):
                try:
                    payload = _payload(get(image_key(level, index)), check)
                    if encoding.plain:  # half the time of going through an array
                        pixels[position * length : (position + 1) * length] = payload
                    else:
                        images[position] = encoding.decode(payload, shape)
                except ValueError as error:
                    raise DataError(f"{self._name(level, index)} is damaged: {error}") from None
        return images

    def _name(self, level: int, index: int) -> str:
        height, width = self.manifest.size(level)
        return f"image {index} at {height}x{width} in {self.path}"

    def labels(self) -> np.ndarray | None:
        """int64 [N], or None if the dataset has no classes. DataError if they are damaged."""
        if self.manifest.classes is None:
            return None
        with self._transaction() as transaction:
            try:
                labels = np.frombuffer(_payload(transaction.get(LABELS), check=True), "<i4").astype(np.int64)
            except ValueError as error:
                raise DataError(f"the labels in {self.path} are damaged: {error}") from None
        if len(labels) != self.manifest.count:
            raise DataError(f"{self.path} has {len(labels)} labels for {self.manifest.count} images")
        return labels

    def entries(self) -> int:
        """How many keys the file has."""
        return self.env.stat()["entries"]

    def drop_pages(self) -> None:
        """Let go of the pages that reading has mapped into this process; others may read meanwhile.

        DataError where that cannot be done. The kernel may keep them in its page cache, which it frees when it must.
        """
        for start, length in self._maps:
            if _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED):
                raise DataError(f"cannot drop the pages of {self.path}: {os.strerror(ctypes.get_errno())}")

    @cached_property
    def _maps(self) -> list[tuple[int, int]]:
        """(address, bytes) of LMDB's map of the file: it does not tell, and the kernel does."""
        try:
            lines = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
        except OSError as error:
            raise DataError(f"the pages of {self.path} can be dropped on Linux only; use run.pages=keep") from error
        name = str(self.path.resolve())
        spans = [line[0].split("-") for line in lines if line[1] == "r--s" and line[5:] == [name]]
        if not spans:
            raise DataError(f"cannot find where {self.path} is mapped; use run.pages=keep")
        return [(int(start, 16), int(end, 16) - int(start, 16)) for start, end in spans]


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _payload(value: memoryview | None, check: bool) -> memoryview:
    """A stored value without its CRC; ValueError if it is missing or, if asked to check, does not match."""
    if value is None or len(value) < CRC_BYTES:
        raise ValueError("it is missing")
    payload = value[:-CRC_BYTES]
    if check and zlib.crc32(payload) != int.from_bytes(value[-CRC_BYTES:], "little"):
        raise ValueError("its checksum does not match")
    return payload


def _open_checked(path: Path) -> Any:
    """The read-only LMDB environment of a file that is whole; DataError says what is wrong with any other."""
    import lmdb

    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty: run saddle prepare again")
    try:
        env = lmdb.open(
            str(path), subdir=False, readonly=True, create=False, lock=False, readahead=False, meminit=False
        )
    except lmdb.Error as error:
        raise DataError(f"{path} is not a dataset of saddle prepare, or is damaged ({error})") from error
    # LMDB maps the length it expects: touching a page beyond the end of a shorter file kills the process (SIGBUS).
    needed, size = (env.info()["last_pgno"] + 1) * env.stat()["psize"], path.stat().st_size
    if size < needed:
        env.close()
        raise DataError(f"{path} is truncated, {size} bytes of {needed}: copy it again or run saddle prepare again")
    return env


# LMDB may open a file once per process, and a forked child may neither use nor re-open what its parent holds.
_readers: WeakValueDictionary[tuple[int, int], Reader] = WeakValueDictionary()
_readers_lock = threading.Lock()


def open_reader(path: Path) -> Reader:
    """The reader of a dataset file, shared by all its users in this process. DataError if it is no whole dataset."""
    if not path.exists():
        if part_path(path).exists():
            raise DataError(f"{path} is unfinished, only {part_path(path).name} exists: run the same prepare again")
        raise DataError(f"no dataset at {path}: make one with saddle prepare")
    if not path.is_file():
        raise DataError(f"{path} is not a file: give the file that saddle prepare made")
    status = path.stat()
    with _readers_lock:
        reader = _readers.get((status.st_dev, status.st_ino))
        if reader is None:
            reader = _readers[status.st_dev, status.st_ino] = Reader(path)
        return reader


def _close_inherited() -> None:
    """In a forked child: let go of the parent's environments, so that the files can be opened here."""
    global _readers_lock
    _readers_lock = threading.Lock()  # some other thread of the parent may have held it
    for reader in list(_readers.values()):
        reader.env.close()
    _readers.clear()


os.register_at_fork(after_in_child=_close_inherited)
