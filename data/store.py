"""The dataset file: one LMDB holding every image at every growth level, and the only code that knows its format.

    b"LL/IIIIIIIIII"  one image: level LL (two digits), index (ten digits), so keys run by level, then index. Level l is
                      base * 2**l pixels large. The value is the encoded uint8 pixels [H, W, C] and their CRC.
    b"labels"         int32[N], little-endian, and its CRC. Absent if there are no classes.
    b"manifest"       JSON of `Manifest` and its CRC, written last: a file without one is an unfinished build.

A CRC is `zlib.crc32` of what precedes it in the value, as 4 little-endian bytes. Encoding "raw" is pixels in C order.
The content hash is SHA-256 over the decoded pixels of the top level in index order, then the int32 labels: it does not
depend on the encoding. A file is built beside its destination as `.part` and renamed when everything is on disk.
"""

import ctypes
import fcntl
import hashlib
import json
import math
import mmap
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Self
from weakref import WeakValueDictionary, finalize

import numpy as np

from data.errors import DataError

VERSION = 1
BATCH_IMAGES = 1000  # a transaction holds at most so many images, and
BATCH_BYTES = 64 << 20  # about so many bytes: LMDB keeps what is not committed in memory
FIRST_MAP = 16 << 20
LABELS, MANIFEST = b"labels", b"manifest"
CRC_BYTES = 4


@dataclass(frozen=True)
class Encoding:
    """How the pixels of one image become bytes and come back."""

    encode: Callable[[np.ndarray], bytes]
    decode: Callable[[memoryview, tuple[int, int, int]], np.ndarray]  # may return a view of the bytes
    plain: bool = False  # the bytes are the pixels in C order, and a reader may copy them as they are


ENCODINGS = {
    "raw": Encoding(np.ndarray.tobytes, lambda payload, shape: np.frombuffer(payload, np.uint8).reshape(shape), True),
}


@dataclass(frozen=True)
class Manifest:
    """What a dataset holds."""

    count: int
    channels: int  # 1 grey, 3 RGB, 4 RGBA with straight alpha
    base: tuple[int, int]  # (height, width) of level 0
    levels: tuple[int, ...]  # the levels stored, ascending, without gaps
    encoding: str  # key of ENCODINGS
    classes: tuple[str, ...] | None  # class names by label; None if unlabeled
    content_hash: str
    source: str
    skipped: dict[str, int]  # why images of the source were left out -> how many
    lmdb: str  # version of the LMDB library that wrote the file
    version: int = VERSION

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
        for name in ("base", "levels", "classes"):
            fields[name] = None if fields[name] is None else tuple(fields[name])
        return cls(**fields)


def image_key(level: int, index: int) -> bytes:
    """The key of one image."""
    return b"%02d/%010d" % (level, index)


