"""Color profiles. All pixels are stored as sRGB: images with a profile of another color space are converted."""

import io
from collections.abc import Callable
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

CONVERTED = "converted to sRGB"
IGNORED = "color profile ignored: broken, or of another kind than the pixels"
TOLERANCE = 2  # of 255: a profile that changes no color by more is taken for sRGB itself

PIXELS = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}  # color space of a profile -> Pillow's mode
FITTING = {"L": ("GRAY", "RGB"), "RGB": ("RGB",), "CMYK": ("CMYK",)}  # kind of pixels -> color spaces of profiles

Convert = Callable[["Image"], "Image"]


def color_change(image: "Image") -> str | None:
    """What becomes of the colors of an image, told from its header: CONVERTED, IGNORED, or None for nothing."""
    found = _find_conversion(image)
    return CONVERTED if callable(found) else found


def to_srgb(image: "Image", original: "Image") -> "Image":
    """`image`, of mode L, RGB, RGBA or CMYK, as sRGB by the profile of the `original` that it was made of."""
    convert = _find_conversion(original)
    if not callable(convert):
        return image
    if image.mode != "RGBA":
        return convert(image)
    colors = convert(image.convert("RGB"))
    colors.putalpha(image.getchannel("A"))
    return colors


def _find_conversion(image: "Image") -> Convert | str | None:
    profile = image.info.get("icc_profile")
    if not profile:
        return None
    grey = image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I")
    kind = "L" if grey else image.mode
    return _conversion(profile, kind if kind in FITTING else "RGB")


@lru_cache(64)
def _conversion(profile: bytes, kind: str) -> Convert | str | None:
    """How pixels of a kind (key of FITTING) become sRGB; None if they are it already, IGNORED if it is not known."""
    from PIL import ImageCms

    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = opened.profile.xcolor_space.strip()
        if space not in FITTING[kind]:
            return IGNORED
        transform: Any = ImageCms.buildTransform(opened, _srgb(), PIXELS[space], "RGB")
        if space != "CMYK" and _changes_little(transform, PIXELS[space]):
            return None
    except Exception:  # Pillow tells a broken profile by several exceptions
        return IGNORED

    def convert(image: "Image") -> "Image":
        changed = transform.apply(image.convert(PIXELS[space]))
        return changed.convert("L") if image.mode == "L" else changed

    return convert


@cache
def _srgb() -> Any:
    from PIL import ImageCms

    return ImageCms.createProfile("sRGB")


def _changes_little(transform: Any, mode: str) -> bool:
    """Whether a transform leaves 729 colors from all over the cube, or all greys, as they are."""
    from PIL import Image

    steps = np.linspace(0, 255, 9).round().astype(np.uint8)
    colors = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3)
    before = Image.fromarray(colors if mode == "RGB" else np.arange(256, dtype=np.uint8)[None])
    after = transform.apply(before)
    difference = np.asarray(after).astype(int) - np.asarray(before.convert("RGB"))
    return bool(np.abs(difference).max() <= TOLERANCE)
