"""The built-in sources: scikit-learn's digits, and three images of a labeled set stacked as red, green and blue."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from data.decoding import decode, needed_mode
from data.errors import DataError
from data.items import Item, Source, array_source
from data.kinds import Kind, Turn
from data.labels import labels_from_array
from data.sources import open_source

STACKED = "stacked-digits"
STACKING = f"{STACKED}:"  # followed by the source that is stacked
STACKED_COUNT = 50_000
STACKED_KEY = 0
MAX_CLASSES = 10  # of a set to be stacked: 1000 modes
MAX_BYTES = 1 << 30  # of a set to be stacked, which is held in memory


def digit_scans() -> tuple[np.ndarray, np.ndarray]:
    """The 1797 scanned digits of scikit-learn: uint8 [N, 8, 8] and labels int [N]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("the digits come with scikit-learn, which is missing: pip install scikit-learn") from error
    digits = load_digits()
    sixteenths = digits.data.astype(np.int64).reshape(-1, 8, 8)  # 0..16
    return ((sixteenths * 255 + 8) // 16).astype(np.uint8), digits.target


def open_digits(source: str, max_images: int | None) -> Source:
    """The source called `digits`: grey 8x8, ten classes."""
    images, targets = digit_scans()
    labels = labels_from_array(source, targets, len(images), [str(digit) for digit in range(10)])
    return array_source(source, images, labels, max_images, item="digit")


def open_stacked_digits(source: str, max_images: int | None) -> Source:
    """The source called `stacked-digits`: three digits each, labeled 100 a + 10 b + c."""
    return _stack(source, *digit_scans(), classes=10, max_images=max_images)


def open_stacked(source: str, max_images: int | None) -> Source:
    """The source called `stacked-digits:SOURCE`, of another with K <= 10 classes: labels K² a + K b + c.

    DataError if that has no classes, or more, or images that are not grey and of one size.
    """
    of = open_source(source.removeprefix(STACKING))
    if of.classes is None or len(of.classes) > MAX_CLASSES:
        held = "no classes" if of.classes is None else f"{len(of.classes)} classes"
        raise DataError(f"{of.name} has {held}: to be stacked a source needs from 1 to {MAX_CLASSES}")
    images, labels = _load_grey(of)
    stacked = _stack(STACKING + of.name, images, labels, classes=len(of.classes), max_images=max_images)
    return replace(stacked, files=of.files)


def _load_grey(source: Source) -> tuple[np.ndarray, np.ndarray]:
    """All images of a source, uint8 [N, H, W], and labels, int [N]."""
    images: list[np.ndarray] = []
    labels = []
    for name, image, label in source.read():
        if not isinstance(image, str):
            image = decode(image, "L") if needed_mode(image) == "L" else "it has color, and only grey can be stacked"
        if isinstance(image, str):
            raise DataError(f"{name} of {source.name}: {image}")
        images.append(np.asarray(image))
        labels.append(label)
        if images[-1].shape != images[0].shape:
            raise DataError(f"{name} of {source.name}: images of different sizes cannot be stacked")
        if images[0].nbytes * len(images) > MAX_BYTES:
            raise DataError(f"{source.name} has more than {MAX_BYTES >> 30} GB of pixels: it cannot be stacked")
    return np.stack(images), np.array(labels)


def stacked_choice(index: int, length: int) -> list[int]:
    """Which three of `length` images image `index` of stacked digits stacks (red, green, blue)."""
    return [int(raw % length) for raw in np.random.Philox(key=STACKED_KEY, counter=index).random_raw(3)]


def _stack(name: str, images: np.ndarray, labels: np.ndarray, classes: int, max_images: int | None) -> Source:
    count = max_images or STACKED_COUNT

    def read(start: int = 0, stop: int | None = None) -> Iterator[Item]:
        for index in range(*slice(start, stop).indices(count)):
            chosen = stacked_choice(index, len(images))
            first, second, third = (int(label) for label in labels[chosen])
            label = (first * classes + second) * classes + third
            yield Item(f"stack {index}", np.moveaxis(images[chosen], 0, -1), label)

    numbers = [str(number) for number in range(classes)]
    return Source(name, count, tuple(a + b + c for a in numbers for b in numbers for c in numbers), read)


KINDS = (
    Kind("digits", "1797 scans of 8x8 from scikit-learn, ten classes", Turn.NAME, "digits".__eq__, open_digits),
    Kind(STACKED, "three of them as red, green and blue, 1000 classes", Turn.NAME, STACKED.__eq__, open_stacked_digits),
    Kind(
        f"{STACKING}SOURCE",
        "three images of any grey source of up to ten classes",
        Turn.NAME,
        lambda source: source.startswith(STACKING),
        open_stacked,
    ),
)
