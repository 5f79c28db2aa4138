"""Sources that are lists of image files: which of the files are images, in what order, with which labels."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import IO, Any, NamedTuple

from data.errors import DataError
from data.image_files import SUFFIXES, claims_image, open_image
from data.items import Item, Source
from data.labels import Label, Labels, label_by_folder, labels_from_file
from data.names import hidden, printable
from data.streams import MAX_MEMBER

TOO_LARGE = f"unpacks to more than {MAX_MEMBER >> 20} MB"

ListedFile = tuple[str, Any]  # the name of a file, and what to open; a str is the reason why it is refused


class ListedImage(NamedTuple):
    """An item before it is opened."""

    name: str
    label: Label
    file: Any  # what a kind of source opens; a str is the reason why it is refused


def listed_source(
    name: str,
    rows: Sequence[ListedImage],
    labels: Labels,
    open_rows: Callable[[Sequence[ListedImage]], Iterator[Item]],
    ignored: int,
) -> Source:
    """The source of a list of rows, opened by `open_rows`."""

    def read(start: int = 0, stop: int | None = None) -> Iterator[Item]:
        return open_rows(rows[start:stop])

    return Source(name, len(rows), labels.classes, read, ignored, labels.dim)


def open_items(rows: Sequence[ListedImage], open_file: Callable[[Any], IO[bytes]]) -> Iterator[Item]:
    """Open one row after the other, each only as long as its item is in use."""
    for name, label, file in rows:
        if isinstance(file, str):
            yield Item(name, file, label)
            continue
        try:
            stream = open_file(file)
        except Exception as error:  # a damaged archive makes its decompressors raise nearly anything
            yield Item(name, f"cannot be opened: {error}", label)
            continue
        with stream:
            yield Item(name, open_image(stream), label)


def holds_only(path: Path, suffixes: tuple[str, ...]) -> bool:
    """Whether a folder has files with one of the suffixes in it, and neither images nor folders beside them."""
    found = False
    if path.is_dir():
        with os.scandir(path) as entries:
            for entry in entries:
                if not hidden(entry.name):
                    if claims_image(entry.name) or entry.is_dir():
                        return False
                    found = found or entry.name.endswith(suffixes)
    return found


def sorted_by_name(listed: Iterable[ListedFile]) -> list[ListedFile]:
    """Files in the order of their printable names."""
    return sorted(((printable(name), file) for name, file in listed), key=itemgetter(0))


def folder_labels(images: Sequence[ListedFile]) -> Labels:
    """Labels of files by the folders that they are in."""
    classes, labels = label_by_folder([name for name, _ in images])
    return Labels(labels, classes)


def catalog(
    where: object,
    listed: Sequence[ListedFile],
    labels_file: bytes | None,
    max_images: int | None,
    find_labels: Callable[[Sequence[ListedFile]], Labels] = folder_labels,
) -> tuple[list[ListedImage], Labels, int]:
    """(a row for each image among the `listed` files, their labels, how many other files there are).

    The content of a labels file, if there is one, is preferred to `find_labels(images)`.
    """
    images = [(name, file) for name, file in listed if isinstance(file, str) or claims_image(name)]
    ignored = len(listed) - len(images)
    if not images:
        looked = ", ".join(SUFFIXES)
        raise DataError(f"no images in {where}: looked for {looked} in it and below, and found {ignored} other files")
    readable = [image for image in images if not isinstance(image[1], str)]
    if labels_file is None:
        labels = find_labels(readable)
    else:
        refused = [name for name, file in images if isinstance(file, str)]
        labels = labels_from_file(where, labels_file, [name for name, _ in readable], refused)
    waiting = iter(labels.values)
    rows = [ListedImage(name, None if isinstance(file, str) else next(waiting), file) for name, file in images]
    return rows[:max_images], labels, ignored
