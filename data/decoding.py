"""From what Pillow opened, or an array, to pixels in one of the modes that are stored."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from data.colors import to_srgb
from data.image_files import quiet_pillow

if TYPE_CHECKING:
    from PIL.Image import Image

ORIENTATION = 0x0112  # EXIF
# Its value -> what brings the image upright. (ImageOps.exif_transpose writes all tags anew too, and fails at odd ones.)
TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}

MODES = {"L": 1, "RGB": 3, "RGBA": 4}  # channels of the modes that are stored, each able to hold those before it

# A PNG may name one color that is transparent, in the depth of the file, which Pillow does not bring to 8 bits for
# these raw modes.
TRANSPARENT_KEYS: dict[str, Callable[[Any], Any]] = {
    "1": lambda grey: 255 * bool(grey),
    "L;2": lambda grey: grey * 85,
    "L;4": lambda grey: grey * 17,
    "RGB;16B": lambda color: tuple(channel >> 8 for channel in color),
}


def natural_mode(image: "Image | np.ndarray") -> str:
    """The smallest of MODES that holds an image, told from its header."""
    if isinstance(image, np.ndarray):
        return {3: "RGB", 4: "RGBA"}[image.shape[2]] if image.ndim == 3 else "L"
    return "RGBA" if image.has_transparency_data else _opaque_mode(image)


def needed_mode(image: "Image | np.ndarray") -> str:
    """The smallest of MODES that holds an image: if its header claims transparency, it is decoded to look for some."""
    claimed = natural_mode(image)
    if claimed == "RGBA" and not _is_transparent(image):
        return _opaque_mode(image)
    return claimed


def _opaque_mode(image: "Image | np.ndarray") -> str:
    if isinstance(image, np.ndarray):
        return "RGB"
    return "L" if image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I") else "RGB"


def _is_transparent(image: "Image | np.ndarray") -> bool:
    """Whether a pixel is; not if the image cannot be decoded."""
    decoded = decode(image, "RGBA")
    return not isinstance(decoded, str) and decoded.getchannel("A").getextrema() != (255, 255)


def decode(image: "Image | np.ndarray", mode: str) -> "Image | str":
    """The whole image, upright and in sRGB, in one of MODES; or the reason why it cannot be decoded."""
    from PIL import Image

    if isinstance(image, np.ndarray):
        return convert(Image.fromarray(image), mode)
    try:
        with quiet_pillow():
            _scale_transparent_key(image)
            image.load()
            turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
            return convert(image.transpose(Image.Transpose[turn]) if turn else image, mode)
    except Exception as error:  # decoders meet bad bytes with nearly any exception
        return f"damaged: {error}"


def _scale_transparent_key(image: "Image") -> None:
    """Give the transparent color of a PNG the depth that its pixels will have. Nothing once they are loaded."""
    key = image.info.get("transparency")
    tile = getattr(image, "tile", None)
    if image.format != "PNG" or key is None or not tile:
        return
    scale = TRANSPARENT_KEYS.get(str(tile[0].args))
    if scale is not None:
        image.info["transparency"] = scale(key)


def convert(image: "Image", mode: str) -> "Image":
    """An image of any Pillow mode in one of MODES, in sRGB. Transparency that it cannot hold is laid onto white."""
    from PIL import Image

    original = image
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.mode.startswith("I"):
        image = _from_16_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
    elif image.mode == "1":
        image = image.convert("L")
    elif image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("RGB")  # palettes and other color spaces
    image = to_srgb(image, original)
    if image.mode == "RGBA" and mode != "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode == "CMYK":
        image = image.convert("RGB")
    return image if image.mode == mode else image.convert(mode)


def _from_16_bits(image: "Image") -> "Image":
    """An 8-bit image from 16-bit gray, 65535 to 255 and rounded: Pillow's own conversion clips instead."""
    from PIL import Image

    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("32-bit pixels have no known range")
    gray = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    key = image.info.get("transparency")
    if key is not None:
        alpha = Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))
        return Image.merge("LA", (gray, alpha))
    return gray
