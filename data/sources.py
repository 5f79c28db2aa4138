"""Where images come from: built-in digits, folders and zip archives, each a lazy, repeatable, ordered list of items."""

import io
import os
import warnings
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from data.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # what the content of a file must be, whatever its name
MAX_MEMBER = 256 << 20  # bytes that one zip member may unpack to
STACKED_COUNT, STACKED_KEY = 50_000, 0


class Item(NamedTuple):
    """One image of a source."""

    name: str
    image: "Image | np.ndarray | str"  # opened, header read; or uint8 [H, W] or [H, W, 3]; or why it cannot be read
    label: int | np.ndarray | None  # class, or float32 [d]


class Read(Protocol):
    """Items [start, stop) of a source in order, cheap to start anywhere, in any process forked from ours."""

    def __call__(self, start: int = 0, stop: int | None = None) -> Iterator[Item]: ...


@dataclass(frozen=True)
class Source:
    """An ordered set of images. `read` may be called again; an item is valid until the next one is asked for."""

    name: str
    count: int  # items that `read` yields, unreadable ones included
    classes: tuple[str, ...] | None  # class names by label; None: no label is an int
    read: Read
    ignored: int = 0  # files that do not claim to be images
    label_dim: int | None = None  # length of float-vector labels; None: no label is one


def open_source(source: str, max_images: int | None = None) -> Source:
    """The source called `source`: a built-in name, a folder or a zip; only its first `max_images` items if given.

    DataError if there is no such source or no image in it.
    """
    if source in BUILT_IN:
        return BUILT_IN[source](max_images)
    path = Path(source)
    if source and path.is_dir():
        return _folder(path, max_images)
    if path.is_file() and zipfile.is_zipfile(path):
        return _archive(path, max_images)
    problem = "is neither a folder nor a whole zip" if source and path.exists() else "does not exist"
    raise DataError(
        f"{source or 'nothing'} {problem}: a source is a folder of images, a zip of one, or {' or '.join(BUILT_IN)}"
    )


# Built-in sources


def _digit_scans() -> tuple[np.ndarray, np.ndarray]:
    """The 1797 scanned digits of scikit-learn: uint8 [N, 8, 8] and labels int [N]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("the digits come with scikit-learn, which is missing: pip install scikit-learn") from error
    digits = load_digits()
    sixteenths = digits.data.astype(np.int64).reshape(-1, 8, 8)  # 0..16
    return ((sixteenths * 255 + 8) // 16).astype(np.uint8), digits.target


def _digits(max_images: int | None) -> Source:
    images, labels = _digit_scans()
    count = min(len(images), max_images or len(images))

    def read(start: int = 0, stop: int | None = None) -> Iterator[Item]:
        for index in range(count)[start:stop]:
            yield Item(f"digit {index}", images[index], int(labels[index]))

    return Source("digits", count, tuple(map(str, range(10))), read)


def stacked_choice(index: int, length: int) -> list[int]:
    """Which three of `length` digits image `index` of stacked-digits stacks (red, green, blue)."""
    return [int(raw % length) for raw in np.random.Philox(key=STACKED_KEY, counter=index).random_raw(3)]


def _stacked_digits(max_images: int | None) -> Source:
    images, labels = _digit_scans()
    count = max_images or STACKED_COUNT

    def read(start: int = 0, stop: int | None = None) -> Iterator[Item]:
        for index in range(count)[start:stop]:
            chosen = stacked_choice(index, len(images))
            hundreds, tens, ones = labels[chosen]
            yield Item(f"stack {index}", np.moveaxis(images[chosen], 0, -1), int(100 * hundreds + 10 * tens + ones))

    return Source("stacked-digits", count, tuple(f"{label:03d}" for label in range(1000)), read)


BUILT_IN: dict[str, Callable[[int | None], Source]] = {"digits": _digits, "stacked-digits": _stacked_digits}


# Folders and archives

# (name, label or None, what to open or the reason why it is refused)
Row = tuple[str, int | None, "Path | zipfile.ZipInfo | str"]


def _folder(root: Path, max_images: int | None) -> Source:
    rows, classes, ignored = _catalog(root, _walk(root), max_images)
    return Source(
        root.resolve().name,
        len(rows),
        classes,
        lambda start=0, stop=None: _items(rows[start:stop], _open_file),
        ignored,
    )


def _archive(path: Path, max_images: int | None) -> Source:
    try:
        with zipfile.ZipFile(path) as archive:
            members = list(_members(archive))
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path} is a damaged zip ({error}): copy it again") from error
    rows, classes, ignored = _catalog(path, members, max_images)

    opened: dict[int, zipfile.ZipFile] = {}  # by process: forked ones would move each other's place in the file

    def read(start: int = 0, stop: int | None = None) -> Iterator[Item]:
        archive = opened.get(os.getpid()) or opened.setdefault(os.getpid(), zipfile.ZipFile(path))
        yield from _items(rows[start:stop], lambda member: io.BytesIO(archive.read(member)))

    return Source(path.name, len(rows), classes, read, ignored)


def _walk(root: Path) -> Iterator[tuple[str, Path | str]]:
    """(name below root, path) of every file, through links too; a folder reached a second time is refused."""
    seen: set[tuple[int, int]] = set()
    waiting = deque([("", root)])
    while waiting:
        prefix, folder = waiting.popleft()
        status = folder.stat()
        if (status.st_dev, status.st_ino) in seen:
            yield prefix, "link to a folder that is read under another name"
            continue
        seen.add((status.st_dev, status.st_ino))
        try:
            entries = sorted(os.listdir(folder))
        except OSError as error:
            yield prefix, f"folder cannot be listed: {error.strerror}"
            continue
        for entry in entries:
            name, path = f"{prefix}{entry}", folder / entry
            if _hidden(entry):
                continue
            if not os.path.isdir(path):
                yield name, path
            elif path.is_symlink():
                waiting.append((f"{name}/", path))  # after all real folders, so that those keep their names
            else:
                waiting.appendleft((f"{name}/", path))


def _members(archive: zipfile.ZipFile) -> Iterator[tuple[str, zipfile.ZipInfo | str]]:
    """(name, member) of every file in an archive; an image that it would be unwise to read is refused."""
    for member in archive.infolist():
        if not member.is_dir() and not _hidden(member.filename):
            yield member.filename, (_refusal(member) if _claims_image(member.filename) else None) or member


def _refusal(member: zipfile.ZipInfo) -> str | None:
    name = member.filename.replace("\\", "/")
    if name.startswith("/") or ".." in name.split("/") or PureWindowsPath(name).drive:
        return "unsafe name in the archive"
    if member.flag_bits & 1:
        return "encrypted"
    if member.file_size > MAX_MEMBER:
        return f"unpacks to more than {MAX_MEMBER >> 20} MB"
    return None


def _claims_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in SUFFIXES


def _hidden(name: str) -> bool:
    parts = name.replace("\\", "/").split("/")
    return any(part == "__MACOSX" or (part[:1] == "." and part not in (".", "..")) for part in parts)


def _printable(name: str) -> str:
    """A name that any terminal and any encoding takes: control characters and undecodable bytes are escaped."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in name)


