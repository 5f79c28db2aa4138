"""One image: from what Pillow opened to a uint8 pyramid."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from data.sources import quiet_pillow

if TYPE_CHECKING:
    from PIL.Image import Image

Size = tuple[int, int]  # (height, width)

MODES = {"L": 1, "RGB": 3, "RGBA": 4}  # channels of the modes that are stored, each able to hold those before it


def natural_mode(image: "Image | np.ndarray") -> str:
    """The smallest of MODES that holds an image, told from its header."""
    if isinstance(image, np.ndarray):
        return {3: "RGB", 4: "RGBA"}[image.shape[2]] if image.ndim == 3 else "L"
    if image.has_transparency_data:
        return "RGBA"
    return "L" if image.mode in ("1", "L", "F") or image.mode.startswith("I") else "RGB"


def decode(image: "Image | np.ndarray", mode: str) -> "Image | str":
    """The whole image, upright, in one of MODES; or the reason why it cannot be decoded."""
    from PIL import Image, ImageOps

    if isinstance(image, np.ndarray):
        return convert(Image.fromarray(image), mode)
    try:
        with quiet_pillow():
            image.load()
            return convert(ImageOps.exif_transpose(image), mode)
    except Exception as error:  # decoders meet bad bytes with nearly any exception
        return f"damaged: {error}"


def convert(image: "Image", mode: str) -> "Image":
    """An image of any Pillow mode in one of MODES. Transparency that the mode cannot hold is laid onto white."""
    from PIL import Image

    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.mode.startswith("I"):
        image = _from_16_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if mode != "RGBA":
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    elif image.mode not in ("1", "L"):
        image = image.convert("RGB")  # CMYK, palettes and other color spaces
    return image.convert(mode)


def _from_16_bits(image: "Image") -> "Image":
    """An 8-bit image from 16-bit gray, 65535 to 255 and rounded: Pillow's own conversion clips instead."""
    from PIL import Image

    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("32-bit pixels have no known range")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _resize(image: "Image", size: Size, box: tuple[int, int, int, int] | None = None) -> "Image":
    """`box` (left, top, right, bottom) of an image at `size`. Pillow premultiplies alpha, so no hidden color bleeds."""
    from PIL.Image import Resampling

    left, top, right, bottom = box or (0, 0, *image.size)
    larger = size[0] > bottom - top or size[1] > right - left
    return image.resize(size[::-1], Resampling.BICUBIC if larger else Resampling.LANCZOS, box)


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


def pyramid(top: np.ndarray, count: int) -> list[np.ndarray]:
    """The `count` largest levels of an image, smallest first: each half the size of the next; uint8 [H, W, C].

    A pixel k levels below the top is the mean of the 4**k top pixels it covers, rounded once, half up. With alpha
    (C = 4) color is weighted by alpha, so transparent pixels lend none; for opaque pixels that is the plain mean.
    """
    sums: np.ndarray = top.astype(np.uint32 if count <= 9 else np.uint64)  # 255 * 255 * 4**8 still fits 32 bits
    if top.shape[2] == 4:
        sums[..., :3] *= sums[..., 3:]
    levels = [top]
    for below in range(1, count):
        sums = sums[0::2] + sums[1::2]
        sums = sums[:, 0::2] + sums[:, 1::2]
        pixels = 4**below
        means = (sums + pixels // 2) // pixels
        if top.shape[2] == 4:
            alpha = np.maximum(sums[..., 3:], 1)
            means[..., :3] = (sums[..., :3] + alpha // 2) // alpha
        levels.append(means.astype(np.uint8))
    return levels[::-1]
