"""Small dataset files for tests: random pyramids, which the store does not mind."""

import numpy as np

from data.encodings import encode_image
from data.store_writer import StoreWriter

COUNT, LEVELS = 25, (0, 1, 2)


def images(count=COUNT, channels=3):
    """Random pyramids (the store does not care that they are none): one list of [h, w, C] per image."""
    random = np.random.default_rng(0)
    return [[random.integers(0, 256, (4 << k, 8 << k, channels), np.uint8) for k in LEVELS] for _ in range(count)]


def build(path, pyramids=None, labels=True, encoding="raw"):
    with StoreWriter(path, "test", "RGB") as writer:
        for index, pyramid in enumerate(pyramids or images()):
            add(writer, pyramid, index % 3 if labels else None, encoding)
        return finish(writer, classes=("a", "b", "c") if labels else None, encoding=encoding)


def add(writer, pyramid, label=None, encoding="raw"):
    values, digest = encode_image(pyramid, encoding)
    writer.add(1, LEVELS, [values], [digest], [label])


def finish(writer, **fields):
    common = {"channels": 3, "base": (4, 8), "levels": LEVELS, "encoding": "raw", "lossy": False, "transform": "pad"}
    return writer.finish(**common | {"classes": None, "label_dim": None, "source": "test"} | fields)
