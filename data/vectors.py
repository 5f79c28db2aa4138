"""Vectors in a NumPy archive, for models that need no pictures: one row each, as images of one row of one channel."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.errors import DataError
from data.labels import MAX_CLASSES
from data.streams import read_npz

SUFFIX = ".npz"
ROWS = "x"  # name of the array of vectors
LABELS = "y"  # name of the array of classes, which may be missing


@dataclass(frozen=True)
class VectorManifest:
    """What a dataset of images says of itself, of vectors."""

    count: int
    base: tuple[int, int]
    classes: tuple[str, ...] | None
    content_hash: str
    channels: int = 1
    levels: tuple[int, ...] = (0,)
    label_dim: int = 0

    def size(self, level: int) -> tuple[int, int]:
        """(1, K)."""
        return self.base

    @property
    def resolution(self) -> tuple[int, int]:
        """(1, K)."""
        return self.base


class VectorDataset:
    """The rows of `x`, [N, K] of finite numbers, in an .npz, and their classes `y`, whole numbers [N], if it has them.

    They are read whole. DataError for a file that is missing, no such archive, or holds something else.
    """

    pages = "keep"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        if not self.path.is_file():
            raise DataError(f"no file {self.path}")
        arrays = read_npz(self.path, lambda names: [name for name in (ROWS, LABELS) if name in names])
        self.rows = self._check_rows(arrays.get(ROWS))
        self.labels = self._check_labels(arrays.get(LABELS))
        classes = None if self.labels is None else tuple(map(str, range(int(self.labels.max()) + 1)))
        digest = hashlib.sha256(self.rows.tobytes())
        digest.update(b"" if self.labels is None else self.labels.tobytes())
        self.manifest = VectorManifest(len(self.rows), (1, self.rows.shape[1]), classes, digest.hexdigest())

    def _check_rows(self, rows: np.ndarray | None) -> np.ndarray:
        wanted = f"{self.path} needs an array {ROWS} of vectors, [N, K] of finite numbers"
        if rows is None or rows.ndim != 2 or not rows.size or rows.dtype.kind not in "fiu":
            raise DataError(f"{wanted}; it has {'none' if rows is None else f'{rows.dtype} {list(rows.shape)}'}")
        rows = rows.astype(np.float32)
        if not np.isfinite(rows).all():
            raise DataError(f"{wanted}; some are not finite")
        return rows

    def _check_labels(self, labels: np.ndarray | None) -> np.ndarray | None:
        if labels is None:
            return None
        fitting = labels.dtype.kind in "iu" and labels.shape == (len(self.rows),)
        if not fitting or labels.min() < 0 or labels.max() >= MAX_CLASSES:
            raise DataError(f"{self.path}: {LABELS} must be whole numbers from 0 to {MAX_CLASSES - 1}, one per vector")
        return labels.astype(np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def shape(self, level: int) -> tuple[int, int, int]:
        """(1, K, 1)."""
        return 1, self.rows.shape[1], 1

    def read(self, indices: np.ndarray, level: int, check: bool = False, out: np.ndarray | None = None) -> np.ndarray:
        """float32 [n, 1, K, 1]: the vectors `indices`."""
        return self.rows[indices].reshape(-1, *self.shape(level))
