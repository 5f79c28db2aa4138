"""Images made to fit one size, and their pyramids of smaller levels."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from data.sizes import Size

if TYPE_CHECKING:
    from PIL.Image import Image


def _resize(image: "Image", size: Size, box: tuple[int, int, int, int] | None = None) -> "Image":
    """`box` (left, top, right, bottom) of an image at `size`, hidden color never bleeding.

    A box that is 2**k times as large becomes its exact area means, which alias less than LANCZOS rings and cost less.
    """
    from PIL.Image import Resampling

    left, top, right, bottom = box or (0, 0, *image.size)
    height, width = bottom - top, right - left
    factor = height // size[0]
    if factor and factor & (factor - 1) == 0 and (height, width) == (size[0] * factor, size[1] * factor):
        whole = (left, top, right, bottom) == (0, 0, *image.size)
        return _shrink(image if whole else image.crop((left, top, right, bottom)), factor)
    larger = size[0] > height or size[1] > width
    return image.resize(size[::-1], Resampling.BICUBIC if larger else Resampling.LANCZOS, box)


def _shrink(image: "Image", factor: int) -> "Image":
    """The means of factor x factor blocks (a power of two), rounded half up, color weighted by alpha."""
    from PIL import Image

    if factor == 1:
        return image
    if image.mode != "RGBA":
        return image.reduce(factor)  # exact for powers of two; with alpha it would round twice
    pixels = np.asarray(image)
    if factor == 2:
        return Image.fromarray(_halve(pixels))
    return Image.fromarray(pyramid(pixels[None], factor.bit_length())[0][0])


def _halve(top: np.ndarray) -> np.ndarray:
    """The next level below uint8 [H, W, 4], as `pyramid` has it, in half the time for images that are mostly opaque.

    Each 64-bit word is two pixels side by side; its even and odd bytes, taken apart, have 16 bits each to be added in.
    """
    height, width, _ = top.shape
    words = top.reshape(height, 4 * width).view("<u8")
    sums = []
    for lane in (words, words >> np.uint64(8)):
        lane = lane & np.uint64(0x00FF00FF00FF00FF)
        lane = lane[0::2] + lane[1::2]
        lane += lane >> np.uint64(32)
        sums.append(lane)  # the lower half: of red and blue, or of green and alpha
    even, odd = ((lane + np.uint64(0x00020002)) >> np.uint64(2) & np.uint64(0x00FF00FF) for lane in sums)
    means = (even | odd << np.uint64(8)).astype("<u4")
    alpha = (sums[1] >> np.uint64(16)).astype(np.uint16)
    means[alpha == 0] = 0
    level = means.view(np.uint8).reshape(height // 2, width // 2, 4)
    mixed = np.flatnonzero((alpha != 0) & (alpha != 4 * 255))  # here colors weigh differently
    rows, columns = np.divmod(mixed, width // 2)
    blocks = top.reshape(height // 2, 2, width // 2, 2, 4)[rows, :, columns].reshape(-1, 4, 4).astype(np.uint32)
    first, second, third, fourth = (blocks[:, pixel, :3] * blocks[:, pixel, 3:] for pixel in range(4))
    weights = alpha[rows, columns, None].astype(np.uint32)
    level[rows, columns, :3] = (2 * (first + second + third + fourth) + weights) // (2 * weights)
    return level


def center_crop(image: "Image", size: Size) -> "Image":
    """The largest centered part that has the shape of `size`, resized."""
    width, height = image.size
    crop_height = min(height, max(1, round(width * size[0] / size[1])))
    crop_width = min(width, max(1, round(height * size[1] / size[0])))
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return _resize(image, size, (left, top, left + crop_width, top + crop_height))


def stretch(image: "Image", size: Size) -> "Image":
    """The whole image, resized without regard to its shape."""
    return _resize(image, size)


def pad(image: "Image", size: Size) -> "Image":
    """The whole image, resized to fit and centered on black, or on full transparency if it has alpha."""
    from PIL import Image

    scale = min(size[0] / image.height, size[1] / image.width)
    inner = max(1, round(image.height * scale)), max(1, round(image.width * scale))
    canvas = Image.new(image.mode, size[::-1])
    canvas.paste(_resize(image, inner), ((size[1] - inner[1]) // 2, (size[0] - inner[0]) // 2))
    return canvas


TRANSFORMS: dict[str, Callable[["Image", Size], "Image"]] = {
    "center-crop": center_crop,
    "stretch": stretch,
    "pad": pad,
}


def pyramid(tops: np.ndarray, count: int) -> list[np.ndarray]:
    """The `count` largest levels of images [n, H, W, C], smallest first, each half the size of the next; all uint8.

    A pixel k levels below the top is the mean of the 4**k top pixels it covers, rounded once, half up. With alpha
    (C = 4) color is weighted by alpha, so transparent pixels lend none; for opaque pixels that is the plain mean.
    """
    planes = np.moveaxis(tops, -1, 0).astype(np.uint16, order="C")  # [C, n, H, W]: numpy then adds whole rows
    sums, weighted = (planes[3:], planes[:3] * planes[3:]) if len(planes) == 4 else (planes, None)  # 255 * 255 fits
    levels = [tops]
    for below in range(1, count):
        sums = _add_quads(sums, 255 << 2 * below)
        means = (sums + sums.dtype.type(1 << 2 * below - 1)) >> sums.dtype.type(2 * below)
        level = np.empty((*means.shape[1:], len(planes)), np.uint8)
        level[..., -len(means) :] = np.moveaxis(means, 0, -1)
        if weighted is not None:
            weighted = _add_quads(weighted, 255 * 255 << 2 * below)
            level[..., :3] = np.moveaxis(_round_ratio(weighted, sums, below), 0, -1)
        levels.append(level)
    return levels[::-1]


def _add_quads(sums: np.ndarray, largest: int) -> np.ndarray:
    """Sums of 2x2 blocks of [..., H, W], in the smallest type that holds `largest`."""
    rows = np.add(
        sums[..., 0::2, :], sums[..., 1::2, :], dtype=np.promote_types(np.uint16, np.min_scalar_type(largest))
    )
    return rows[..., 0::2] + rows[..., 1::2]


def _round_ratio(weighted: np.ndarray, weights: np.ndarray, below: int) -> np.ndarray:
    """weighted / weights in [0, 255], rounded half up; 0 where the weight, at most 255 * 4**below, is 0.

    (2 weighted + weight) / (2 weight) is at least 1 / (2 weight) away from the integer above it, more than the division
    is wrong: by 2**-16 in float32, whose 24 bits hold the numerator as well, as long as below <= 3.
    """
    weight = np.maximum(weights, 1).astype(np.float32 if below <= 3 else np.float64)
    ratio = weighted.astype(weight.dtype)
    ratio *= 2
    ratio += weight
    weight *= 2
    ratio /= weight
    return ratio  # stored as uint8, which cuts off the fraction
