"""Checking a dataset record by record."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data.errors import DataError
from data.prepare import Progress, silent
from data.store import Reader, open_reader


def verify(path: str | os.PathLike[str], progress: Progress = silent) -> list[str]:
    """Everything that is wrong with a dataset, one line each: bad records, labels, counts, content hash.

    DataError if the file cannot be opened as a dataset at all.
    """
    reader = open_reader(Path(path))
    digest = hashlib.sha256()
    problems = list(_bad_images(reader, digest, progress))
    problems += _bad_labels(reader, digest)
    manifest = reader.manifest
    expected = manifest.count * len(manifest.levels) + 1 + (manifest.classes is not None)
    if reader.entries() != expected:
        problems.append(f"{path} has {reader.entries()} entries, expected {expected}")
    if not problems and digest.hexdigest() != manifest.content_hash:
        problems.append(f"the content hash of {path} is {digest.hexdigest()}, expected {manifest.content_hash}")
    return problems


def _bad_images(reader: Reader, digest: "hashlib._Hash", progress: Progress) -> Iterator[str]:
    """Read every record, feed the top level to the digest, and name the bad ones."""
    levels, count = reader.manifest.levels, reader.manifest.count
    records = ((level, index) for level in levels for index in range(count))
    for level, index in progress(records, len(levels) * count, "verify"):
        try:
            image = reader.read(np.array([index]), level, check=True)
        except DataError as error:
            yield str(error)
        else:
            if level == levels[-1]:
                digest.update(image.data)


def _bad_labels(reader: Reader, digest: "hashlib._Hash") -> Iterator[str]:
    """Feed the labels to the digest and name what is wrong with them."""
    try:
        labels = reader.labels()
    except DataError as error:
        yield str(error)
        return
    if labels is None or reader.manifest.classes is None:
        return
    digest.update(labels.astype("<i4").tobytes())
    classes = len(reader.manifest.classes)
    for index in np.flatnonzero((labels < 0) | (labels >= classes)):
        yield f"label {labels[index]} of image {index} in {reader.path} is outside its {classes} classes"
