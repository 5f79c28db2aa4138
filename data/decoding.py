"""From what Pillow opened, or an array, to pixels in one of the modes that are stored."""

from typing import TYPE_CHECKING

import numpy as np

from data.image_files import quiet_pillow

if TYPE_CHECKING:
    from PIL.Image import Image

ORIENTATION = 0x0112  # EXIF

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
            if image.getexif().get(ORIENTATION, 1) != 1:
                image = ImageOps.exif_transpose(image)
            return convert(image, mode)
    except Exception as error:  # decoders meet bad bytes with nearly any exception
        return f"damaged: {error}"


def convert(image: "Image", mode: str) -> "Image":
    """An image of any Pillow mode in one of MODES. Transparency that the mode cannot hold is laid onto white."""
    from PIL import Image

    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.mode.startswith("I"):
        image = _from_16_bits(image)
    if image.mode == mode and "transparency" not in image.info:
        return image
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
