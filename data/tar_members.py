"""The members of a tar, compressed or not, read front to back within bounds."""

import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from data.errors import DataError
from data.streams import DAMAGE, MAX_MEMBER, Bounded, head, open_unpacked


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
                    yield member, read_at(bounded, member.offset_data, member.size) if wanted(member) else None
                    tar.members.clear()  # else it keeps them all
            # tarfile takes whatever is no header for the end.
            if len(bounded.last) < tarfile.BLOCKSIZE or any(bounded.last):
                raise tarfile.ReadError("bad header" if bounded.last else "no end mark")
            while file.read(1 << 20):
                pass  # the checksum of a compressed file comes last
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, *DAMAGE) as error:
        raise DataError(f"{path} is a damaged or truncated tar ({error}): copy it again") from error


def read_at(file: IO[bytes] | Bounded, offset: int, size: int) -> bytes:
    """`size` bytes of a file from `offset` on. EOFError if there are fewer."""
    file.seek(offset)
    content = file.read(size)
    if len(content) < size:
        raise EOFError("it ends early")
    return content
