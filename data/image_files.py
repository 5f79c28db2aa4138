"""Which files are images, and how the bytes of one become an opened image."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # what the content of a file must be, whatever its name


def claims_image(name: str) -> bool:
    """Whether a file name ends as those of images do."""
    return PurePosixPath(name).suffix.lower() in SUFFIXES


def open_image(stream: IO[bytes]) -> "Image | str":
    """The image in a stream, its header read, or the reason why there is none to be had."""
    from PIL import Image

    if stream.seek(0, os.SEEK_END) == 0:
        return "empty file"
    stream.seek(0)
    try:
        with quiet_pillow():
            image = Image.open(stream, formats=FORMATS)
            # A phone's JPEG may carry a second picture (MPO); the first is the photo.
            animated = getattr(image, "is_animated", False) and image.format != "MPO"
        return "more than one frame" if animated else image
    except Image.UnidentifiedImageError:
        return "not an image"
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        return f"more than {Image.MAX_IMAGE_PIXELS} pixels"
    except Exception as error:  # decoders meet bad bytes with nearly any exception
        return f"damaged: {error}"


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Within: an image so large that it may be an attack is an error; Pillow's other remarks are not shown."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield
