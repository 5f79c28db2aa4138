"""What a source is: an ordered, repeatable list of items, and how the bytes of one become an opened image."""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from data.labels import Label, Labels

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # what the content of a file must be, whatever its name
MAX_MEMBER = 256 << 20  # bytes that one file of an archive may unpack to


class Item(NamedTuple):
    """One image of a source."""

    name: str
    image: "Image | np.ndarray | str"  # opened, header read; or uint8 [H, W] or [H, W, 3 or 4]; or why there is none
    label: Label


class Read(Protocol):
    """How a source is read."""

    def __call__(self, start: int = 0, stop: int | None = None) -> Iterator[Item]:
        """The items in [start, stop), in order."""


@dataclass(frozen=True)
class Source:
    """An ordered set of images. `read` may be called again, and from forked children: it opens its files itself.

    An item is valid until the next one is asked for. A source does not pickle.
    """

    name: str
    count: int  # items that `read` yields, unreadable ones included
    classes: tuple[str, ...] | None  # class names by label; None: labels are vectors, or there are none
    read: Read
    ignored: int = 0  # files that do not claim to be images
    label_dim: int | None = None  # length of the float32 vectors that are the labels


class Row(NamedTuple):
    """An item before it is opened."""

    name: str
    label: Label
    file: Any  # what a kind of source opens; a str is the reason why it is refused


def rows_source(
    name: str, rows: Sequence[Row], labels: Labels, open_rows: Callable[[Sequence[Row]], Iterator[Item]], ignored: int
) -> Source:
    """The source of a list of rows, opened by `open_rows`."""

    def read(start: int = 0, stop: int | None = None) -> Iterator[Item]:
        return open_rows(rows[start:stop])

    return Source(name, len(rows), labels.classes, read, ignored, labels.dim)


def array_source(name: str, images: np.ndarray, labels: Labels, max_images: int | None, item: str = "image") -> Source:
    """The source of uint8 images [N, H, W] or [N, H, W, C] in memory, each called `item` and its number."""
    count = min(len(images), max_images or len(images))

    def read(start: int = 0, stop: int | None = None) -> Iterator[Item]:
        for index in range(*slice(start, stop).indices(count)):
            yield Item(f"{item} {index}", np.ascontiguousarray(images[index]), labels.values[index])

    return Source(name, count, labels.classes, read, label_dim=labels.dim)


def open_items(rows: Sequence[Row], open_file: Callable[[Any], IO[bytes]]) -> Iterator[Item]:
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


def open_image(stream: IO[bytes]) -> "Image | str":
    """The image in a stream, its header read, or the reason why there is none to be had."""
    from PIL import Image

    if stream.seek(0, os.SEEK_END) == 0:
        return "empty file"
    stream.seek(0)
    try:
        with quiet_pillow():
            image = Image.open(stream, formats=FORMATS)
            # A phone's JPEG may carry a second picture (MPO); the first is the photo.
            animated = getattr(image, "is_animated", False) and image.format != "MPO"
        return "more than one frame" if animated else image
    except Image.UnidentifiedImageError:
        return "not an image"
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        return f"more than {Image.MAX_IMAGE_PIXELS} pixels"
    except Exception as error:  # decoders meet bad bytes with nearly any exception
        return f"damaged: {error}"


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Within: an image so large that it may be an attack is an error; Pillow's other remarks are not shown."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


# Names


def claims_image(name: str) -> bool:
    """Whether a file name ends as those of images do."""
    return PurePosixPath(name).suffix.lower() in SUFFIXES


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


def hidden(name: str) -> bool:
    """Whether a file or a folder on the way to it is hidden, or is what macOS leaves in archives."""
    parts = name.replace("\\", "/").split("/")
    return any(part == "__MACOSX" or (part[:1] == "." and part not in (".", "..")) for part in parts)


def unsafe(name: str) -> bool:
    """Whether the name of an archive's member leads out of the folder it would be unpacked to."""
    name = name.replace("\\", "/")
    return name.startswith("/") or ".." in name.split("/") or bool(PureWindowsPath(name).drive)


def printable(name: str) -> str:
    """A name that any terminal and any encoding takes: control characters and undecodable bytes are escaped."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in name)
