"""The dataset file: one LMDB holding every image at every growth level. `store_writer` makes it, this module reads it.

    b"LL/IIIIIIIIII"  one image: level LL (two digits), index (ten digits), so keys run by level, then index. Level l is
                      base * 2**l pixels large. The value is the encoded uint8 pixels [H, W, C] and their checksum.
    b"labels"         int32 [N] or float32 [N, d], little-endian, and its checksum. Absent if the images have no labels.
    b"manifest"       JSON of `Manifest` and its CRC, written last: a file without one is an unfinished build.

A CRC is `zlib.crc32` of what precedes it in the value, as 4 little-endian bytes. A checksum is that XOR the CRC of the
record's key; in files of version 2 it is the CRC alone. `encodings` has the ways to store pixels, and the content hash
over what they decode to.
"""

import ctypes
import json
import math
import mmap
import os
import re
import stat
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from multiprocessing import current_process
from pathlib import Path
from typing import Any, Self
from weakref import WeakValueDictionary, finalize

import numpy as np

from data.encodings import CRC_BYTES, ENCODINGS, MODE_OF_CHANNELS, without_crc
from data.errors import DataError
from data.names import composed, printable
from data.vectors import SUFFIX
from data.workers import in_child

VERSION = 3
READABLE = (2, 3)  # versions
LEAST_RECORD = 25  # bytes of a file that any record takes: LMDB's header, its key, and a checksum
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
        """The manifest of a stored JSON object; ValueError, KeyError or TypeError if it is none of ours.

        What a stranger wrote into it is safe afterwards: types and bounds are right, and all text can be printed.
        """
        try:
            fields = json.loads(text)
        except RecursionError as error:
            raise ValueError("it is nested too deeply") from error
        if not isinstance(fields, dict) or fields["version"] not in READABLE:
            raise ValueError(f"format {str(fields)[:40] if not isinstance(fields, dict) else fields['version']!r:.40}")
        for name, is_right in RULES.items():
            if not is_right(fields.get(name, {})):  # only color_changes may be missing, as in older files
                raise ValueError(f"{name} is {str(fields.get(name, 'missing'))[:40]!r}")
        for name in ("base", "levels", "classes", "skipped_positions"):
            fields[name] = None if fields[name] is None else tuple(fields[name])
        if fields["classes"] is not None:
            fields["classes"] = tuple(printable(composed(name)) for name in fields["classes"])
        for name in ("source", "transform", "lmdb"):
            fields[name] = printable(fields[name])
        for name in ("skipped", "color_changes"):
            fields[name] = {printable(what): count for what, count in fields.get(name, {}).items()}
        manifest = cls(**fields)
        places = manifest.skipped_positions
        if list(places) != sorted({*places}) or max(places, default=-1) >= manifest.count + len(places):
            raise ValueError(f"skipped_positions is {str(places)[:40]!r}")
        if max(manifest.resolution) > MAX_SIDE:
            raise ValueError(f"images of {manifest.resolution[0]}x{manifest.resolution[1]}")
        return manifest


def _is_count(value: Any, low: int = 0, high: int = 10**10) -> bool:
    return type(value) is int and low <= value < high


def _are_counts(value: Any, low: int = 0, high: int = 10**10) -> bool:
    return isinstance(value, list) and all(_is_count(one, low, high) for one in value)


def _is_text(value: Any) -> bool:
    return type(value) is str


def _are_counted(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_count, value.values()))


def _are_levels(value: Any) -> bool:
    """Ascending, without gaps."""
    return _are_counts(value, 0, 20) and bool(value) and value == list(range(value[0], value[0] + len(value)))


MAX_SIDE = 1 << 16  # pixels
RULES: dict[str, Callable[[Any], bool]] = {  # field of a stored manifest -> is it one that we write?
    "count": lambda value: _is_count(value, 1),
    "channels": lambda value: type(value) is int and value in MODE_OF_CHANNELS,
    "base": lambda value: _are_counts(value, 1, MAX_SIDE + 1) and len(value) == 2,
    "levels": _are_levels,
    "encoding": lambda value: _is_text(value) and value in ENCODINGS,
    "lossy": lambda value: type(value) is bool,
    "transform": _is_text,
    "classes": lambda value: value is None or (isinstance(value, list) and all(map(_is_text, value))),
    "label_dim": lambda value: value is None or _is_count(value, 1, 1 << 24),
    "content_hash": lambda value: _is_text(value) and re.fullmatch("[0-9a-f]{64}", value) is not None,
    "source": _is_text,
    "skipped": _are_counted,
    "skipped_positions": _are_counts,
    "lmdb": _is_text,
    "color_changes": _are_counted,
}


