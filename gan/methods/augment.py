"""Random changes of images that gradients of any order pass through: translation, zoom, cutout, color and, where asked
for, left-right flips.

The policies of Zhao et al. 2020 (DiffAugment) and a zoom. Whatever D is shown the generator learns to make, so images
are flipped only where flipped ones belong to the data: mirrored digits do not.

A pixel's new place is a linear function of its old one in each axis, so flip, translation and zoom together are two
small matrix products, with bilinear interpolation and zeros (mid-gray) from outside.

The strength of adaptive augmentation is the probability with which each kind of change happens to an image. It rises
while D tells too many reals from fakes, which is how D's learning its few images by heart shows first, and else it
falls (Karras et al. 2020a, section 3).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gan.config import TrainConfig
from gan.draws import Draws

TRANSLATION, ZOOM, CUTOUT = 1 / 8, 0.2, 0.5  # shares of a side; ZOOM is the largest change of scale
NUMBERS = 9  # uniform numbers that an image's changes are made of
KINDS = 4  # of changes, each of which happens or does not: flip; translation and zoom; color; cutout
# Changes are learned by G, as if they belonged to the data, where images without them are too rare to tell which are
# the data: beyond a probability of about 0.8 (Karras et al. 2020a, section 2.2).
MOST = 0.8
LAG = 0.001  # how far the strength moves while the average of D's verdicts forgets half of what it was


def augment(images: Tensor, draws: Draws, purpose: str, flip: bool = False) -> Tensor:
    """Images [N, C, H, W] changed at random, by the draws of their coupling groups; the same shape.

    flip: also flip each left-right with probability 1/2. The other changes are the same with and without.
    """
    return change(images, _numbers(draws, purpose, flip).to(images))


def augment_some(images: Tensor, draws: Draws, purpose: str, flip: bool, strength: Tensor | float) -> Tensor:
    """The same, but each kind of change happens to an image with probability `strength`, 0-dim. An image to which none
    happens keeps every bit."""
    happens = draws.uniform(f"kinds of augmentation: {purpose}", KINDS).to(images) < strength
    return change(images, _numbers(draws, purpose, flip).to(images), happens)


def _numbers(draws: Draws, purpose: str, flip: bool) -> Tensor:
    u = draws.uniform(f"augmentation: {purpose}", NUMBERS)
    if not flip:
        u[:, 0] = 0.0
    return u


def change(images: Tensor, u: Tensor, happens: Tensor | None = None) -> Tensor:
    """images: [N, C, H, W], u: [N, NUMBERS] in [0, 1), which says what happens to each image -> changed images.

    The first number flips where it is at least 1/2. Two are the center of the box that is cut out. Of the others 1/2
    changes nothing, 0 and 1 the most. happens: bool [N, KINDS], which kinds do; all of them without it.
    """
    flip, down, right, zoom, top, left, bright, vivid, contrast = u.unbind(1)
    if happens is not None:
        flips, moves, colors, cuts = happens.unbind(1)
        flip = torch.where(flips, flip, 0.0)
        down, right, zoom = (torch.where(moves, number, 0.5) for number in (down, right, zoom))
    scale = (1 + ZOOM) ** (2 * zoom - 1)
    rows = resampling(images.shape[2], scale, TRANSLATION * (2 * down - 1), torch.zeros_like(flip))
    columns = resampling(images.shape[3], scale, TRANSLATION * (2 * right - 1), flip)
    moved = rows.unsqueeze(1) @ images @ columns.unsqueeze(1).mT
    if happens is None:
        return cut_out(recolor(moved, bright, vivid, contrast), top, left)
    # Selected, as changes by nothing would be rounded.
    images = _where((flip >= 0.5) | moves, moved, images)
    images = _where(colors, recolor(images, bright, vivid, contrast), images)
    return _where(cuts, cut_out(images, top, left), images)


def _where(chosen: Tensor, changed: Tensor, images: Tensor) -> Tensor:
    """The changed image where chosen [N], else the image as it was."""
    return torch.where(chosen.view(-1, 1, 1, 1), changed, images)


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


@dataclass(frozen=True)
class Augmentation:
    """One row: what is done to all images that D is shown."""

    # (images, draws, purpose, flip?, strength) -> images
    change: Callable[[Tensor, Draws, str, bool, Tensor | float], Tensor] | None
    strength: float = 0.0  # with which a run begins
    adaptive: bool = False  # does the strength follow D's verdicts? If not, it stays


AUGMENTATIONS = {  # rows of data.aug
    "none": Augmentation(None),
    "diff": Augmentation(lambda images, draws, purpose, flip, strength: augment(images, draws, purpose, flip), 1.0),
    "ada": Augmentation(augment_some, adaptive=True),
}


def adapt(state: Tensor, verdict: Tensor, config: TrainConfig) -> None:
    """Move the strength of augmentation by one step's share of 1 / data.aug_kimg, in place: up if D's verdicts on the
    recent reals are on average above data.aug_target, else down, within 0 and MOST.

    state: [2], the strength and that average, in which verdicts fade exponentially. verdict: 0-dim, the mean over the
    step's reals of 1 where D says real and -1 where it says fake.
    """
    if not AUGMENTATIONS[config.data.aug].adaptive:
        return
    pace = config.batch / (1000 * config.data.aug_kimg)
    strength, recent = state.unbind()
    recent.lerp_(verdict.to(recent.dtype), 1 - 0.5 ** (pace / LAG))
    strength.add_(pace * (recent - config.data.aug_target).sign()).clamp_(0, MOST)
