"""CIFAR-10 and CIFAR-100 as they are distributed: pickles, read without running what is in them.

A folder or archive of one of them is its training set; the test set is the file `test_batch` or `test` by itself.
CIFAR-100 gives its fine labels.
"""

import io
import pickle
import pickletools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import islice
from math import isqrt
from pathlib import Path, PurePosixPath
from tarfile import TarInfo
from typing import Any

import numpy as np

from data.errors import DataError
from data.items import Source, array_source
from data.kinds import path_kind
from data.labels import Labels, labels_from_array
from data.streams import MAX_MEMBER
from data.tar_members import is_tar, members

NAMES = {"batches.meta": "label_names", "meta": "fine_label_names"}  # file of class names -> key in it
LABELS = ("labels", "fine_labels")
FOLDERS = ("cifar-10-batches-py", "cifar-100-python")  # in the archives as they are distributed
TRAINING = re.compile(r"data_batch_[0-9]+|train")


class _Array:
    """What an unpickled numpy array is at first. It takes bytes, and makes an array of them in `value`."""

    value: np.ndarray

    def __setstate__(self, state: tuple[int, tuple[int, ...], "_Type", bool, bytes]) -> None:
        _, shape, dtype, column_major, content = state
        self.value = _frombuffer(content, dtype, shape, "F" if column_major else "C").value


class _Type:
    """An unpickled numpy.dtype, of which only uint8 is allowed."""

    def __init__(self, name: str | bytes, *flags: object) -> None:
        if name not in ("u1", b"u1", "uint8", "|u1"):
            raise pickle.UnpicklingError(f"an array of type {name!r}")

    def __setstate__(self, state: object) -> None:
        """Byte order and the like, of which bytes have none."""


def _reconstruct(kind: object, shape: object, code: object) -> _Array:
    return _Array()


def _frombuffer(content: bytes, dtype: _Type, shape: tuple[int, ...], order: Any) -> _Array:
    array = _Array()
    array.value = np.frombuffer(content, np.uint8).reshape(shape, order=order)
    return array


def _encode(text: str, encoding: str) -> bytes:
    return text.encode("latin1")  # how Python 3 writes bytes for Python 2


# Whatever a pickle names is looked up here: it gets our stand-ins, and no function of numpy.
ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _encode,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _frombuffer for core in ("core", "_core")},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a class or function; UnpicklingError if there is none."""
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return ALLOWED[module, name]


def unpickle(where: object, content: bytes) -> dict[str, Any]:
    """The dictionary in a pickle of Python 2 or 3. DataError if it is none, or needs more than uint8 arrays."""
    try:
        for number, (opcode, index, _) in enumerate(pickletools.genops(content)):
            if "PUT" in opcode.name and (index or 0) > number:  # the unpickler makes room for as many objects
                raise pickle.UnpicklingError(f"object {index} of {number}")
        fields = _Unpickler(io.BytesIO(content), encoding="bytes").load()
        return {_text(key): field.value if isinstance(field, _Array) else field for key, field in fields.items()}
    except Exception as error:  # bad bytes make unpickling raise nearly anything
        raise DataError(f"{where} is refused: no CIFAR batch, and never loaded as another pickle ({error})") from error


def _text(value: str | bytes) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else value


def is_pickle(path: Path) -> bool:
    """Whether a file starts like a pickle of protocol 2 or later."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return re.match(rb"\x80[\2-\5]", file.read(2)) is not None


def is_cifar_folder(path: Path) -> bool:
    """Whether a folder has a training batch in it."""
    return is_pickle(path / "data_batch_1") or is_pickle(path / "train")


def is_cifar_tar(path: Path) -> bool:
    """Whether a tar begins with a folder or file of CIFAR."""
    if not is_tar(path):
        return False
    first = [PurePosixPath(member.name) for member, _ in islice(members(path, lambda member: False), 2)]
    return any(name.parts[:1] in [(folder,) for folder in FOLDERS] or name.name == "data_batch_1" for name in first)


