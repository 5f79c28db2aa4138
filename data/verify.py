"""Checking a dataset record by record."""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np

from data.build_plan import Progress, silent
from data.encodings import ContentHash
from data.errors import DataError
from data.store import Manifest, Reader, expected_entries, open_reader
from data.workers import in_child

T = TypeVar("T")
BATCH = 256  # images read at once
MOST_BAD = 10_000  # records, or labels: after so many the search ends


@dataclass
class Findings:
    """What a look at every record found."""

    bad: dict[tuple[int, int], str] = field(default_factory=dict)  # (level, index) -> what is wrong
    labels: list[str] = field(default_factory=list)  # what is wrong with the labels
    rest: list[str] = field(default_factory=list)  # what is wrong with the whole
    whole: bool = True  # were all records looked at?
    digests: dict[int, bytes] = field(default_factory=dict)  # SHA-256 of every good top-level image

    @property
    def problems(self) -> list[str]:
        """All of it, one line each."""
        return [*self.bad.values(), *self.labels, *self.rest]


def verify(path: str | os.PathLike[str], progress: Progress = silent) -> list[str]:
    """Everything that is wrong with a dataset, one line each: bad records, labels, counts, content hash.

    DataError if the file cannot be opened as a dataset at all, or if its inner pages are damaged.
    """
    return check_records(Path(path), progress, lambda found: found.problems)  # a digest of each image may be gigabytes


def check_records(path: Path, progress: Progress, result: Callable[[Findings], T]) -> T:
    """Read every record, in a process of its own: LMDB trusts its inner pages, and damaged ones may kill the reader.

    result: what of the findings comes back from there.
    """
    return in_child(
        lambda: result(_check_records(open_reader(path, look=False), progress)),
        f"{path} is damaged in its inner pages: build it anew",
    )


def _check_records(reader: Reader, progress: Progress) -> Findings:
    found = Findings()
    manifest = reader.manifest

    def records() -> Iterator[None]:
        for level in manifest.levels:
            for first in range(0, manifest.count, BATCH):
                indices = np.arange(first, min(first + BATCH, manifest.count))
                _check_images(reader, level, indices, found)
                if len(found.bad) >= MOST_BAD:
                    found.whole = False
                    found.rest.append(f"{reader.path} has more bad records: the search ended after {len(found.bad)}")
                    return
                yield from [None] * len(indices)

    for _ in progress(records(), manifest.count * len(manifest.levels), "verify"):
        pass
    found.labels += islice(_bad_labels(reader), MOST_BAD)
    if reader.entries() != (expected := expected_entries(manifest)):
        found.rest.append(f"{reader.path} has {reader.entries()} entries, expected {expected}")
    if not found.problems:
        content = content_hash(manifest, found.digests, reader.labels())
        if content != manifest.content_hash:
            found.rest.append(f"the content hash of {reader.path} is {content}, expected {manifest.content_hash}")
    return found


def _check_images(reader: Reader, level: int, indices: np.ndarray, found: Findings) -> None:
    """Read images of a level; where that fails, one by one."""
    try:
        images = reader.read(indices, level, check=True)
    except DataError as error:
        if error.__cause__:  # LMDB's word that more than a record is damaged
            raise
        if len(indices) == 1:
            found.bad[level, int(indices[0])] = str(error)
        else:
            for index in indices:
                _check_images(reader, level, np.array([index]), found)
        return
    if level == reader.manifest.levels[-1]:
        for index, image in zip(indices.tolist(), images, strict=True):
            found.digests[index] = hashlib.sha256(image.data).digest()


def stored_labels(labels: np.ndarray | None) -> bytes:
    """Labels [N] or [N, d] as they are stored; nothing if there are none."""
    return b"" if labels is None else labels.astype("<f4" if labels.ndim == 2 else "<i4").tobytes()


def content_hash(manifest: Manifest, digests: dict[int, bytes], labels: np.ndarray | None) -> str:
    """The content hash of images with these digests by index, and of labels [N] or [N, d]."""
    content = ContentHash()
    for index in range(manifest.count):
        content.add(digests[index])
    return content.finish(stored_labels(labels))


def _bad_labels(reader: Reader) -> Iterator[str]:
    """What is wrong with the labels."""
    try:
        labels = reader.labels()
    except DataError as error:
        yield str(error)
        return
    if labels is None:
        return
    if labels.ndim == 2:
        for index in np.flatnonzero(~np.isfinite(labels).all(1)):
            yield f"the label of image {index} in {reader.path} is not finite"
        return
    classes = len(reader.manifest.classes or ())
    for index in np.flatnonzero((labels < 0) | (labels >= classes)):
        yield f"label {labels[index]} of image {index} in {reader.path} is outside its {classes} classes"
