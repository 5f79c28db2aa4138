"""What scores see of a set of images, gathered over ranks."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from gan.metrics.classifier import LARGEST_SIDE, shrink
from gan.metrics.features import FeatureNetwork
from gan.ranks.distributed import Ranks, sum_over_ranks


@dataclass(frozen=True)
class Sample:
    """A set of N images."""

    images: np.ndarray  # uint8 [N, h, w, C], h and w at most 32: larger ones are averaged down
    features: np.ndarray  # float32 [N, F]
    probabilities: np.ndarray | None = None  # [N, K], of the classes that a classifier sees; None without one
    labels: np.ndarray | None = None  # int64 [N], the classes they are of or that were asked for; None without any

    def __len__(self) -> int:
        return len(self.features)

    def pick(self, rows: np.ndarray | slice) -> "Sample":
        """The images with these indices, which may repeat."""
        parts = {name: part[rows] for name, part in vars(self).items() if part is not None}
        return replace(self, **parts)


@dataclass(frozen=True)
class Source:
    """Images that are made or read on demand: any rank can make any of them."""

    count: int
    shape: tuple[int, int, int]  # (H, W, C)
    batch: int  # how many are made at a time
    read: Callable[[slice], np.ndarray]  # rows -> uint8 [n <= batch, H, W, C]


def observe(source: Source, network: FeatureNetwork, ranks: Ranks) -> Sample:
    """All images of a source, with their features. All ranks return the same, bit for bit, for any number of ranks.

    The batches are the same ones for any number of ranks, which take turns; each fills in its own rows of zeros, and
    the sum over ranks is then complete, and exact.
    """
    height, width, channels = source.shape
    small = (min(height, LARGEST_SIDE), min(width, LARGEST_SIDE), channels)
    images = np.zeros((source.count, *small), np.uint8)
    features = np.zeros((source.count, network.width), np.float32)
    for start in range(ranks.rank * source.batch, source.count, ranks.world * source.batch):
        rows = slice(start, min(start + source.batch, source.count))
        whole = source.read(rows)
        images[rows] = shrink(whole)
        features[rows] = network(whole)
    for part in (images, features):
        part[:] = sum_over_ranks(torch.from_numpy(part).to(ranks.device)).cpu().numpy()
    return Sample(images, features)
