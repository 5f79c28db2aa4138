"""How unlike each other images are, by their pixels alone: cheap enough for every tick, and exact over ranks.

Two ratios that a collapsed generator cannot hide both of. *Coherence* is near 1 where one pattern is painted into every
image, whatever its brightness and tint, and near 0 for photos. *Spread* is the distance of images from their mean.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gan.ranks.distributed import sum_over_ranks

FINE = 1024
# A generator whose figures are beyond these, as shares of those of the reals, may have collapsed.
MOST_COHERENCE = 3.0
LEAST_SPREAD = 0.75


@dataclass(frozen=True)
class Diversity:
    """Of a set of images, or of the classes in it."""

    coherence: float  # at most 1; about 0, or a little below, for images that have nothing in common but their colors
    spread: float  # root mean square distance of pixels to those of the mean image, in [0, 1]; pixels are in [-1, 1]


@dataclass(frozen=True)
class Sums:
    """What both need of a set of images, by group. They are whole numbers: no order changes them."""

    count: Tensor  # int64 [K]
    total: Tensor  # int64 [K, H, W, C]: of pixels
    squares: Tensor  # int64 [K]: of squared pixels
    patterns: Tensor  # int64 [K]: of squared pixels less their image's own mean color, in units of 1 / FINE

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(*(mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)))

    def over_ranks(self, device: torch.device) -> "Sums":
        """The same for the images of all ranks together; device: that ranks send from."""
        return Sums(*(sum_over_ranks(part.to(device)).cpu() for part in vars(self).values()))


def no_images(shape: tuple[int, int, int], count: int) -> Sums:
    """The sums of no image [H, W, C]."""
    return sums(torch.empty((0, *shape), dtype=torch.uint8), torch.empty(0, dtype=torch.int64), count)


def sums(images: Tensor, groups: Tensor, count: int) -> Sums:
    """Images uint8 [N, H, W, C] in groups int64 [N] in [0, count) -> their sums."""
    pixels = images.to(torch.int64)
    squares = pixels.square().sum((1, 2, 3))
    area = images.shape[1] * images.shape[2]
    colors = pixels.sum((1, 2)).double().square().sum(1) / area

    def by_group(values: Tensor) -> Tensor:
        return values.new_zeros(count, *values.shape[1:]).index_add_(0, groups, values)

    return Sums(
        count=torch.bincount(groups, minlength=count),
        total=by_group(pixels),
        squares=by_group(squares),
        patterns=by_group(((squares - colors) * FINE).round().long()),
    )


def diversity(of: Sums) -> Diversity:
    """Coherence and spread within groups, each group weighing as many as its images; groups of one image say nothing.

    Let d be an image less its own mean color, in each channel. Within a group of n images

        coherence = |mean d|^2 / mean |d|^2,    spread^2 = mean |x - mean x|^2

    where both squared means of n images are freed of their bias, 1/n of the variance. A group that is one image
    repeated has coherence 1 and spread 0. Images without any pattern, each of one color, have coherence 1 too.
    Raises ValueError if no group has two images.
    """
    some = of.count > 1
    if not bool(some.any()):
        raise ValueError("diversity of images needs a group of at least two")
    n = of.count[some].double()
    height, width, channels = of.total.shape[1:]
    area = height * width
    mean = of.total[some].double() / n.view(-1, 1, 1, 1)
    mean_square = mean.square().sum((1, 2, 3))
    color_of_mean = mean.sum((1, 2)).square().sum(1) / area
    energy = of.squares[some].double() / n  # mean |x|^2
    pattern = of.patterns[some].double() / FINE / n  # mean |d|^2
    common = mean_square - color_of_mean  # |mean d|^2
    common = (n * common - pattern) / (n - 1)
    variance = (energy - mean_square) * n / (n - 1)
    pattern_sum = float((n * pattern).sum())
    coherence = float((n * common).sum()) / pattern_sum if pattern_sum > 0 else 1.0
    per_pixel = float((n * variance).sum() / n.sum()) / (area * channels)
    return Diversity(coherence, max(per_pixel, 0.0) ** 0.5 / 127.5)
