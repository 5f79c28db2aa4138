"""Folders and zip archives of image files; sub-folders, or StyleGAN's dataset.json, give the labels."""

import io
import os
import zipfile
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import IO

from data.errors import DataError
from data.image_files import claims_image
from data.items import Item, Source
from data.kinds import Turn, path_kind
from data.listing import (
    TOO_LARGE,
    ListedFile,
    ListedImage,
    is_labels_file,
    list_images,
    listed_source,
    open_items,
)
from data.names import hidden, tidy, unsafe
from data.streams import DAMAGE, MAX_MEMBER, ZIP_METHODS

UTF8_FLAG = 0x800
ZIP_DAMAGE = (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError, *DAMAGE)  # what reading a damaged zip raises


def open_folder(path: Path, max_images: int | None) -> Source:
    """The source of all images in a folder and below, in the order of their names."""
    files = sorted(_walk(path), key=attrgetter("name"))
    listing = list_images(path, files, max_images, _read_file)
    made_of = [one.file for one in files if claims_image(one.name) or is_labels_file(one.name)]
    made_of = [file for file in made_of if isinstance(file, Path)]
    return listed_source(path.resolve().name, listing, partial(open_items, open_file=_open_file), made_of)


def is_zip(path: Path) -> bool:
    """Whether a file is a zip."""
    return path.is_file() and zipfile.is_zipfile(path)


def open_zip(path: Path, max_images: int | None) -> Source:
    """The source of all images in a zip, in the order of their names."""
    try:
        archive = _Archive(path)
    except ZIP_DAMAGE as error:
        raise DataError(f"{path} is a damaged zip ({error}): copy it again") from error
    files = sorted(archive.files(), key=attrgetter("name"))
    listing = list_images(path, files, max_images, archive.read_labels_file)
    return listed_source(path.name, listing, archive.open_images)


class _Archive:
    """A zip, whose directory is read once, which takes seconds for a large one; each reading opens the file anew."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            self.directory = zipfile.ZipFile(file)

    def files(self) -> Iterator[ListedFile]:
        """Every file; an image that it would be unwise to read is refused."""
        for member in self.directory.infolist():
            found = _member_name(member)
            name = tidy(found)
            if not name.endswith("/") and not hidden(found):
                refusal = _refusal(member) if claims_image(name) else None
                yield ListedFile(name, refusal or member)

    @contextmanager
    def opened(self) -> Iterator[zipfile.ZipFile]:
        """The zip with a file of its own."""
        with self.path.open("rb") as file:
            archive = copy(self.directory)
            archive.fp = file
            yield archive

    def read_labels_file(self, member: zipfile.ZipInfo) -> bytes:
        """The content of a member. OSError if it is damaged, or would be unwise to read."""
        reason = _refusal(member)
        if reason:
            raise OSError(reason)
        try:
            with self.opened() as archive:
                return _unpack(archive, member).getvalue()
        except ZIP_DAMAGE as error:
            raise OSError(str(error)) from error

    def open_images(self, images: Sequence[ListedImage]) -> Iterator[Item]:
        """The items of some images."""
        with self.opened() as archive:
            yield from open_items(images, partial(_unpack, archive))


def _walk(root: Path) -> Iterator[ListedFile]:
    """(name below root, path) of every file, through links too; a folder reached a second time is refused."""
    seen: set[tuple[int, int]] = set()
    waiting = deque([("", root)])
    while waiting:
        prefix, folder = waiting.popleft()
        status = folder.stat()
        if (status.st_dev, status.st_ino) in seen:
            yield ListedFile(tidy(prefix), "link to a folder that is read under another name")
            continue
        seen.add((status.st_dev, status.st_ino))
        try:
            entries = sorted(os.listdir(folder))
        except OSError as error:
            yield ListedFile(tidy(prefix), f"folder cannot be listed: {error.strerror}")
            continue
        for entry in entries:
            name = f"{prefix}{entry}"
            path = folder / entry
            if hidden(entry):
                continue
            if not os.path.isdir(path):
                yield ListedFile(tidy(name), path)
            elif path.is_symlink():
                waiting.append((f"{name}/", path))  # after all real folders, so that those keep their names
            else:
                waiting.appendleft((f"{name}/", path))


def _member_name(member: zipfile.ZipInfo) -> str:
    """The name of a member; macOS writes UTF-8 without saying so, and Python then reads it as code page 437."""
    if member.flag_bits & UTF8_FLAG or member.filename.isascii():
        return member.filename
    try:
        return member.filename.encode("cp437").decode()
    except UnicodeError:
        return member.filename


def _refusal(member: zipfile.ZipInfo) -> str | None:
    if unsafe(member.filename):
        return "unsafe name in the archive"
    if member.flag_bits & 1:
        return "encrypted"
    if member.file_size > MAX_MEMBER:
        return TOO_LARGE
    if member.compress_type not in ZIP_METHODS:
        return "packed by another method than deflate"
    return None


def _unpack(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> io.BytesIO:
    """The content of a member, no more than the size it claims, whatever its packed bytes would unpack to."""
    with archive.open(member) as stream:
        return io.BytesIO(stream.read(member.file_size))


def _read_file(path: Path) -> bytes:
    with _open_file(path) as file:
        if path.stat().st_size > MAX_MEMBER:
            raise OSError(f"it has more than {MAX_MEMBER >> 20} MB")
        return file.read()


def _open_file(path: Path) -> IO[bytes]:
    if not path.is_file():
        raise OSError("broken link" if path.is_symlink() else "not a regular file")  # opening a pipe would hang
    return path.open("rb")


KINDS = (
    path_kind(
        "a folder of images",
        Path.is_dir,
        open_folder,
        details="sub-folders, or StyleGAN's dataset.json, give labels",
        turn=Turn.CONTAINER,
    ),
    path_kind("a zip of images", is_zip, open_zip, details="labeled as a folder", turn=Turn.CONTAINER),
)
