"""What scores see of a set of images, gathered over ranks."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from gan.metrics.classifier import LARGEST_SIDE, shrink
from gan.metrics.features import FeatureNetwork
from gan.ranks.distributed import Ranks, sum_over_ranks


@dataclass(frozen=True)
class View:
    """What a metric needs of images at their full size. They are too large to be kept."""

    name: str
    most: int  # of a set's images, chosen at random; it is made of all if they are no more
    look: Callable[[np.ndarray, np.ndarray], np.ndarray]  # (uint8 [n, H, W, C], numbers int64 [n]) -> [n, ...]

    def chosen(self, count: int) -> np.ndarray:
        """The numbers of the images, of so many, that it is made of, in ascending order."""
        return np.sort(np.random.RandomState(0).permutation(count)[: self.most])


@dataclass(frozen=True)
class Seen:
    """A view of a set of N images."""

    data: np.ndarray  # [n, ...]
    rows: np.ndarray  # int64 [N]: where in `data` that of an image is, -1 if the view was not made of it
    size: tuple[int, int]  # (H, W) of the images

    def __len__(self) -> int:
        """Of how many of the images it was made."""
        return int((self.rows >= 0).sum())

    def pick(self, rows: np.ndarray | slice) -> "Seen":
        """That of the images with these indices."""
        return replace(self, rows=self.rows[rows])

    def of_images(self) -> tuple[np.ndarray, np.ndarray]:
        """(indices int64 [n] of the images that it was made of, their data [n, ...])."""
        images = np.flatnonzero(self.rows >= 0)
        return images, self.data[self.rows[images]]


@dataclass(frozen=True)
class Sample:
    """A set of N images."""

    images: np.ndarray  # uint8 [N, h, w, C], h and w at most 32: larger ones are averaged down
    features: np.ndarray  # float32 [N, F]
    probabilities: np.ndarray | None = None  # [N, K], of the classes that a classifier sees; None without one
    labels: np.ndarray | None = None  # int64 [N], the classes they are of or that were asked for; None without any
    views: Mapping[str, Seen] = field(default_factory=dict)  # by name

    def __len__(self) -> int:
        return len(self.features)

    def rows_in_views(self) -> np.ndarray:
        """All rows int64 [N], those first of which all views were made."""
        missing = [seen.rows < 0 for seen in self.views.values()]
        return np.argsort(np.any(missing, axis=0) if missing else np.zeros(len(self)), kind="stable")

    def pick(self, rows: np.ndarray | slice) -> "Sample":
        """The images with these indices, which may repeat."""
        parts = {name: part[rows] for name, part in vars(self).items() if isinstance(part, np.ndarray)}
        return replace(self, **parts, views={name: seen.pick(rows) for name, seen in self.views.items()})


@dataclass(frozen=True)
class Source:
    """Images that are made or read on demand: any rank can make any of them."""

    count: int
    shape: tuple[int, int, int]  # (H, W, C)
    batch: int  # how many are made at a time
    read: Callable[[slice], np.ndarray]  # rows -> uint8 [n <= batch, H, W, C]


def observe(source: Source, network: FeatureNetwork, ranks: Ranks, views: Iterable[View] = ()) -> Sample:
    """All images of a source, with their features and views. All ranks return the same, bit for bit, for any number of
    ranks.

    The batches are the same ones for any number of ranks, which take turns; each fills in its own rows of zeros, and
    the sum over ranks is then complete, and exact.
    """
    height, width, channels = source.shape
    small = (min(height, LARGEST_SIDE), min(width, LARGEST_SIDE), channels)
    images = np.zeros((source.count, *small), np.uint8)
    features = np.zeros((source.count, network.width), np.float32)
    seen = {view: _unseen(view, source) for view in views}
    for start in range(ranks.rank * source.batch, source.count, ranks.world * source.batch):
        rows = slice(start, min(start + source.batch, source.count))
        whole = source.read(rows)
        images[rows] = shrink(whole)
        features[rows] = network(whole)
        for view, kept in seen.items():
            numbers = rows.start + np.flatnonzero(kept.rows[rows] >= 0)
            if len(numbers):
                kept.data[kept.rows[numbers]] = view.look(whole[numbers - rows.start], numbers)
    arrays: list[np.ndarray] = [images, features, *(kept.data for kept in seen.values())]
    for array in arrays:
        array[:] = sum_over_ranks(torch.from_numpy(array).to(ranks.device)).cpu().numpy()
    return Sample(images, features, views={view.name: kept for view, kept in seen.items()})


def _unseen(view: View, source: Source) -> Seen:
    """Zeros for the view of a source's images."""
    chosen = view.chosen(source.count)
    trial = view.look(np.zeros((1, *source.shape), np.uint8), np.zeros(1, np.int64))
    rows = np.full(source.count, -1)
    rows[chosen] = np.arange(len(chosen))
    return Seen(np.zeros((len(chosen), *trial.shape[1:]), trial.dtype), rows, source.shape[:2])


def groups_of_class(labels: np.ndarray, size: int) -> np.ndarray:
    """Positions of images of one class each, no image twice: int64 [groups, size]."""
    groups = [np.empty((0, size), np.int64)]
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        groups.append(members[: len(members) // size * size].reshape(-1, size))
    return np.concatenate(groups)
