"""Reading a prepared dataset."""

import os
from functools import cached_property
from pathlib import Path
from typing import Any, Union

import numpy as np

from data.errors import DataError
from data.store import Reader, expected_entries, open_reader
from data.vectors import SUFFIX, VectorDataset

Dataset = Union["ImageDataset", VectorDataset]

PAGES = ("keep", "drop")
DROP_BYTES = 64 << 20  # pages that may be resident, about, before they are dropped
AROUND_BYTES = 64 << 10  # that the kernel maps with each page that it must


class ImageDataset:
    """The images and labels of a dataset file. Threads may share one, a forked child may use its parent's, it pickles.

    The file is opened at the first read in each process. Its pages are mapped: with pages="keep" those that were read
    stay resident in this process until the kernel wants them back; with "drop" the process lets go of them every 64 MB,
    for limits that count them. Both leave them in the kernel's page cache, which it frees when memory is short.
    DataError if the file is missing, unfinished or damaged, or its pages cannot be dropped on this system.
    """

    def __init__(self, path: str | os.PathLike[str], pages: str = "keep") -> None:
        assert pages in PAGES, pages
        self.path = Path(path).absolute()
        self.pages = pages
        reader = self._open()  # and closes it again, unless somebody is reading
        self.manifest = reader.manifest
        if reader.entries() != (expected := expected_entries(self.manifest)):
            raise DataError(
                f"{self.path} is damaged, {reader.entries()} entries of {expected}: saddle verify names what is missing"
            )
        del reader
        self._opened: tuple[int, Reader] | None = None  # (process id, reader)
        self._touched = 0  # bytes that may be resident since pages were dropped

    def __len__(self) -> int:
        return self.manifest.count

    def _open(self) -> Reader:
        reader = open_reader(self.path)
        if self.pages == "drop":
            reader.drop_pages()  # can it be done? It is found out while the file still has this name
        return reader

    def _reader(self) -> Reader:
        opened = self._opened
        if opened is None or opened[0] != os.getpid():
            opened = (os.getpid(), self._open())
            if opened[1].manifest != self.manifest:
                raise DataError(f"{self.path} was replaced by another dataset while in use: start again")
            self._opened = opened
        opened[1].check_unchanged()
        return opened[1]

    @cached_property
    def labels(self) -> np.ndarray | None:
        """int64 [N], indices into `manifest.classes`; None if the dataset is unlabeled. DataError for others."""
        labels = self._reader().labels()
        if labels is not None and labels.ndim == 1:
            classes = len(self.manifest.classes or ())
            for index in np.flatnonzero((labels < 0) | (labels >= classes))[:1]:
                raise DataError(
                    f"label {labels[index]} of image {index} in {self.path} is outside its {classes} classes"
                )
        return labels

    def shape(self, level: int) -> tuple[int, int, int]:
        """(H, W, C) of the images of a level. DataError if it is not stored."""
        if level not in self.manifest.levels:
            stored = ", ".join("{}x{}".format(*self.manifest.size(one)) for one in self.manifest.levels)
            raise DataError(f"{self.path} has no level {level}; it holds {stored}: prepare it with more --levels")
        return *self.manifest.size(level), self.manifest.channels

    def read(self, indices: np.ndarray, level: int, check: bool = False, out: np.ndarray | None = None) -> np.ndarray:
        """uint8 [n, H, W, C]: images `indices` (int [n] in [0, N)) of a level; `check` verifies their checksums.

        They are written into `out`, of that shape and in C order, if given: new memory costs more than the copy does.
        DataError if the level is not stored or a record is damaged; IndexError for an index out of range.
        """
        self.shape(level)
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"indices in [{indices.min()}, {indices.max()}] of a dataset of {len(self)}")
        reader = self._reader()
        images = reader.read(indices, level, check, out)
        if self.pages == "drop":
            self._touched += images.nbytes + len(indices) * AROUND_BYTES
            if self._touched >= DROP_BYTES:
                self._touched = 0
                reader.drop_pages()
        return images

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "pages": self.pages, "manifest": self.manifest, "_opened": None, "_touched": 0}


def open_dataset(path: str | os.PathLike[str], pages: str = "keep") -> Dataset:
    """A dataset of images, or of vectors if the file is an .npz. DataError as their classes say."""
    return VectorDataset(path) if Path(path).suffix == SUFFIX else ImageDataset(path, pages)