def estimated_bytes(count: int, channels: int, sizes: Sequence[tuple[int, int]]) -> int:
    """About how large a file of `count` raw images at all `sizes` will be, page waste included."""
    page = mmap.PAGESIZE
    payloads = [height * width * channels + 40 for height, width in sizes]  # key, CRC and LMDB's own headers
    # Above half a page LMDB gives a value pages of its own; smaller ones share pages that end up about 2/3 full.
    return count * sum(-(-size // page) * page if size > page // 2 else size * 3 // 2 for size in payloads)


def check_new(path: Path) -> None:
    """DataError if a dataset cannot be made at `path` because something is there."""
    if path.is_dir():
        raise DataError(f"{path} is a folder: name a file to write, such as {path / 'data.lmdb'}")
    if path.exists():
        raise DataError(f"{path} exists: remove it first, or choose another name")


def part_path(path: Path) -> Path:
    """Where the dataset that will be `path` is built."""
    return path.with_name(path.name + ".part")


class Writer:
    """Builds a dataset file: `add` images in index order, then `finish`. Leaving the `with` block early removes it."""

    def __init__(
        self, path: Path, *, channels: int, base: tuple[int, int], levels: Sequence[int], encoding: str = "raw"
    ) -> None:
        self.path, self.part = path, part_path(path)
        self.channels, self.base, self.levels, self.encoding = channels, base, tuple(levels), encoding
        self.count = 0
        self._published = False
        self._hash = hashlib.sha256()
        self._records: list[tuple[bytes, bytes]] = []
        self._waiting = 0  # bytes in _records
        self._made = [folder for folder in path.absolute().parents if not folder.exists()]  # innermost first
        with _explained(path):
            path.absolute().parent.mkdir(parents=True, exist_ok=True)
            self._file = _lock_part(self.part)
            try:
                check_new(path)  # once more: another build may have ended before we held the lock
                self._env = self._open()
            except BaseException:
                self._discard()
                raise

    def _open(self) -> Any:
        import lmdb

        # The flock on the part keeps other writers out, so LMDB needs no lock file; it is synced once, at the end.
        return lmdb.open(
            str(self.part), subdir=False, lock=False, map_size=FIRST_MAP, sync=False, metasync=False, readahead=False
        )

    def add(self, pyramid: Sequence[np.ndarray]) -> None:
        """Append one image: uint8 [H, W, C] for every level of `levels`, in that order."""
        for level, image in zip(self.levels, pyramid, strict=True):
            expected = (self.base[0] << level, self.base[1] << level, self.channels)
            assert image.shape == expected and image.dtype == np.uint8, (image.shape, image.dtype, expected)
            value = with_crc(ENCODINGS[self.encoding].encode(image))
            self._records.append((image_key(level, self.count), value))
            self._waiting += len(value)
        self._hash.update(np.ascontiguousarray(pyramid[-1]).data)
        self.count += 1
        if self.count % BATCH_IMAGES == 0 or self._waiting >= BATCH_BYTES:
            self._flush()

    def finish(
        self, *, source: str, labels: np.ndarray | None, classes: Sequence[str] | None, skipped: dict[str, int]
    ) -> Manifest:
        """Write labels (int [N]) and manifest, make everything durable, and put the file in its place."""
        import lmdb

        if labels is not None:
            stored = labels.astype("<i4").tobytes()
            self._hash.update(stored)
            self._records.append((LABELS, with_crc(stored)))
        self._flush()
        manifest = Manifest(
            count=self.count,
            channels=self.channels,
            base=self.base,
            levels=self.levels,
            encoding=self.encoding,
            classes=None if classes is None else tuple(classes),
            content_hash=self._hash.hexdigest(),
            source=source,
            skipped=skipped,
            lmdb=".".join(map(str, lmdb.version())),
        )
        self._records.append((MANIFEST, with_crc(manifest.to_json().encode())))
        self._flush()
        with _explained(self.path):
            self._publish()
        return manifest

    def _flush(self) -> None:
        """Commit the waiting records in key order, growing the map as often as it takes."""
        import lmdb

        self._records.sort()
        with _explained(self.path):
            while True:
                try:
                    with self._env.begin(write=True) as transaction:
                        transaction.cursor().putmulti(self._records)
                    break
                except lmdb.MapFullError:
                    self._env.set_mapsize(2 * self._env.info()["map_size"])
        self._records, self._waiting = [], 0

    def _publish(self) -> None:
        used = (self._env.info()["last_pgno"] + 1) * self._env.stat()["psize"]
        self._env.sync(True)
        self._env.close()
        os.ftruncate(self._file, used)
        os.fsync(self._file)
        os.replace(self.part, self.path)
        self._published = True
        folder = os.open(self.path.absolute().parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
        os.close(self._file)

    def _discard(self) -> None:
        os.unlink(self.part)
        os.close(self._file)
        for folder in self._made:
            with suppress(OSError):
                folder.rmdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self._env.close()
        if not self._published:
            self._discard()


def with_crc(payload: bytes) -> bytes:
    """A stored value: the payload and its checksum."""
    return payload + zlib.crc32(payload).to_bytes(CRC_BYTES, "little")


def without_crc(value: bytes) -> bytes:
    """The payload of a stored value. ValueError if it is not what its checksum says."""
    payload, crc = value[:-CRC_BYTES], value[-CRC_BYTES:]
    if zlib.crc32(payload).to_bytes(CRC_BYTES, "little") != crc:
        raise ValueError("its checksum differs")
    return payload


def _lock_part(part: Path) -> int:
    """An open, locked and empty `part`; what a killed build left there is dropped."""
    file = os.open(part, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The build that held the lock before us may just have renamed the file we opened.
        if not part.exists() or not os.path.samestat(os.fstat(file), part.stat()):
            raise BlockingIOError
    except BlockingIOError:
        os.close(file)
        raise DataError(f"{part} is being written by another process: wait for it, or choose another name") from None
    os.ftruncate(file, 0)
    return file


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what the disk and LMDB raise while writing into a DataError."""
    import lmdb

    try:
        yield
    except (lmdb.Error, OSError) as error:
        raise DataError(f"cannot write {path}: {error} (is the disk full, or the folder read-only?)") from error


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
        pixels, length = images.reshape(-1).data, math.prod(shape)
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
