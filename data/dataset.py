"""Reading a prepared dataset."""

import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import DataError
from data.reader import Reader, open_reader


class ImageDataset:
    """The images and labels of a dataset file. Threads may share one, a forked child may use its parent's, it pickles.

    The file is opened at the first read in each process. DataError if it is missing, unfinished or damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        self.manifest = open_reader(self.path).manifest  # and closes it again, unless somebody is reading
        self._opened: tuple[int, Reader] | None = None  # (process id, reader)

    def __len__(self) -> int:
        return self.manifest.count

    def _reader(self) -> Reader:
        opened = self._opened
        if opened is None or opened[0] != os.getpid():
            opened = (os.getpid(), open_reader(self.path))
            if opened[1].manifest != self.manifest:
                raise DataError(f"{self.path} was replaced by another dataset while in use: start again")
            self._opened = opened
        return opened[1]

    @cached_property
    def labels(self) -> np.ndarray | None:
        """int64 [N], indices into `manifest.classes`; None if the dataset is unlabeled."""
        return self._reader().labels()

    def read(self, indices: np.ndarray, level: int, check: bool = False) -> np.ndarray:
        """uint8 [n, H, W, C]: images `indices` (int [n] in [0, N)) of a level; `check` verifies their checksums.

        DataError if the level is not stored or a record is damaged; IndexError for an index out of range.
        """
        if level not in self.manifest.levels:
            stored = ", ".join("{}x{}".format(*self.manifest.size(one)) for one in self.manifest.levels)
            raise DataError(f"{self.path} has no level {level}; it holds {stored}: prepare it with more --levels")
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"indices in [{indices.min()}, {indices.max()}] of a dataset of {len(self)}")
        return self._reader().read(indices, level, check)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "manifest": self.manifest, "_opened": None}