def _catalog(
    where: Path, files: Iterable[tuple[str, Path | zipfile.ZipInfo | str]], max_images: int | None
) -> tuple[list[Row], tuple[str, ...] | None, int]:
    """(rows in order of their names, class names, how many other files there are) of files."""
    listed = list(files)
    images = [(_printable(name), file) for name, file in listed if isinstance(file, str) or _claims_image(name)]
    ignored = len(listed) - len(images)
    if not images:
        looked = ", ".join(SUFFIXES)
        raise DataError(f"no images in {where}: looked for {looked} in it and below, and found {ignored} other files")
    images.sort(key=itemgetter(0))
    classes, labels = label_by_folder([name for name, file in images if not isinstance(file, str)])
    waiting = iter(labels)
    rows = [(name, None if isinstance(file, str) else next(waiting), file) for name, file in images]
    return rows[:max_images], classes, ignored


def label_by_folder(names: Sequence[str]) -> tuple[tuple[str, ...] | None, list[int | None]]:
    """(class names, label of each name): the class is the first folder below those that all names share.

    (None, Nones) if a name has no such folder. Classes are sorted, as numbers if all of them are.
    """
    paths = [name.split("/") for name in names]
    while paths and len({path[0] for path in paths}) == 1 and all(len(path) > 1 for path in paths):
        paths = [path[1:] for path in paths]
    if not all(len(path) > 1 for path in paths) or not paths:
        return None, [None] * len(names)
    folders = {path[0] for path in paths}
    numeric = all(folder.isdecimal() for folder in folders)
    classes = tuple(sorted(folders, key=lambda folder: (int(folder) if numeric else 0, folder)))
    numbers = {folder: number for number, folder in enumerate(classes)}
    return classes, [numbers[path[0]] for path in paths]


def _items(rows: list[Row], open_file: Callable[[Any], IO[bytes]]) -> Iterator[Item]:
    """Open one row after the other, each only as long as its item is in use."""
    for name, label, file in rows:
        if isinstance(file, str):
            yield Item(name, file, label)
            continue
        try:
            stream = open_file(file)
        except Exception as error:  # a damaged archive makes zipfile and its decompressors raise nearly anything
            yield Item(name, f"cannot be opened: {error}", label)
            continue
        with stream:
            yield Item(name, open_image(stream), label)


def _open_file(path: Path) -> IO[bytes]:
    if not path.is_file():
        raise OSError("broken link" if path.is_symlink() else "not a regular file")  # opening a pipe would hang
    return path.open("rb")


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