def open_cifar_file(path: Path, max_images: int | None) -> Source:
    """The source of one batch; the names of the classes are in the file of those beside it."""
    files = [path, *(path.with_name(name) for name in NAMES if path.with_name(name).is_file())]
    opened = _source(path, path.name, {file.name: _content(file) for file in files}, [path.name], max_images)
    return replace(opened, files=files)


def open_cifar_folder(path: Path, max_images: int | None) -> Source:
    """The source of the training set in a folder."""
    files = sorted(file for file in path.iterdir() if file.name in NAMES or TRAINING.fullmatch(file.name))
    return replace(_training(path, {file.name: _content(file) for file in files}, max_images), files=files)


def open_cifar_tar(path: Path, max_images: int | None) -> Source:
    """The source of the training set in a tar, as it is distributed."""

    def wanted(member: TarInfo) -> bool:
        name = PurePosixPath(member.name).name
        return member.isreg() and bool(name in NAMES or TRAINING.fullmatch(name))

    files = {PurePosixPath(member.name).name: content for member, content in members(path, wanted) if content}
    return _training(path, files, max_images)


def _content(path: Path) -> bytes:
    if path.stat().st_size > MAX_MEMBER:
        raise DataError(f"{path} has more than {MAX_MEMBER >> 20} MB")
    return path.read_bytes()


def _training(path: Path, files: Mapping[str, bytes], max_images: int | None) -> Source:
    batches = sorted(set(files) - set(NAMES), key=lambda name: (len(name), name))  # batch 10 after batch 9
    if not batches:
        raise DataError(f"no training batch in {path}: looked for data_batch_1 and train")
    return _source(path, path.resolve().name, files, batches, max_images)


def _source(
    path: Path, name: str, files: Mapping[str, bytes], batches: Iterable[str], max_images: int | None
) -> Source:
    images, labels = zip(*(_batch(f"{batch} of {path}", files[batch]) for batch in batches), strict=True)
    if len({one.shape[1:] for one in images}) > 1:
        raise DataError(f"the batches of {path} have images of different sizes")
    together = np.concatenate(images)
    values = np.concatenate(labels)
    return array_source(name, together, _labels(path, values, files), max_images)


def _batch(where: str, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The images, uint8 [N, H, W, 3], and labels, int64 [N], of one batch."""
    fields = unpickle(where, content)
    pixels = fields.get("data")
    if not isinstance(pixels, np.ndarray) or pixels.ndim != 2 or not pixels.size:
        raise DataError(f"{where} has no array of images called data")
    side = isqrt(pixels.shape[1] // 3)
    if 3 * side * side != pixels.shape[1]:
        raise DataError(f"{where}: {pixels.shape[1]} numbers are not the three planes of a square image")
    labels = next((fields[key] for key in LABELS if key in fields), None)
    if not isinstance(labels, list) or not all(type(label) is int and 0 <= label < 1 << 31 for label in labels):
        raise DataError(f"{where} has no list of integers called {' or '.join(LABELS)}")
    if len(labels) != len(pixels):
        raise DataError(f"{where} has {len(labels)} labels for {len(pixels)} images")
    return np.moveaxis(pixels.reshape(-1, 3, side, side), 1, 3), np.array(labels)


def _labels(path: Path, labels: np.ndarray, files: Mapping[str, bytes]) -> Labels:
    found = next((name for name in NAMES if name in files), None)
    if found is None:
        return labels_from_array(path, labels, len(labels))
    classes = unpickle(f"{found} of {path}", files[found]).get(NAMES[found])
    if not isinstance(classes, list) or not all(isinstance(name, str | bytes) for name in classes):
        raise DataError(f"{found} of {path} has no list of names called {NAMES[found]}")
    return labels_from_array(path, labels, len(labels), [_text(name) for name in classes])


KINDS = (
    path_kind("a folder of CIFAR batches", is_cifar_folder, open_cifar_folder, details="CIFAR-10/100 as distributed"),
    path_kind("a CIFAR batch", is_pickle, open_cifar_file, details="such as test_batch"),
    path_kind("a CIFAR archive", is_cifar_tar, open_cifar_tar, details="CIFAR-10/100 as distributed"),
)
