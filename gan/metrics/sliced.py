"""The sliced Wasserstein distance (Rabin et al. 2011) between patches of images, on each level of their Laplacian
pyramids (Karras et al. 2018, section 5)."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gan.draws import group_generators
from gan.metrics.intervals import Estimate, normal

SIDE = 7  # pixels of a patch
PATCHES = 8  # of each level of each image; the paper's 128 of an image say little more than its other images do
COARSEST = 16  # pixels: the smaller side of no level is below, unless that of the images is
DIRECTIONS = 256
SEED = 0  # of the places of patches, and of the directions
BINOMIAL = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)


def level_sizes(height: int, width: int) -> list[tuple[int, int]]:
    """The sizes of the levels of images [H, W], the finest first."""
    sizes = [(height, width)]
    while min(sizes[-1]) >= 2 * COARSEST:
        height, width = sizes[-1]
        sizes.append(((height + 1) // 2, (width + 1) // 2))
    return sizes


def laplacian_pyramid(images: Tensor) -> list[Tensor]:
    """Images float [n, C, H, W] -> levels [n, C, h, w] of the sizes that `level_sizes` lists (Burt, Adelson 1983).

    Each level but the last holds what the next coarser one lacks; the last is the image, blurred and made smaller.
    """
    levels = []
    sizes = level_sizes(*images.shape[2:])
    for _ in sizes[1:]:
        smaller = _blur(images)[:, :, ::2, ::2]
        spread = torch.zeros_like(images)
        spread[:, :, ::2, ::2] = smaller
        levels.append(images - 4 * _blur(spread))
        images = smaller
    return [*levels, images]


def _blur(images: Tensor) -> Tensor:
    """Filtered by the binomial kernel of 5x5; edges are mirrored."""
    channels = images.shape[1]
    kernel = images.new_tensor(BINOMIAL)
    padded = F.pad(images, (2, 2, 2, 2), mode="reflect")
    rows = F.conv2d(padded, kernel.view(1, 1, 5, 1).expand(channels, 1, 5, 1), groups=channels)
    return F.conv2d(rows, kernel.view(1, 1, 1, 5).expand(channels, 1, 1, 5), groups=channels)


def patches(images: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Patches of 7x7 of images uint8 [n, H, W, C], at places that are random but depend only on the number, int64 [n],
    of each image in its set -> float32 [n, levels, PATCHES, C, 49]."""
    n, channels = len(images), images.shape[3]
    levels = laplacian_pyramid(torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float())
    found = np.empty((n, len(levels), PATCHES, channels, SIDE * SIDE), np.float32)
    generators = group_generators(SEED, "patches", numbers)
    uniform = np.stack([generator.integers(2**63, size=(PATCHES, 2)) for generator in generators])
    for index, level in enumerate(levels):
        windows = np.lib.stride_tricks.sliding_window_view(level.numpy(), (SIDE, SIDE), axis=(2, 3))
        tops, lefts = (uniform % windows.shape[2:4]).transpose(2, 0, 1)
        picked = windows[np.arange(n)[:, None], :, tops, lefts]  # [n, PATCHES, C, 7, 7]
        found[:, index] = picked.reshape(n, PATCHES, channels, SIDE * SIDE)
    return found


def standardized(x: Tensor) -> Tensor:
    """Patches [N, P, C, 49] less the mean of their channel, over its deviation: brightness and contrast of a set do
    not count. A channel without any contrast is 0."""
    centered = x - x.mean((0, 1, 3), keepdim=True)
    deviation = centered.square().mean((0, 1, 3), keepdim=True).sqrt()
    return centered / torch.where(deviation > 0, deviation, 1.0)


def sliced_wasserstein(x: Tensor, y: Tensor, directions: int = DIRECTIONS) -> Estimate:
    """The mean, over random directions, of the Wasserstein-1 distance between the projections of patches x [N, P, D]
    and y [M, P, D] of N and M images; Karras et al. give a thousand times it.

    In one dimension the distance is the integral of |F - G| of the two distribution functions, and the mean over x less
    that over y of a potential with the slope -sign(F - G) (Kantorovich). To first order an image moves the distance by
    the mean potential of its patches, over N: the interval is by the delta method. It does not make up for the distance
    that finite samples of one source have: compare figures of equal counts.
    """
    random = np.random.RandomState(SEED).randn(directions, x.shape[2])
    axes = torch.from_numpy(random / np.linalg.norm(random, axis=1, keepdims=True)).to(x.dtype)
    total = 0.0
    moved_by_x = torch.zeros(len(x), dtype=torch.float64)
    moved_by_y = torch.zeros(len(y), dtype=torch.float64)
    for axis in axes:
        distance, of_x, of_y = _potential((x @ axis).double(), (y @ axis).double())
        total += distance
        moved_by_x += of_x.mean(1)
        moved_by_y += of_y.mean(1)
    squared_error = (moved_by_x / directions).var() / len(x) + (moved_by_y / directions).var() / len(y)
    return normal(total / directions, math.sqrt(float(squared_error)), least=0.0)


def _potential(x: Tensor, y: Tensor) -> tuple[float, Tensor, Tensor]:
    """Numbers x and y of any shapes -> (their Wasserstein-1 distance, the potential of each x, and of each y)."""
    values, order = torch.cat([x.flatten(), y.flatten()]).sort()
    ahead = torch.where(order < x.numel(), y.numel(), -x.numel()).cumsum(0)[:-1]  # (F - G) |x| |y|, a whole number
    gaps = values.diff()
    distance = float((ahead.abs() * gaps).sum()) / (x.numel() * y.numel())
    potential = torch.empty_like(values)
    potential[order] = F.pad((-ahead.sign() * gaps).cumsum(0), (1, 0))
    return distance, potential[: x.numel()].view_as(x), potential[x.numel() :].view_as(y)
