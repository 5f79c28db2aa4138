"""The pictures that a run saves beside its snapshots: grids of real and of generated images."""

from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from gan.files import replacing
from gan.sampling import generate, grid_columns, seed_latents, tile, to_uint8
from gan.state import Feed, Task, TrainState

GRID = 64  # most samples in a grid
MOST_PIXELS = 4_194_304  # in a grid: at high resolutions it has fewer samples, but at least FEWEST
FEWEST = 4


def fake_grid(state: TrainState, task: Task, stage: int, alpha: float) -> np.ndarray:
    """A grid by the averaged generator, for seeds 0, 1, 2, ... and the classes in turn -> uint8 [H, W, C]."""
    G = state.networks[task.family.average]
    count = grid_count(task)
    labels = torch.arange(count) % G.classes if G.classes else None
    z = seed_latents(range(count), G.z_dim)
    images = generate(G, z, labels, stage=stage, alpha=alpha, check=False)  # the run itself looks for such values
    return tile(to_uint8(images), grid_columns(count))


def real_grid(task: Task, feed: Feed) -> np.ndarray:
    """A grid of the first real images of the run -> uint8 [H, W, C]."""
    count = grid_count(task)
    with closing(feed(iter([(0, count, task.schedule.last)]))) as batches:
        images, _ = next(batches)
        return tile(images, grid_columns(count))


def grid_count(task: Task) -> int:
    """The number of images in a grid of this run."""
    height, width = task.images.size(task.schedule.last)
    return int(min(max(MOST_PIXELS // (height * width), FEWEST), GRID))


def save_image(path: Path, image: np.ndarray) -> None:
    """Write uint8 [H, W, C] as a PNG. A PNG has 1, 3 or 4 channels: of 2 channels it gets the first, of more the first
    three."""
    channels = image.shape[2]
    if channels not in (1, 3, 4):
        channels = 3 if channels > 3 else 1
    pixels = image[:, :, 0] if channels == 1 else image[:, :, :channels]
    with replacing(path) as part:
        Image.fromarray(pixels).save(part, "PNG")
