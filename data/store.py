"""The dataset file: one LMDB holding every image at every growth level. `writer` makes it, this module reads it.

    b"LL/IIIIIIIIII"  one image: level LL (two digits), index (ten digits), so keys run by level, then index. Level l is
                      base * 2**l pixels large. The value is the encoded uint8 pixels [H, W, C] and their CRC.
    b"labels"         int32 [N] or float32 [N, d], little-endian, and its CRC. Absent if the images have no labels.
    b"manifest"       JSON of `Manifest` and its CRC, written last: a file without one is an unfinished build.

A CRC is `zlib.crc32` of what precedes it in the value, as 4 little-endian bytes. `encodings` has the ways to store
pixels, and the content hash over what they decode to.
"""

import ctypes
import json
import math
import mmap
import os
import stat
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Self
from weakref import WeakValueDictionary, finalize

import numpy as np

from data.encodings import CRC_BYTES, ENCODINGS, without_crc
from data.errors import DataError
from data.names import composed

VERSION = 2
LABELS = b"labels"
MANIFEST = b"manifest"


@dataclass(frozen=True)
class Manifest:
    """What a dataset holds."""

    count: int
    channels: int  # 1 grey, 3 RGB, 4 RGBA with straight alpha
    base: tuple[int, int]  # (height, width) of level 0
    levels: tuple[int, ...]  # the levels stored, ascending, without gaps
    encoding: str  # key of ENCODINGS
    lossy: bool  # the images are not quite what the source's pixels gave
    transform: str  # key of TRANSFORMS: how the images were made to fit
    classes: tuple[str, ...] | None  # class names by label; None if no label is a class
    label_dim: int | None  # length of float-vector labels; None if no label is one
    content_hash: str
    source: str
    skipped: dict[str, int]  # why images of the source were left out -> how many
    skipped_positions: tuple[int, ...]  # which they were, so that the others can be found again
    lmdb: str  # version of the LMDB library that wrote the file
    version: int = VERSION
    color_changes: dict[str, int] = field(default_factory=dict)  # what was done to colors -> of how many images

    def size(self, level: int) -> tuple[int, int]:
        """(height, width) of the images of a level."""
        return self.base[0] << level, self.base[1] << level

    @property
    def resolution(self) -> tuple[int, int]:
        """(height, width) of the largest level."""
        return self.size(self.levels[-1])

    def to_json(self) -> str:
        """The manifest as the JSON object that is stored."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """The manifest of a stored JSON object; ValueError, KeyError or TypeError if it is none of ours."""
        fields = json.loads(text)
        if fields["version"] != VERSION or fields["encoding"] not in ENCODINGS:
            raise ValueError(f"format {fields['version']}, encoding {fields['encoding']!r}")
        for name in ("base", "levels", "classes", "skipped_positions"):
            fields[name] = None if fields[name] is None else tuple(fields[name])
        if fields["classes"] is not None:
            fields["classes"] = tuple(map(composed, fields["classes"]))  # which earlier versions did not see to
        return cls(**fields)


def image_key(level: int, index: int) -> bytes:
    """The key of one image."""
    return b"%02d/%010d" % (level, index)


def part_path(path: Path) -> Path:
    """Where the dataset that will be `path` is built."""
    return path.with_name(path.name + ".part")


class Reader:
    """A dataset file open in this process. Get one from `open_reader`; it closes when nobody holds it any longer."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.env = open_checked(path)
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
            with _transactions.one(), self.env.begin(buffers=True) as transaction:
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
        pixels = images.reshape(-1).data
        length = math.prod(shape)
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
        """int64 [N], float32 [N, d], or None if the dataset has neither. DataError if they are damaged."""
        count = self.manifest.count
        dim = self.manifest.label_dim
        if self.manifest.classes is None and dim is None:
            return None
        with self._transaction() as transaction:
            try:
                stored = np.frombuffer(_payload(transaction.get(LABELS), check=True), "<i4" if dim is None else "<f4")
            except ValueError as error:
                raise DataError(f"the labels in {self.path} are damaged: {error}") from None
            if len(stored) != count * (dim or 1):
                raise DataError(f"{self.path} has {len(stored) // (dim or 1)} labels for {count} images")
            return stored.astype(np.int64) if dim is None else stored.astype(np.float32).reshape(count, dim)

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
            maps = os.fsdecode(Path("/proc/self/maps").read_bytes())
        except OSError as error:
            raise DataError(f"the pages of {self.path} can be dropped on Linux only; use run.pages=keep") from error
        lines = [line.split(maxsplit=5) for line in maps.split("\n")[:-1]]
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


