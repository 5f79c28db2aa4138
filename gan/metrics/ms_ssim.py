"""Multi-scale structural similarity of pairs of images (Wang, Simoncelli, Bovik 2003).

It is near 1 for a generator that makes one image again and again (Odena et al. 2017).
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW = 11
SIGMA = 1.5  # pixels, of the Gaussian window
WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of the scales, the finest first
C1 = (0.01 * 255) ** 2
C2 = (0.03 * 255) ** 2
CHUNK = 100


def ms_ssim(x: Tensor, y: Tensor) -> Tensor:
    """Similarities of images [n, C, H, W] with values from 0 to 255, pair by pair -> [n], in [0, 1].

    Of the paper's five scales those are used where the window fits; their weights are divided by their sum. Images
    smaller than the window have one scale, and a window of their size.
    """
    sides = [min(x.shape[2:]) // 2**scale for scale in range(len(WEIGHTS))]
    weights = [weight for weight, side in zip(WEIGHTS, sides, strict=True) if side >= WINDOW] or [1.0]
    window = _window(min(WINDOW, *x.shape[2:]), x)
    product = torch.ones(len(x), dtype=x.dtype)
    for scale, weight in enumerate(weights):
        if scale:
            x = F.avg_pool2d(x, 2)
            y = F.avg_pool2d(y, 2)
        whole, contrast = _similarity(x, y, window)
        last = scale == len(weights) - 1
        product = product * (whole if last else contrast).clamp(min=0) ** (weight / sum(weights))
    return product


def _window(side: int, like: Tensor) -> Tensor:
    places = torch.arange(side, dtype=like.dtype) - (side - 1) / 2
    weights = (-(places**2) / (2 * SIGMA**2)).exp()
    return weights / weights.sum()


def _similarity(x: Tensor, y: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
    """(SSIM, its factor of contrast and structure), each the mean over pixels and channels: [n], [n]."""
    mean_x, mean_y, xx, yy, xy = (_weighted(part, window) for part in (x, y, x * x, y * y, x * y))
    contrast = (2 * (xy - mean_x * mean_y) + C2) / (xx - mean_x**2 + yy - mean_y**2 + C2)
    brightness = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    return (brightness * contrast).mean((1, 2, 3)), contrast.mean((1, 2, 3))


def _weighted(images: Tensor, window: Tensor) -> Tensor:
    """The means of images over the window, wherever it fits."""
    n, channels = images.shape[:2]
    flat = images.reshape(n * channels, 1, *images.shape[2:])
    means = F.conv2d(F.conv2d(flat, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))
    return means.view(n, channels, *means.shape[2:])


def similarities(images: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Of the pairs int64 [n, 2] of rows of images uint8 [N, H, W, C] -> float64 [n]."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    parts = [
        ms_ssim(*(pixels[part[:, side]].double() for side in (0, 1)))
        for part in np.array_split(pairs, -(-len(pairs) // CHUNK))
    ]
    return torch.cat(parts).numpy()
