"""Pictures by a trained network, for several commands: grids, walks through latent space, PNG files."""

import base64
import io
import math
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np

from launch.outputs import output_file

if TYPE_CHECKING:
    import torch

    from gan.checkpoint import Snapshot

MOST_CELLS = 100_000  # images in a picture, or keyframes in a walk: more must be a typing error
MOST_PIXELS = 1 << 28  # in a picture
VISIBLE = 256  # pictures are enlarged until their shorter side has this many pixels


def labels_of(snapshot: "Snapshot", seeds: Sequence[int], class_: int | None) -> "torch.Tensor | None":
    """The class of each seed: `class_`, or the seed modulo the number of classes: int64 [N]. None if unconditional."""
    import torch

    if not snapshot.G.classes:
        return None
    if class_ is not None:
        return torch.full((len(seeds),), class_)
    return torch.tensor(seeds) % snapshot.G.classes


def check_cells(count: int) -> None:
    """Raises click.UsageError for more than MOST_CELLS images in one picture or walk."""
    if count > MOST_CELLS:
        raise click.UsageError(f"{count} images in one picture or walk are too many: at most {MOST_CELLS}; see --grid")


def check_pixels(height: int, width: int) -> None:
    """Raises click.UsageError for a picture that may not fit into memory."""
    if height * width > MOST_PIXELS:
        raise click.UsageError(f"a picture of {width}x{height} pixels is too large; see --grid and --scale")


def keyframe_seeds(seeds: list[int], cells: int, keyframes: int | None) -> list[list[int]]:
    """Give each cell the next `keyframes` seeds; after the last seed comes the first again. -> [cells][keyframes]."""
    check_cells(cells)
    if keyframes is None:
        if len(seeds) % cells:
            raise click.UsageError(
                f"{len(seeds)} --seeds cannot be divided equally among {cells} cells; see --grid, --num-keyframes"
            )
        keyframes = len(seeds) // cells
    check_cells(cells * keyframes)
    dealt = [seeds[index % len(seeds)] for index in range(cells * keyframes)]
    return [dealt[start : start + keyframes] for start in range(0, len(dealt), keyframes)]


def images_of_seeds(
    snapshot: "Snapshot", seeds: Sequence[int], class_: int | None, trunc: float
) -> Iterator[np.ndarray]:
    """Yield the image uint8 [H, W, C] of each seed, made batch by batch."""
    from gan.sampling import generate_batches, seed_latents, to_uint8

    G = snapshot.G
    z = seed_latents(seeds, G.z_dim)
    labels = labels_of(snapshot, seeds, class_)
    for batch in generate_batches(G, z, labels, stage=snapshot.stage, alpha=snapshot.alpha, trunc=trunc):
        yield from to_uint8(batch)


def grid_picture(
    snapshot: "Snapshot", seeds: Sequence[int], class_: int | None, trunc: float, columns: int
) -> np.ndarray:
    """The images of seeds, row by row: uint8 [H, W, C]."""
    from gan.sampling import GAP, tile

    height, width = (side + GAP for side in snapshot.images.size(snapshot.stage))
    rows = math.ceil(len(seeds) / columns)
    check_pixels(height * rows, width * columns)
    return tile(np.stack(list(images_of_seeds(snapshot, seeds, class_, trunc))), columns)


def walk(
    snapshot: "Snapshot",
    cells: list[list[int]],
    class_: int | None,
    trunc: float,
    columns: int,
    w_frames: int,
) -> Iterator[np.ndarray]:
    """Yield the frames uint8 [H, W, C] of a video in which each cell loops through its seeds [cells][keyframes]. Only a
    few frames are in memory at a time."""
    import torch

    from gan.sampling import batch_size, generate, latent_walk, seed_latents, tile, to_uint8

    G = snapshot.G
    keyframes = torch.stack([seed_latents(seeds, G.z_dim) for seeds in cells], 1)  # [K, cells, Z]
    labels = labels_of(snapshot, range(len(cells)), class_)
    latents = latent_walk(keyframes, w_frames)
    at_once = max(1, batch_size(G, snapshot.stage) // len(cells))
    while chunk := list(islice(latents, at_once)):
        y = None if labels is None else labels.repeat(len(chunk))
        images = generate(G, torch.cat(chunk), y, stage=snapshot.stage, alpha=snapshot.alpha, trunc=trunc)
        for frame in to_uint8(images).reshape(len(chunk), len(cells), *images.shape[2:], G.channels):
            yield tile(frame, columns)


def enlarge(picture: np.ndarray, scale: int | None) -> np.ndarray:
    """Repeat every pixel of [H, W, C] `scale` times each way; by default until the shorter side is VISIBLE."""
    scale = scale or math.ceil(VISIBLE / min(picture.shape[:2]))
    check_pixels(picture.shape[0] * scale, picture.shape[1] * scale)
    return picture.repeat(scale, axis=0).repeat(scale, axis=1)


def opaque(picture: np.ndarray) -> np.ndarray:
    """[H, W, 1 or 3 or 4] -> RGB [H, W, 3], transparency over white."""
    if picture.shape[2] == 4:
        alpha = picture[:, :, 3:] / 255
        picture = (picture[:, :, :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)
    return np.broadcast_to(picture, (*picture.shape[:2], 3))


def png_text(picture: np.ndarray) -> str:
    """uint8 [H, W, 1 or 3 or 4] -> a PNG in base64, which a web page shows at `data:image/png;base64,...`."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture).save(stream, "PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode()


def save_png(picture: np.ndarray, path: Path) -> None:
    """Write uint8 [H, W, 1 or 3 or 4] as a PNG, never half-written. Raises UserError if that is not possible."""
    from PIL import Image

    image = Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture)
    with output_file(path) as part:
        image.save(part)