def open_checked(path: Path) -> Any:
    """The read-only LMDB environment of a file of the right length; DataError says what is wrong with any other."""
    import lmdb

    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty: run saddle prepare again")
    try:
        env = lmdb.open(
            os.fsencode(path), subdir=False, readonly=True, create=False, lock=False, readahead=False, meminit=False
        )
    except lmdb.Error as error:
        raise DataError(f"{path} is not a dataset of saddle prepare, or is damaged ({error})") from error
    # LMDB maps the length it expects: touching a page beyond the end of a shorter file kills the process (SIGBUS).
    needed = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
    size = path.stat().st_size
    if size < needed:
        env.close()
        raise DataError(f"{path} is truncated, {size} bytes of {needed}: copy it again or run saddle prepare again")
    return env


class Transactions:
    """Counts those that are open, so that a fork can wait for them: a child in which another thread's transaction was
    open for ever could not close the environment, which LMDB guards by a lock that nobody there would release."""

    def __init__(self) -> None:
        self.open = 0
        self.changed = threading.Condition()

    @contextmanager
    def one(self) -> Iterator[None]:
        """A transaction is open inside."""
        with self.changed:
            self.open += 1
        try:
            yield
        finally:
            with self.changed:
                self.open -= 1
                self.changed.notify_all()

    def stop(self) -> None:
        """Wait until none is open, and let none begin before `go_on`. A thread that forks inside a transaction of its
        own would wait for itself, so after FORK_SECONDS the fork goes ahead."""
        self.changed.acquire()
        self.changed.wait_for(lambda: self.open == 0, FORK_SECONDS)

    def go_on(self) -> None:
        """The opposite of `stop`."""
        self.changed.release()


FORK_SECONDS = 10.0
_transactions = Transactions()
# LMDB may open a file once per process, and a forked child may neither use nor re-open what its parent holds.
_readers: WeakValueDictionary[tuple[int, int], Reader] = WeakValueDictionary()
_readers_lock = threading.Lock()


def open_reader(path: Path) -> Reader:
    """The reader of a dataset file, shared by all its users in this process. DataError if it is no whole dataset."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        if os.path.exists(part_path(path)):
            raise DataError(
                f"{path} is unfinished, only {part_path(path).name} exists: run the same prepare again"
            ) from None
        raise DataError(f"no dataset at {path}: make one with saddle prepare") from None
    except OSError as error:
        raise DataError(f"{path} cannot be opened: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path} is not a file: give the file that saddle prepare made")
    with _readers_lock:
        reader = _readers.get((status.st_dev, status.st_ino))
        if reader is None:
            reader = _readers[status.st_dev, status.st_ino] = Reader(path)
        return reader


def _before_fork() -> None:
    """Let no other thread be in the middle of anything that the child could not finish."""
    _readers_lock.acquire()
    _transactions.stop()


def _in_parent() -> None:
    _transactions.go_on()
    _readers_lock.release()


def _in_child() -> None:
    """Let go of the parent's environments, so that the files can be opened here."""
    global _readers_lock, _transactions
    _readers_lock = threading.Lock()
    _transactions = Transactions()
    for reader in list(_readers.values()):
        reader.env.close()
    _readers.clear()


os.register_at_fork(before=_before_fork, after_in_parent=_in_parent, after_in_child=_in_child)
