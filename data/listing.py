"""Sources that are lists of image files: which of the files are images, in what order, with which labels."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from data.errors import DataError
from data.image_files import claims_image, open_image
from data.items import Item, Source, show_counts
from data.labels import LABELS_FILE, Label, Labels, label_by_folder, labels_from_file
from data.names import hidden
from data.streams import DAMAGE, MAX_MEMBER

TOO_LARGE = f"unpacks to more than {MAX_MEMBER >> 20} MB"


class ListedFile(NamedTuple):
    """A file of a source."""

    name: str  # below the source, tidy
    file: Any  # what a kind of source opens; a str is the reason why it is refused


class ListedImage(NamedTuple):
    """An item before it is opened."""

    name: str
    file: Any  # as in ListedFile
    label: Label


class Listing(NamedTuple):
    """The images among the files of a source."""

    images: Sequence[ListedImage]
    labels: Labels
    ignored: Mapping[str, int]  # suffix of files that are no images -> how many
    notes: tuple[str, ...]  # what the user should know


def holds_only(path: Path, suffixes: tuple[str, ...]) -> bool:
    """Whether a folder has files with one of the suffixes in it, and neither images nor folders beside them."""
    found = False
    if path.is_dir():
        with os.scandir(path) as entries:
            for entry in entries:
                if not hidden(entry.name):
                    if claims_image(entry.name) or entry.is_dir():
                        return False
                    found = found or entry.name.lower().endswith(suffixes)
    return found


def folder_labels(images: Sequence[ListedFile]) -> Labels:
    """Labels of files by the folders that they are in."""
    return label_by_folder([image.name for image in images])


def is_labels_file(name: str) -> bool:
    """Whether a file, in whatever folder, is called LABELS_FILE."""
    return name.rpartition("/")[2] == LABELS_FILE


def list_images(
    where: object,
    files: Sequence[ListedFile],
    max_images: int | None,
    read_file: Callable[[Any], bytes],
    find_labels: Callable[[Sequence[ListedFile]], Labels] = folder_labels,
) -> Listing:
    """The images among `files`, only the first `max_images` if given, and their labels.

    A LABELS_FILE, read by `read_file`, is preferred to `find_labels(images)`. DataError if there is no image, or the
    labels do not fit them.
    """
    images: list[ListedFile] = []
    others: list[ListedFile] = []
    for file in files:
        is_image = isinstance(file.file, str) or claims_image(file.name)
        (images if is_image else others).append(file)
    readable = [image for image in images if not isinstance(image.file, str)]
    labels_files = [file for file in others if is_labels_file(file.name)]
    chosen = _choose_labels_file(labels_files, readable)
    ignored = Counter(_suffix(file.name) for file in others if file is not chosen)
    if not images:
        found = show_counts(ignored) or "no files"
        raise DataError(f"no images in {where} or below: found {found}, none with a suffix of images such as .png")
    labels = _read_labels(where, chosen, images, read_file) if chosen else find_labels(readable)
    waiting = iter(labels.values)
    listed = [ListedImage(name, file, None if isinstance(file, str) else next(waiting)) for name, file in images]
    notes = [labels.note] if labels.note else []
    if labels_files and chosen is None:
        notes.append(f"{labels_files[0].name} is not used, because there are images outside of its folder")
    return Listing(listed[:max_images], labels, ignored, tuple(notes))


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "without suffix"


def _choose_labels_file(labels_files: Sequence[ListedFile], images: Sequence[ListedFile]) -> ListedFile | None:
    """The outermost labels file in a folder that holds all images; None if there is none."""
    for file in sorted(labels_files, key=lambda file: len(file.name)):
        folder = file.name.removesuffix(LABELS_FILE)
        if all(image.name.startswith(folder) for image in images):
            return file
    return None


def _read_labels(
    where: object, labels_file: ListedFile, images: Sequence[ListedFile], read_file: Callable[[Any], bytes]
) -> Labels:
    """The labels that a labels file gives the readable images; its names begin where it lies."""
    folder = labels_file.name.removesuffix(LABELS_FILE)
    where = f"{labels_file.name} in {where}"
    try:
        content = read_file(labels_file.file)
    except DAMAGE as error:
        raise DataError(f"{where} cannot be read: {error}") from error
    readable = [image.name.removeprefix(folder) for image in images if not isinstance(image.file, str)]
    refused = [image.name.removeprefix(folder) for image in images if isinstance(image.file, str)]
    return labels_from_file(where, content, readable, refused)


def listed_source(
    name: str,
    listing: Listing,
    open_images: Callable[[Sequence[ListedImage]], Iterator[Item]],
    files: Sequence[Path] = (),
) -> Source:
    """The source of the images of a listing, opened by `open_images` from `files`."""

    def read(start: int = 0, stop: int | None = None) -> Iterator[Item]:
        return open_images(listing.images[start:stop])

    return Source(
        name,
        len(listing.images),
        listing.labels.classes,
        read,
        ignored=listing.ignored,
        label_dim=listing.labels.dim,
        notes=listing.notes,
        files=files,
    )


def open_items(images: Sequence[ListedImage], open_file: Callable[[Any], IO[bytes]]) -> Iterator[Item]:
    """Open one image after the other, each only as long as its item is in use."""
    for name, file, label in images:
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
