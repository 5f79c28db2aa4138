"""Random changes of images that gradients of any order pass through: translation, zoom, cutout, color and, where asked
for, left-right flips.

The policies of Zhao et al. 2020 (DiffAugment) and a zoom. Whatever D is shown the generator learns to make, so images
are flipped only where flipped ones belong to the data: mirrored digits do not.

A pixel's new place is a linear function of its old one in each axis, so flip, translation and zoom together are two
small matrix products, with bilinear interpolation and zeros (mid-gray) from outside.
"""

import torch
from torch import Tensor

from gan.draws import Draws

TRANSLATION, ZOOM, CUTOUT = 1 / 8, 0.2, 0.5  # shares of a side; ZOOM is the largest change of scale
NUMBERS = 9  # uniform numbers that an image's changes are made of


def augment(images: Tensor, draws: Draws, purpose: str, flip: bool = False) -> Tensor:
    """Images [N, C, H, W] changed at random, by the draws of their coupling groups; the same shape.

    flip: also flip each left-right with probability 1/2. The other changes are the same with and without.
    """
    u = draws.uniform(f"augmentation: {purpose}", NUMBERS)
    if not flip:
        u[:, 0] = 0.0
    return change(images, u.to(images))


def change(images: Tensor, u: Tensor) -> Tensor:
    """images: [N, C, H, W], u: [N, NUMBERS] in [0, 1), which says what happens to each image -> changed images.

    The first number flips where it is at least 1/2. Two are the center of the box that is cut out. Of the others 1/2
    changes nothing, 0 and 1 the most.
    """
    flip, down, right, zoom, top, left, bright, vivid, contrast = u.unbind(1)
    scale = (1 + ZOOM) ** (2 * zoom - 1)
    rows = resampling(images.shape[2], scale, TRANSLATION * (2 * down - 1), torch.zeros_like(flip))
    columns = resampling(images.shape[3], scale, TRANSLATION * (2 * right - 1), flip)
    images = rows.unsqueeze(1) @ images @ columns.unsqueeze(1).mT
    return cut_out(recolor(images, bright, vivid, contrast), top, left)


def resampling(side: int, scale: Tensor, shift: Tensor, flip: Tensor) -> Tensor:
    """Matrices [N, side, side] that zoom by `scale` about the middle, move by `shift` sides, mirror where flip >= 1/2.

    Row i holds the bilinear weights of the source pixels of target pixel i.
    """
    pixels = torch.arange(side, dtype=scale.dtype, device=scale.device)
    middle = (side - 1) / 2
    mirror = torch.where(flip < 0.5, 1.0, -1.0).view(-1, 1)
    source = (pixels - middle - side * shift.view(-1, 1)) * mirror / scale.view(-1, 1) + middle
    return (1 - (source.unsqueeze(2) - pixels).abs()).clamp(min=0)


def recolor(images: Tensor, bright: Tensor, vivid: Tensor, contrast: Tensor) -> Tensor:
    """Brightness by +-1/2, saturation by a factor in [0, 2), contrast by one in [1/2, 3/2); each of [N] in [0, 1)."""
    bright, vivid, contrast = (x.view(-1, 1, 1, 1) for x in (bright, vivid, contrast))
    images = images + bright - 0.5
    gray = images.mean(1, keepdim=True)
    images = gray + (images - gray) * 2 * vivid
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (images - mean) * (contrast + 0.5)


def cut_out(images: Tensor, top: Tensor, left: Tensor) -> Tensor:
    """Zero a box of half the sides, its center anywhere; top, left: [N] in [0, 1)."""
    keep = []
    for side, place in ((images.shape[2], top), (images.shape[3], left)):
        pixels = torch.arange(side, dtype=images.dtype, device=images.device) + 0.5
        keep.append((pixels - side * place.view(-1, 1)).abs() >= side * CUTOUT / 2)
    outside = keep[0].unsqueeze(2) | keep[1].unsqueeze(1)
    return images * outside.unsqueeze(1)
