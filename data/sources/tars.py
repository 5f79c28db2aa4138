"""Tar archives, compressed or not: of folders of images, or webdataset shards. Nothing is ever extracted to disk.

Images keep the order in which they are packed, so that a compressed archive is read front to back. Labels are, in this
order: dataset.json, as in a folder; what lies beside an image under the same name up to the first dot
(`000.png` and `000.cls`, or `000.json` with a key "label"); sub-folders.
"""

import io
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from tarfile import TarInfo
from typing import IO, Any, NamedTuple

from data.errors import DataError
from data.image_files import claims_image
from data.items import Item, Source
from data.kinds import Turn, path_kind
from data.labels import LABELS_FILE, Labels, labels_from_json
from data.listing import (
    TOO_LARGE,
    ListedFile,
    ListedImage,
    folder_labels,
    holds_only,
    is_labels_file,
    list_images,
    listed_source,
    open_items,
)
from data.names import hidden, tidy, unsafe
from data.streams import DAMAGE, MAX_MEMBER, open_unpacked
from data.tar_members import is_tar, members, read_at

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
BRACES = re.compile(r"\{([0-9]{1,18})\.\.([0-9]{1,18})\}")
MAX_SHARDS = 100_000
MAX_SIDE_FILE = 1 << 20  # bytes of a .cls or .json file that lies beside an image


class Member(NamedTuple):
    """Where the bytes of a file are."""

    shard: Path
    offset: int  # in the uncompressed shard
    size: int


def open_tar(path: Path, max_images: int | None) -> Source:
    """The source of the images in one tar."""
    return _open_shards(path.name, [path], max_images)


def holds_shards(path: Path) -> bool:
    """Whether a folder is one of tars. One that was unpacked beside a tar is a folder of images."""
    return holds_only(path, SHARD_SUFFIXES)


def open_shard_folder(path: Path, max_images: int | None) -> Source:
    """The source of the images in all tars of a folder, in the order of the names of those."""
    shards = [
        shard
        for shard in sorted(path.iterdir())
        if shard.name.lower().endswith(SHARD_SUFFIXES) and not hidden(shard.name)
    ]
    return _open_shards(path.resolve().name, shards, max_images)


def is_shard_pattern(pattern: Path) -> bool:
    """Whether a name stands for a row of files."""
    return BRACES.search(str(pattern)) is not None


def open_shard_pattern(pattern: Path, max_images: int | None) -> Source:
    """The source of the images in all tars that a name such as shards-{000..003}.tar stands for."""
    shards = [Path(shard) for shard in islice(_expand(str(pattern)), MAX_SHARDS + 1)]
    if len(shards) > MAX_SHARDS:
        raise DataError(f"{pattern} stands for more than {MAX_SHARDS} files")
    for shard in shards:
        if not shard.is_file():
            raise DataError(f"{pattern} stands for {len(shards)} files, of which {shard} does not exist")
    return _open_shards(pattern.name, shards, max_images)


def _expand(pattern: str) -> Iterator[str]:
    match = BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    first, last = match.groups()
    if not int(first) <= int(last) < int(first) + MAX_SHARDS:
        raise DataError(f"{pattern}: {match[0]} must count up, and to at most {MAX_SHARDS} files")
    for number in range(int(first), int(last) + 1):
        yield from _expand(f"{pattern[: match.start()]}{number:0{len(first)}d}{pattern[match.end() :]}")


