"""Checking a dataset record by record."""

import faulthandler
import hashlib
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from data.build_plan import Progress, silent
from data.encodings import ContentHash
from data.errors import DataError
from data.store import Manifest, Reader, open_reader

BATCH = 256  # images read at once


@dataclass
class Findings:
    """What a look at every record found."""

    bad: dict[tuple[int, int], str] = field(default_factory=dict)  # (level, index) -> what is wrong
    labels: list[str] = field(default_factory=list)  # what is wrong with the labels
    rest: list[str] = field(default_factory=list)  # what is wrong with the whole
    digests: dict[int, bytes] = field(default_factory=dict)  # SHA-256 of every good top-level image

    @property
    def problems(self) -> list[str]:
        """All of it, one line each."""
        return [*self.bad.values(), *self.labels, *self.rest]


def verify(path: str | os.PathLike[str], progress: Progress = silent) -> list[str]:
    """Everything that is wrong with a dataset, one line each: bad records, labels, counts, content hash.

    DataError if the file cannot be opened as a dataset at all, or if its inner pages are damaged.
    """
    return check_records(Path(path), progress).problems


def check_records(path: Path, progress: Progress) -> Findings:
    """Read every record, in a process of its own: LMDB trusts its inner pages, and damaged ones may kill the reader."""
    return _in_child(
        lambda: _check_records(open_reader(path), progress), f"{path} is damaged in its inner pages: build it anew"
    )


def _in_child(work: Callable[[], Any], if_killed: str) -> Any:
    """The result of `work`, done by a forked process; DataError with `if_killed` if that dies."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(work, there), daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads of numpy's; the child needs none of them
        process.start()
    there.close()
    try:
        result = here.recv()
    except EOFError:
        raise DataError(if_killed) from None
    finally:
        process.kill()
        process.join()
        here.close()
    if isinstance(result, BaseException):
        raise result
    return result


def _send_result(work: Callable[[], Any], there: Connection) -> None:
    faulthandler.disable()  # if this process dies, its parent says so in one line
    try:
        there.send(work())
    except Exception as error:
        there.send(error)


def _check_records(reader: Reader, progress: Progress) -> Findings:
    found = Findings()
    manifest = reader.manifest

    def records() -> Iterator[None]:
        for level in manifest.levels:
            for first in range(0, manifest.count, BATCH):
                indices = np.arange(first, min(first + BATCH, manifest.count))
                _check_images(reader, level, indices, found)
                yield from [None] * len(indices)

    for _ in progress(records(), manifest.count * len(manifest.levels), "verify"):
        pass
    found.labels += _bad_labels(reader)
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


def expected_entries(manifest: Manifest) -> int:
    """How many keys a whole dataset has."""
    labeled = manifest.classes is not None or manifest.label_dim is not None
    return manifest.count * len(manifest.levels) + 1 + labeled


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
