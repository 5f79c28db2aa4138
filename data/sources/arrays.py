"""Images in one array: IDX files as MNIST has them, and npz."""

import re
import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from data.errors import DataError
from data.items import Source, array_source
from data.kinds import path_kind
from data.labels import Labels, labels_from_array, no_labels
from data.streams import DAMAGE, MAX_ARRAY, head, open_unpacked, read_npz

MAX_RATIO = 1032  # deflate packs no better
IDX_UINT8 = b"\0\0\x08"  # then one byte that says how many dimensions follow, each four bytes, big-endian

NPZ_KEYS = (  # (images, labels)
    ("images", "labels"),
    ("x", "y"),
    ("train_images", "train_labels"),  # MedMNIST
    ("x_train", "y_train"),  # Keras
    ("arr_0", "arr_1"),
)


def is_idx(path: Path) -> bool:
    """Whether a file, which may be compressed, starts like an IDX file."""
    return re.match(rb"\0\0[\x08-\x0e][\1-\x08]", head(path, 4)) is not None


def open_idx(path: Path, max_images: int | None) -> Source:
    """The source of an IDX file of images [N, H, W], labeled by the file beside it whose name says so.

    That is the one with `labels` and `idx1` for `images` and `idx3`, compressed or not.
    """
    images = _read_idx(path)
    if images.ndim != 3:
        raise DataError(
            f"{path} has the shape {images.shape}, and images need three numbers: give the file of the images"
        )
    _check_not_empty(path, images)
    beside = _idx_labels_file(path)
    labels = _idx_labels(beside, len(images)) if beside else no_labels(len(images))
    opened = array_source(path.name, images, labels, max_images)
    return replace(opened, files=[path, beside] if beside else [path])


def _idx_labels_file(path: Path) -> Path | None:
    name = path.name.replace("images", "labels").replace("idx3", "idx1")
    beside = [path.with_name(one) for one in (name, name.removesuffix(".gz"), f"{name}.gz")]
    return next((one for one in beside if one.is_file() and name != path.name), None)


def _idx_labels(path: Path, count: int) -> Labels:
    labels = _read_idx(path)
    if labels.ndim != 1:
        raise DataError(f"{path} has the shape {labels.shape}, and labels need one number")
    return labels_from_array(path, labels, count)


def _read_idx(path: Path) -> np.ndarray:
    """The uint8 array of an IDX file. DataError if it is of another type, or longer or shorter than its header says."""
    try:
        with open_unpacked(path) as file:
            magic = file.read(4)
            if magic[:3] != IDX_UINT8 or len(magic) < 4:
                raise DataError(f"{path} is no IDX file of bytes (it starts with {magic.hex()})")
            sizes = file.read(4 * magic[3])
            if len(sizes) < 4 * magic[3]:
                raise DataError(f"{path} is truncated: copy it again")
            shape = struct.unpack(f">{magic[3]}I", sizes)
            needed = int(np.prod(shape, dtype=object))
            if needed > MAX_ARRAY:
                raise DataError(f"{path} claims to have {needed} bytes; {MAX_ARRAY} are the limit")
            # A header that lies must not make us reserve the memory.
            content = file.read(needed + 1) if needed <= MAX_RATIO * path.stat().st_size else b""
    except DAMAGE as error:
        raise DataError(f"{path} is damaged ({error}): copy it again") from error
    if len(content) != needed:
        raise DataError(
            f"{path} is {'longer' if len(content) > needed else 'shorter'} than its header says: copy it again"
        )
    return np.frombuffer(content, np.uint8).reshape(shape)


def is_npz(path: Path) -> bool:
    """Whether a file is a zip that starts with an array."""
    start = head(path, 30 + (1 << 16))
    if path.suffix.lower() == ".npz":
        return start[:2] == b"PK"
    name_length = int.from_bytes(start[26:28], "little")
    return start[:4] == b"PK\3\4" and start[30 : 30 + name_length].endswith(b".npy")


def open_npz(path: Path, max_images: int | None) -> Source:
    """The source of an npz file with uint8 images [N, H, W] or [N, H, W, C], C of 1, 3 or 4, and perhaps labels.

    NPZ_KEYS says how the arrays may be called.
    """

    def choose(names: Sequence[str]) -> Sequence[str]:
        for images, labels in NPZ_KEYS:
            if images in names:
                return [images, labels] if labels in names else [images]
        raise DataError(
            f"{path} has arrays {', '.join(names)}; images are called {', '.join(np.array(NPZ_KEYS)[:, 0])}"
        )

    (key, stored), *rest = read_npz(path, choose).items()
    images = _as_images(f"{key} in {path}", stored)
    checked = no_labels(len(images))
    for key, labels in rest:
        checked = labels_from_array(f"{key} in {path}", labels, len(images))
    return array_source(path.name, images, checked, max_images)


def _as_images(where: str, images: np.ndarray) -> np.ndarray:
    """uint8 [N, H, W] or [N, H, W, 3 or 4]; DataError if an array is none of these."""
    if images.dtype != np.uint8:
        raise DataError(f"{where} is of type {images.dtype}: images are uint8, 0 to 255")
    if images.ndim == 4 and images.shape[3] not in (1, 3, 4) and images.shape[1] in (1, 3, 4):
        raise DataError(f"{where} has the shape {images.shape}, channels first: save numpy.moveaxis(images, 1, 3)")
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[..., 0]
    if images.ndim != 3 and not (images.ndim == 4 and images.shape[3] in (3, 4)):
        raise DataError(f"{where} has the shape {images.shape}: images are [N, H, W] or [N, H, W, C], C of 1, 3 or 4")
    _check_not_empty(where, images)
    return images


def _check_not_empty(where: object, images: np.ndarray) -> None:
    if not images.size:
        raise DataError(f"no images in {where}: its shape is {images.shape}")


KINDS = (
    path_kind("an npz", is_npz, open_npz, details="arrays such as images and labels"),
    path_kind("an IDX file of images", is_idx, open_idx, details="as MNIST has them; .gz too, labels beside it"),
)