def expected_entries(manifest: Manifest) -> int:
    """How many keys a whole dataset has."""
    labeled = manifest.classes is not None or manifest.label_dim is not None
    return manifest.count * len(manifest.levels) + 1 + labeled


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
        self.status = path.stat()
        self.env = open_checked(path)
        finalize(self, self.env.close)
        try:
            self.manifest = self._manifest()
            self._check_size()
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

    def _check_size(self) -> None:
        """DataError if the file is too small for what the manifest promises: nobody must begin to count to that."""
        manifest = self.manifest
        encoding = ENCODINGS[manifest.encoding]
        pixels = sum(math.prod(manifest.size(level)) for level in manifest.levels) if encoding.plain else 0
        labels = manifest.count * (manifest.label_dim or int(manifest.classes is not None)) * 4
        least = manifest.count * (len(manifest.levels) * LEAST_RECORD + pixels * manifest.channels) + labels
        if least > (size := self.path.stat().st_size):
            raise DataError(
                f"the manifest of {self.path} promises {manifest.count} images, which take {least} bytes, and the file "
                f"has {size}: copy it again or run saddle prepare again"
            )

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
        keyed = self.manifest.version >= 3
        pixels = images.reshape(-1).data
        length = math.prod(shape)
        with self._transaction() as transaction:
            get = transaction.get
            for position, index in enumerate(indices.tolist()):
                try:
                    key = image_key(level, index)
                    payload = _payload(get(key), check, key if keyed else b"")
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
                payload = _payload(transaction.get(LABELS), True, LABELS if self.manifest.version >= 3 else b"")
                stored = np.frombuffer(payload, "<i4" if dim is None else "<f4")
            except ValueError as error:
                raise DataError(f"the labels in {self.path} are damaged: {error}") from None
            if len(stored) != count * (dim or 1):
                raise DataError(f"{self.path} has {len(stored) // (dim or 1)} labels for {count} images")
            return stored.astype(np.int64) if dim is None else stored.astype(np.float32).reshape(count, dim)

    def check_unchanged(self) -> None:
        """DataError if the file was written to since it was opened: what is read then is of no one dataset, and beyond
        the end of a file that became shorter a read ends the process. A new file of this name does not matter."""
        try:
            now = self.path.stat()
        except OSError:  # it was removed, and we keep it
            return
        same = (now.st_dev, now.st_ino) == (self.status.st_dev, self.status.st_ino)
        if same and (now.st_size, now.st_mtime_ns) != (self.status.st_size, self.status.st_mtime_ns):
            raise DataError(f"{self.path} was changed while in use: run saddle verify, then start again")

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
        if not os.path.exists(MAPS):
            raise DataError(f"the pages of {self.path} can be dropped on Linux only; use run.pages=keep")
        spans = _maps_of(self.path)
        if not spans:
            raise DataError(f"cannot find where {self.path} is mapped; use run.pages=keep")
        return spans


MAPS = "/proc/self/maps"  # of Linux


def _maps_of(path: Path) -> list[tuple[int, int]]:
    """(address, bytes) of the maps of a file in this process; none where the kernel does not tell."""
    try:
        maps = os.fsdecode(Path(MAPS).read_bytes())
    except OSError:
        return []
    lines = [line.split(maxsplit=5) for line in maps.split("\n")[:-1]]
    spans = [line[0].split("-") for line in lines if line[1] == "r--s" and line[5:] == [str(path.resolve())]]
    return [(int(start, 16), int(end, 16) - int(start, 16)) for start, end in spans]


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _payload(value: memoryview | None, check: bool, key: bytes) -> memoryview:
    """A stored value without its checksum; ValueError if it is missing or, if asked to check, does not match. key: what
    the checksum covers beside the value; nothing in files of version 2."""
    if value is None or len(value) < CRC_BYTES:
        raise ValueError("it is missing")
    payload = value[:-CRC_BYTES]
    if check and zlib.crc32(payload) ^ zlib.crc32(key) != int.from_bytes(value[-CRC_BYTES:], "little"):
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
        if path.suffix == SUFFIX:
            raise DataError(
                f"{path} holds vectors, and this command needs a dataset of images, made by saddle prepare"
            ) from error
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


_sound: set[tuple[int, ...]] = set()  # files through which this process, or its parent, has looked


def look_through(path: Path) -> None:
    """DataError if the inner pages of an LMDB are damaged: LMDB trusts them, and reading would end this process by a
    signal. Each record is found once, in a process of its own, and its value not read. A second look costs nothing.

    Nothing in a worker process, which can have no children: its parent has looked."""
    if current_process().daemon:
        return
    status = path.stat()
    file = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    if file not in _sound:
        in_child(lambda: _find_all(path), f"{path} is damaged in its inner pages: copy it again or build it anew")
        _sound.add(file)


def _find_all(path: Path) -> None:
    import lmdb

    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # LMDB prints where it dies, and our parent says it in words
    damaged = f"{path} is damaged in its inner pages"
    env = open_checked(path)
    maps = _maps_of(path)
    start = maps[0][0] if maps else 0
    end = start + path.stat().st_size if maps else sys.maxsize  # where the kernel does not tell
    try:
        with env.begin(buffers=True) as transaction:
            entries = transaction.stat()["entries"]
            found = 0
            for key, _ in transaction.cursor():
                value = np.frombuffer(transaction.get(key), np.uint8)
                address = value.ctypes.data
                found += 1
                if found > entries or (len(value) and not start <= address <= address + len(value) <= end):
                    raise DataError(f"{damaged}: copy it again or build it anew")
            if found != entries:
                raise DataError(f"{damaged}, {found} entries of {entries}: copy it again or build it anew")
    except (lmdb.Error, TypeError) as error:
        raise DataError(f"{damaged} ({error}): copy it again or build it anew") from None


def open_reader(path: Path, look: bool = True) -> Reader:
    """The reader of a dataset file, shared by all its users in this process. DataError if it is no whole dataset.

    look: at its inner pages, by `look_through`. Without, a damaged file may end this process by a signal.
    """
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
    if look and status.st_size:
        look_through(path)
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
