"""From seeds to pictures: latents, truncation, batches of samples, grids and closed walks through latent space."""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gan.errors import UserError
from gan.networks import size_at

Generator = Any  # a ResNetGenerator, or what looks like one: a VAE

MOST_SEEDS = 1_000_000  # more in one list must be a typing error
SEED_LIMIT = 2**32  # numpy's RandomState takes seeds below this
GAP = 2  # pixels between the images of a grid: without it, digits that fill their squares would touch


def parse_seeds(text: str) -> list[int]:
    """'0,1,4-6' -> [0, 1, 4, 5, 6]. UserError names the part that is not a seed or an ascending range of seeds."""
    seeds: list[int] = []
    for part in text.split(","):
        bounds = re.fullmatch(r"\s*(\d{1,10})\s*(?:-\s*(\d{1,10})\s*)?", part, re.ASCII)
        if not bounds:
            raise UserError(f"seeds '{text}': '{part.strip()}' is not a seed or a range; write for example 0,1,4-6")
        first = int(bounds[1])
        last = int(bounds[2] or bounds[1])
        if last < first or last >= SEED_LIMIT:
            raise UserError(f"seeds '{text}': '{part.strip()}' must ascend and stay below {SEED_LIMIT}")
        if len(seeds) + last - first >= MOST_SEEDS:
            raise UserError(f"seeds '{text}': '{part.strip()}' makes more than {MOST_SEEDS} seeds; ask for fewer")
        seeds.extend(range(first, last + 1))
    return seeds


def seed_latents(seeds: Sequence[int], z_dim: int) -> Tensor:
    """One latent per seed -> float32 [N, z_dim]: RandomState(seed).randn(1, z_dim), as in StyleGAN."""
    rows = [np.random.RandomState(seed).randn(1, z_dim) for seed in seeds]
    return torch.from_numpy(np.concatenate([np.empty((0, z_dim)), *rows]).astype(np.float32))


def batch_size(G: Generator, stage: int) -> int:
    """Images to make at a time: 256 small ones, 4 of 1024x1024. A layer's output then takes at most about 256 MB."""
    height, width = size_at(G.base, stage)
    return max(1, min(256, 2**22 // (height * width)))


def truncated(G: Generator, w: Tensor, labels: Tensor | None, trunc: float) -> Tensor:
    """w [N, F] moved toward its class's mean: mean + trunc (w - mean). Scaling z instead would have no effect, since
    pixel norm comes after it."""
    return w if trunc == 1 else torch.lerp(G.mean_first_layer(labels), w, trunc)


@torch.no_grad()
def generate_batches(
    G: Generator,
    z: Tensor,
    labels: Tensor | None = None,
    *,
    stage: int,
    alpha: float,
    trunc: float = 1.0,
    batch: int | None = None,
    check: bool = True,
) -> Iterator[Tensor]:
    """Yield images [n <= batch, C, H, W], about in [-1, 1], on G's device.

    z [N, Z]; labels int64 [N], None if unconditional. Raises UserError if the network makes values that are not finite;
    check: else they are left as they are.
    """
    device = next(G.parameters()).device
    batch = batch or batch_size(G, stage)
    for start in range(0, len(z), batch):
        part = slice(start, start + batch)
        y = None if labels is None else labels[part].to(device)
        w = truncated(G, G.first_layer(z[part].to(device), y), y, trunc)
        images = G.synthesize(w, stage, alpha)
        if check and not images.isfinite().all():
            raise UserError(
                "the network makes values that are not finite: its weights are damaged; use another snapshot"
            )
        yield images


def generate(
    G: Generator,
    z: Tensor,
    labels: Tensor | None = None,
    *,
    stage: int,
    alpha: float,
    trunc: float = 1.0,
    batch: int | None = None,
    check: bool = True,
) -> Tensor:
    """All images of `generate_batches` in one tensor [N, C, H, W] on the CPU."""
    batches = generate_batches(G, z, labels, stage=stage, alpha=alpha, trunc=trunc, batch=batch, check=check)
    return torch.cat([images.cpu() for images in batches])


def to_uint8(images: Tensor) -> np.ndarray:
    """[N, C, H, W] about in [-1, 1] -> uint8 [N, H, W, C]: round((x + 1) * 127.5), clipped."""
    levels = ((images.detach().float() + 1) * 127.5).round().clamp(0, 255)
    return levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def grid_columns(count: int) -> int:
    """Columns of the grid with the fewest empty cells for `count` images; of several such grids, the most square one.

    The grid is never higher than wide, and at most about four times as wide as high: 64 -> 8, 12 -> 4, 10 -> 5, 3 -> 3.
    """
    squarest = math.ceil(math.sqrt(count))
    return min(range(squarest, 2 * squarest + 1), key=lambda columns: -count % columns)


def tile(images: np.ndarray, columns: int, gap: int = GAP) -> np.ndarray:
    """[N, H, W, C] -> a grid [rows * (H + gap) - gap, columns * (W + gap) - gap, C], row by row; gaps are 0."""
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    cells = np.zeros((rows * columns, height + gap, width + gap, channels), images.dtype)
    cells[:count, :height, :width] = images
    grid = cells.reshape(rows, columns, height + gap, width + gap, channels).swapaxes(1, 2)
    whole = grid.reshape(rows * (height + gap), columns * (width + gap), channels)
    return whole[: len(whole) - gap, : whole.shape[1] - gap]


def catmull_rom(keyframes: Tensor, times: Tensor) -> Tensor:
    """The closed, continuously differentiable cubic curve through keyframes [K, ...] (Catmull, Rom 1974): its points at
    times [T], taken modulo K -> [T, ...]."""
    index = times.floor()
    t = (times - index).to(keyframes.dtype).reshape(-1, *[1] * (keyframes.dim() - 1))
    before, here, after, beyond = (keyframes[(index.long() + k) % len(keyframes)] for k in (-1, 0, 1, 2))
    slope = (after - before) / 2
    next_slope = (beyond - here) / 2
    value = (2 * t + 1) * (1 - t) ** 2 * here + t**2 * (3 - 2 * t) * after
    return value + t * (1 - t) ** 2 * slope + t**2 * (t - 1) * next_slope


def latent_walk(keyframes: Tensor, frames_per_keyframe: int) -> Iterator[Tensor]:
    """Yield the K * frames_per_keyframe latents [...] of a closed walk through keyframes [K, ...], one frame at a time.

    The walk is in z, not in the output of the first layer: then pixel norm puts every frame on the sphere of latents.
    """
    for frame in range(len(keyframes) * frames_per_keyframe):
        yield catmull_rom(keyframes, torch.tensor([frame / frames_per_keyframe], dtype=torch.float64))[0]
