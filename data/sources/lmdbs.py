"""LMDBs as sources: those of saddle prepare, and those of others with encoded images under b"{size}-{index:05d}"."""

import io
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import DataError
from data.image_files import open_image
from data.items import Item, Source
from data.kinds import path_kind
from data.labels import labels_from_array, no_labels
from data.store import MANIFEST, look_through, open_checked, open_reader

BATCH_IMAGES = 64
BATCH_BYTES = 16 << 20  # what is read at once
MAGIC = 0xBEEFC0DE.to_bytes(4, "little"), 0xBEEFC0DE.to_bytes(4, "big")

_opening = threading.Lock()  # LMDB may open a file once in a process


def _file(path: Path) -> Path:
    return path / "data.mdb" if path.is_dir() else path


def is_lmdb(path: Path) -> bool:
    """Whether a file starts like an LMDB, or is called data.mdb, or a folder holds one of that name."""
    file = _file(path)
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        return opened.read(20)[16:] in MAGIC or file.name == "data.mdb"


def open_lmdb(path: Path, max_images: int | None) -> Source:
    """The source of the largest images in an LMDB. DataError if it is truncated or has keys of another kind."""
    file = _file(path)
    name = path.resolve().name
    look_through(file)
    try:
        open_reader(file)
    except DataError as error:  # no dataset of ours
        with _opening, closing(open_checked(file)) as environment:
            found = _foreign_size(file, environment, error)
        return _foreign(name, file, *found, max_images)
    return _ours(name, file, max_images)


def _ours(name: str, path: Path, max_images: int | None) -> Source:
    reader = open_reader(path)
    manifest = reader.manifest
    stored = reader.labels()
    count = min(manifest.count, max_images or manifest.count)
    labels = (
        no_labels(manifest.count)
        if stored is None
        else labels_from_array(path, stored, manifest.count, manifest.classes)
    )

    def read(start: int = 0, stop: int | None = None) -> Iterator[Item]:
        reader = open_reader(path)  # a forked child needs one of its own
        for index in range(*slice(start, stop).indices(count)):
            try:
                image: Any = reader.read(np.array([index]), manifest.levels[-1], check=True)[0]
            except DataError as error:
                image = f"damaged: {error}"
            else:
                image = image[..., 0] if manifest.channels == 1 else image
            yield Item(f"image {index}", image, labels.values[index])

    return Source(name, count, labels.classes, read, label_dim=labels.dim, files=[path])


def _foreign_size(path: Path, environment: Any, not_ours: DataError) -> tuple[int, int]:
    """(the largest size, how many images have it) of an LMDB of others."""
    import lmdb

    try:
        with environment.begin() as transaction:
            length = transaction.get(b"length")
            if length is None:
                raise _unknown(path, transaction, not_ours)
            size = max(_sizes(transaction.cursor()), default=None)
            if not re.fullmatch(rb"[0-9]{1,12}", length) or size is None:
                raise DataError(
                    f"{path} has no images under keys such as 256-00000, or its length is no number: {length!r}"
                )
            count = int(length)
            if not count or count > environment.stat()["entries"] or transaction.get(_key(size, count)) is not None:
                raise DataError(f"{path} says that it has {count} images, which it has not: convert it again")
    except lmdb.Error as error:
        raise DataError(f"{path} is damaged ({error}): copy it again") from error
    return size, count


def _unknown(path: Path, transaction: Any, not_ours: DataError) -> DataError:
    cursor = transaction.cursor()
    if transaction.get(MANIFEST) is not None or (cursor.first() and re.fullmatch(rb"[0-9]{2}/[0-9]{10}", cursor.key())):
        return not_ours
    return DataError(f"{path} has neither the keys of saddle prepare, nor length and such as 256-00000")


def _key(size: int, index: int) -> bytes:
    return b"%d-%05d" % (size, index)


def _sizes(cursor: Any) -> Iterator[int]:
    """All sizes in the keys, without reading all keys."""
    start = b"0"
    while cursor.set_range(start):
        match = re.fullmatch(rb"([0-9]{1,6})-[0-9]+", cursor.key())
        if match:
            yield int(match[1])
        # After "256-..." comes "256.": no key with this size is beyond it.
        start = match[1] + b"." if match else cursor.key() + b"\0"


def _foreign(name: str, path: Path, size: int, length: int, max_images: int | None) -> Source:
    count = min(length, max_images or length)

    def read(start: int = 0, stop: int | None = None) -> Iterator[Item]:
        start, stop, _ = slice(start, stop).indices(count)
        while start < stop:
            values = _values(path, [_key(size, index) for index in range(start, min(start + BATCH_IMAGES, stop))])
            for index, value in enumerate(values, start):
                image = "missing record" if value is None else open_image(io.BytesIO(value))
                yield Item(_key(size, index).decode(), image, None)
            start += len(values)

    return Source(name, count, None, read, files=[path])


def _values(path: Path, keys: Sequence[bytes]) -> list[bytes | None]:
    """Copies of the values of the first keys, at least one. The file is open for no longer than that takes.

    So one process may read it twice at the same time, and its forked children as well.
    """
    import lmdb

    values: list[bytes | None] = []
    try:
        with _opening, closing(open_checked(path)) as environment, environment.begin() as transaction:
            for key in keys:
                values.append(transaction.get(key))
                if sum(len(value or b"") for value in values) >= BATCH_BYTES:
                    break
    except lmdb.Error as error:
        raise DataError(f"{path} is damaged ({error}): copy it again") from error
    return values


KINDS = (path_kind("an LMDB", is_lmdb, open_lmdb, details="of saddle prepare, or with keys SIZE-INDEX"),)
