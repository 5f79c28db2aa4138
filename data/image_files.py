"""Which files are images, and how the bytes of one become an opened image."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

COMMON = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")  # formats that are tried first
# Not images: EPS is a program that Pillow would run Ghostscript for; of MPEG it knows the size alone.
REFUSED = ("EPS", "MPEG", "WMF")
WHOLE = ("MPO", "PSD")  # in these the first frame is the image, and the others are its parts or small copies


@cache
def formats() -> tuple[str, ...]:
    """The formats that the installed Pillow decodes: what the content of an image file may be, whatever its name."""
    from PIL import Image, ImageFile

    Image.init()
    stubs = [name for name, (opener, _) in Image.OPEN.items() if opener in ImageFile.StubImageFile.__subclasses__()]
    decoded = [name for name in Image.OPEN if name not in (*stubs, *REFUSED)]
    return tuple(sorted(decoded, key=lambda name: COMMON.index(name) if name in COMMON else len(COMMON)))


@cache
def suffixes() -> frozenset[str]:
    """How the names of image files end, in lower case."""
    from PIL import Image

    readable = {*formats(), *WHOLE}
    return frozenset(suffix for suffix, format in Image.registered_extensions().items() if format in readable)


def claims_image(name: str) -> bool:
    """Whether a file name ends as those of images do."""
    return os.path.splitext(name)[1].lower() in suffixes()


def open_image(stream: IO[bytes]) -> "Image | str":
    """The image in a stream, its header read, or the reason why there is none to be had."""
    from PIL import Image

    if stream.seek(0, os.SEEK_END) == 0:
        return "empty file"
    stream.seek(0)
    try:
        with quiet_pillow():
            image = Image.open(stream, formats=formats())
            animated = getattr(image, "is_animated", False) and image.format not in WHOLE
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