def _open_shards(name: str, shards: Sequence[Path], max_images: int | None) -> Source:
    files: list[ListedFile] = []
    side: dict[tuple[Path, str], Any] = {}  # (shard, name up to the first dot) -> label as JSON
    for shard in shards:
        for member, content in members(shard, _has_labels):
            if member.isdir() or hidden(member.name):
                continue
            path = tidy(member.name)
            if content is None or is_labels_file(path):
                place = Member(shard, member.offset_data, member.size)
                files.append(ListedFile(path, _refusal(path, member) or content or place))
            else:
                label = _side_label(path, content)
                if label is not None and (path.lower().endswith(".cls") or (shard, _key(path)) not in side):
                    side[shard, _key(path)] = label

    def find_labels(images: Sequence[ListedFile]) -> Labels:
        return _side_labels(name, images, side) or folder_labels(images)

    # A compressed shard can only be read forward: who goes on where the last reading ended must not begin again.
    idle: defaultdict[int, list[_Shards]] = defaultdict(list)  # by process

    def open_images(images: Sequence[ListedImage]) -> Iterator[Item]:
        ours = idle[os.getpid()]
        opened = ours.pop() if ours else _Shards()
        try:
            yield from open_items(images, opened.content)
        finally:
            ours.append(opened)

    listing = list_images(name, files, max_images, _read_labels_file, find_labels)
    return listed_source(name, listing, open_images, shards)


def _read_labels_file(file: bytes | Member | OSError) -> bytes:
    """The content of a labels file: read already if it is at the root or small. OSError if it is refused."""
    if isinstance(file, OSError):
        raise file
    return file if isinstance(file, bytes) else _Shards().content(file).getvalue()


def _has_labels(member: TarInfo) -> bool:
    path = tidy(member.name)
    limit = MAX_MEMBER if path == LABELS_FILE else MAX_SIDE_FILE
    return member.isreg() and path.lower().endswith((".cls", ".json")) and member.size <= limit


def _key(path: str) -> str:
    """What the files of one sample have in common: folder and name up to the first dot."""
    folder, _, name = path.rpartition("/")
    return f"{folder}/{name.split('.')[0]}"


def _side_label(path: str, content: bytes) -> Any:
    """The label in a file beside an image, as JSON has it; None if there is none."""
    if path.lower().endswith(".cls"):
        text = content.decode("ascii", "replace").strip()
        return int(text) if re.fullmatch("-?[0-9]{1,18}", text) else text
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return fields.get("label") if isinstance(fields, dict) else None


def _side_labels(where: str, images: Sequence[ListedFile], side: dict[tuple[Path, str], Any]) -> Labels | None:
    """The labels that lie beside images; None if none does."""
    keys = [(image.file.shard, _key(image.name)) for image in images]
    if not any(key in side for key in keys):
        return None
    for (shard, key), count in Counter(keys).most_common(1):
        if count > 1:
            raise DataError(
                f"{shard} has {count} images called {key.strip('/')}: which of them is labeled is not known"
            )
    return labels_from_json(where, [image.name for image in images], [side.get(key) for key in keys])


def _refusal(path: str, member: TarInfo) -> str | OSError | None:
    """Why a file is not read: a str for an image, an error for a labels file; None for what is read or ignored."""
    reason = _unreadable(member)
    if reason and claims_image(path):
        return reason
    return OSError(reason) if reason and is_labels_file(path) else None


def _unreadable(member: TarInfo) -> str | None:
    if unsafe(member.name):
        return "unsafe name in the archive"
    if member.issym() or member.islnk():
        return "link in the archive"
    if not member.isreg() or member.issparse():
        return "not a regular file"
    return TOO_LARGE if member.size > MAX_MEMBER else None


class _Shards:
    """Reads members, with one shard open at a time."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._file: IO[bytes] = io.BytesIO()

    def content(self, member: Member) -> io.BytesIO:
        """The bytes of a member."""
        if member.shard != self._path:
            self.close()
            self._file = open_unpacked(member.shard)
            self._path = member.shard
        try:
            return io.BytesIO(read_at(self._file, member.offset, member.size))
        except DAMAGE:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the shard."""
        self._file.close()
        self._path = None

    def __del__(self) -> None:
        self._file.close()


KINDS = (
    path_kind("a folder of tars", holds_shards, open_shard_folder, details="shards of webdataset"),
    path_kind(
        "a tar",
        is_tar,
        open_tar,
        details="labeled as a folder, or by webdataset's .cls or .json beside each image",
        turn=Turn.CONTAINER,
    ),
    path_kind("shards such as set-{000..003}.tar", is_shard_pattern, open_shard_pattern, turn=Turn.PATTERN),
)
