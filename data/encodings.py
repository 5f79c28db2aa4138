"""How the pixels of one image become the bytes of a record, and come back."""

import hashlib
import io
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

CRC_BYTES = 4
MODE_OF_CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}  # of Pillow


@dataclass(frozen=True)
class Encoding:
    """One way to store uint8 [H, W, C]."""

    encode: Callable[[np.ndarray], bytes]
    decode: Callable[[memoryview, tuple[int, int, int]], np.ndarray]  # may be a view; ValueError if damaged
    lossless: bool = True
    channels: tuple[int, ...] = tuple(MODE_OF_CHANNELS)
    max_side: int = 1 << 16
    plain: bool = False  # the bytes are the pixels in C order, and a reader may copy them as they are


def _by_pillow(format: str, options: dict[str, Any], **row: Any) -> Encoding:
    """A row whose coder is one of Pillow's."""

    def encode(pixels: np.ndarray) -> bytes:
        from PIL import Image

        stream = io.BytesIO()
        Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(stream, format, **options)
        return stream.getvalue()

    def decode(payload: memoryview, shape: tuple[int, int, int]) -> np.ndarray:
        from PIL import Image

        try:
            with Image.open(io.BytesIO(payload), formats=(format,)) as image:
                if image.size != (shape[1], shape[0]):
                    raise ValueError(f"it is {image.height}x{image.width}")
                # WebP gives gray back as RGB, and opaque RGBA too; both conversions are exact.
                return np.asarray(image.convert(MODE_OF_CHANNELS[shape[2]])).reshape(shape)
        except Exception as error:  # decoders meet bad bytes with nearly any exception
            raise ValueError(f"not a whole {format} of its size: {error}") from error

    return Encoding(encode, decode, **row)


ENCODINGS = {
    "raw": Encoding(
        np.ndarray.tobytes, lambda payload, shape: np.frombuffer(payload, np.uint8).reshape(shape), plain=True
    ),
    # Method 0 is nine times as fast as PNG at like size; `exact` keeps the color of transparent pixels.
    "webp": _by_pillow("WEBP", options={"lossless": True, "method": 0, "quality": 0, "exact": True}, max_side=16383),
    "png": _by_pillow("PNG", options={"compress_level": 1}),
    "jpeg": _by_pillow("JPEG", options={"quality": 95, "subsampling": 0}, lossless=False, channels=(1, 3)),
}


def with_crc(payload: bytes) -> bytes:
    """A stored value: the payload and its checksum."""
    return payload + zlib.crc32(payload).to_bytes(CRC_BYTES, "little")


def without_crc(value: bytes) -> bytes:
    """The payload of a stored value. ValueError if it is not what its checksum says."""
    payload = value[:-CRC_BYTES]
    crc = value[-CRC_BYTES:]
    if zlib.crc32(payload).to_bytes(CRC_BYTES, "little") != crc:
        raise ValueError("its checksum differs")
    return payload


def for_key(key: bytes, value: bytes | memoryview) -> bytes:
    """A value of `with_crc` with the checksum that it has under a key: the payload's XOR the key's, so that a record
    in the place of another one is found."""
    crc = int.from_bytes(value[-CRC_BYTES:], "little") ^ zlib.crc32(key)
    return b"".join((value[:-CRC_BYTES], crc.to_bytes(CRC_BYTES, "little")))


def encode_image(pyramid: Sequence[np.ndarray], encoding: str) -> tuple[list[bytes], bytes]:
    """(the stored value of every level, SHA-256 of the pixels that the last one decodes to) of uint8 [H, W, C] each."""
    row = ENCODINGS[encoding]
    top = pyramid[-1]
    values = [with_crc(row.encode(level)) for level in pyramid]
    if not row.lossless:
        top = row.decode(memoryview(values[-1])[:-CRC_BYTES], top.shape)
    return values, hashlib.sha256(np.ascontiguousarray(top).data).digest()


class ContentHash:
    """The hash of a dataset, which does not depend on how it is stored, fed image by image.

    h starts as 32 zero bytes; an image makes it SHA-256(h + SHA-256(top-level pixels)); the end is SHA-256(h + labels).
    """

    def __init__(self, state: bytes = bytes(32)) -> None:
        self.state = state

    def add(self, digest: bytes) -> None:
        """One more image, whose top-level pixels have this SHA-256."""
        self.state = hashlib.sha256(self.state + digest).digest()

    def finish(self, labels: bytes = b"") -> str:
        """Hexadecimal hash of all images and of the labels as they are stored."""
        return hashlib.sha256(self.state + labels).hexdigest()
