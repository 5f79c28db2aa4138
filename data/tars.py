"""Tar archives, compressed or not: of folders of images, or webdataset shards. Nothing is ever extracted to disk.

Images keep the order in which they are packed, so that a compressed archive is read front to back. Labels are, in this
order: dataset.json at the root, as in a folder; what lies beside an image under the same name up to the first dot
(`000.png` and `000.cls`, or `000.json` with a key "label"); sub-folders.
"""

import io
import json
import os
import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

from data.errors import DataError
from data.folders import TOO_LARGE, Listed, catalog, folder_labels
from data.items import (
    MAX_MEMBER,
    Item,
    Row,
    Source,
    claims_image,
    hidden,
    holds_only,
    open_items,
    printable,
    rows_source,
    unsafe,
)
from data.labels import LABELS_FILE, Labels, labels_from_json
from data.streams import DAMAGE, Bounded, head, open_unpacked

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
MAX_SHARDS = 100_000
MAX_SIDE_FILE = 1 << 20  # bytes of a .cls or .json file that lies beside an image


class Member(NamedTuple):
    """Where the bytes of a file are."""

    shard: Path
    offset: int  # in the uncompressed shard
    size: int


def is_tar(path: Path) -> bool:
    """Whether a file is a tar with something in it, compressed or not."""
    try:
        tarfile.TarInfo.frombuf(head(path, tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
    except tarfile.TarError:
        return False
    return True


def members(path: Path, wanted: Callable[[tarfile.TarInfo], bool]) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
    """Every member of a tar, with its content if it is wanted. DataError if the tar is damaged."""
    try:
        with open_unpacked(path) as file:
            bounded = Bounded(file, MAX_MEMBER)
            with tarfile.open(fileobj=bounded, mode="r:") as tar:  # type: ignore[call-overload]
                while (member := tar.next()) is not None:
                    if member.size < 0:
                        raise tarfile.ReadError("negative size")
                    yield member, _content(bounded, member.offset_data, member.size) if wanted(member) else None
                    tar.members.clear()  # else it keeps them all
            # tarfile takes whatever is no header for the end.
            if len(bounded.last) < tarfile.BLOCKSIZE or any(bounded.last):
                raise tarfile.ReadError("bad header" if bounded.last else "no end mark")
            while file.read(1 << 20):
                pass  # the checksum of a compressed file comes last
    except (tarfile.TarError, ValueError, *DAMAGE) as error:
        raise DataError(f"{path} is a damaged or truncated tar ({error}): copy it again") from error


def _content(file: IO[bytes] | Bounded, offset: int, size: int) -> bytes:
    file.seek(offset)
    content = file.read(size)
    if len(content) < size:
        raise EOFError("it ends early")
    return content


def open_tar(path: Path, max_images: int | None) -> Source:
    """The source of the images in one tar."""
    return _open_shards(path.name, [path], max_images)


def holds_shards(path: Path) -> bool:
    """Whether a folder is one of tars. One that was unpacked beside a tar is a folder of images."""
    return holds_only(path, SHARD_SUFFIXES)


def open_shard_folder(path: Path, max_images: int | None) -> Source:
    """The source of the images in all tars of a folder, in the order of the names of those."""
    shards = [
        shard for shard in sorted(path.iterdir()) if shard.name.endswith(SHARD_SUFFIXES) and not hidden(shard.name)
    ]
    return _open_shards(path.resolve().name, shards, max_images)


BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


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
    for number in range(int(first), int(last) + 1):
        yield from _expand(f"{pattern[: match.start()]}{number:0{len(first)}d}{pattern[match.end() :]}")


def _open_shards(name: str, shards: Sequence[Path], max_images: int | None) -> Source:
    listed: list[Listed] = []
    side: dict[tuple[Path, str], Any] = {}  # (shard, name up to the first dot) -> label as JSON
    labels_file = None
    for shard in shards:
        for member, content in members(shard, _has_labels):
            path = member.name.removeprefix("./")
            if member.isdir() or hidden(path):
                continue
            if content is None:
                refusal = _refusal(member) if claims_image(path) else None
                listed.append((printable(path), refusal or Member(shard, member.offset_data, member.size)))
            elif path == LABELS_FILE:
                labels_file = content
            else:
                label = _side_label(path, content)
                if label is not None and (path.endswith(".cls") or (shard, _key(path)) not in side):
                    side[shard, _key(path)] = label

    def find_labels(images: Sequence[Listed]) -> Labels:
        return _side_labels(name, images, side) or folder_labels(images)

    # A compressed shard can only be read forward: who goes on where the last reading ended must not begin again.
    idle: defaultdict[int, list[_Shards]] = defaultdict(list)  # by process

    def open_rows(rows: Sequence[Row]) -> Iterator[Item]:
        ours = idle[os.getpid()]
        opened = ours.pop() if ours else _Shards()
        try:
            yield from open_items(rows, opened.content)
        finally:
            ours.append(opened)

    rows, labels, ignored = catalog(name, listed, labels_file, max_images, find_labels)
    return rows_source(name, rows, labels, open_rows, ignored)


def _has_labels(member: tarfile.TarInfo) -> bool:
    path = member.name.removeprefix("./")
    limit = MAX_MEMBER if path == LABELS_FILE else MAX_SIDE_FILE
    return member.isreg() and path.endswith((".cls", ".json")) and member.size <= limit


def _key(path: str) -> str:
    """What the files of one sample have in common: folder and name up to the first dot."""
    folder, _, name = printable(path).rpartition("/")
    return f"{folder}/{name.split('.')[0]}"


def _side_label(path: str, content: bytes) -> Any:
    """The label in a file beside an image, as JSON has it; None if there is none."""
    if path.endswith(".cls"):
        text = content.decode("ascii", "replace").strip()
        return int(text) if re.fullmatch("-?[0-9]{1,18}", text) else text
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return fields.get("label") if isinstance(fields, dict) else None


def _side_labels(where: str, images: Sequence[Listed], side: dict[tuple[Path, str], Any]) -> Labels | None:
    """The labels that lie beside images; None if none does."""
    keys = [(member.shard, _key(name)) for name, member in images]
    if not any(key in side for key in keys):
        return None
    for (shard, key), count in Counter(keys).most_common(1):
        if count > 1:
            raise DataError(
                f"{shard} has {count} images called {key.strip('/')}: which of them is labeled is not known"
            )
    return labels_from_json(where, [name for name, _ in images], [side.get(key) for key in keys])


def _refusal(member: tarfile.TarInfo) -> str | None:
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
            self._file, self._path = open_unpacked(member.shard), member.shard
        try:
            return io.BytesIO(_content(self._file, member.offset, member.size))
        except DAMAGE:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the shard."""
        self._file.close()
        self._path = None

    def __del__(self) -> None:
        self._file.close()
