"""Building a dataset file: the images of a source in chunks, by several processes, into one writer."""

from collections import Counter
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from data.build_plan import BuildPlan, Progress, check_encoding, nothing_readable, refuse
from data.colors import color_change
from data.decoding import MODES, natural_mode, needed_mode
from data.encodings import ENCODINGS, encode_image
from data.errors import DataError
from data.items import Item
from data.resizing import pyramid
from data.store_writer import Skipped, StoredLabel, StoreWriter
from data.workers import Result, in_order

CHUNK_BYTES = 4 << 20
CHUNK_IMAGES = 256  # a chunk holds at most so many bytes of pixels and so many images


class Wider(DataError):
    """An image that needs a wider mode than the plan's."""

    def __init__(self, name: str, mode: str) -> None:
        super().__init__(name, mode)
        self.name = name
        self.mode = mode


@dataclass(frozen=True)
class Chunk:
    """What became of consecutive items of a source; the values of its images travel beside it."""

    items: int
    digests: list[bytes]  # of each image stored
    labels: list[StoredLabel]
    skipped: list[Skipped]
    color_changes: Counter[str]  # what was done to the colors of images stored


def chunk_size(plan: BuildPlan) -> int:
    """Items in a chunk: a function of the plan alone, because commits fall between chunks."""
    return max(1, min(CHUNK_IMAGES, CHUNK_BYTES // plan.raw_bytes))


def store_images(
    plan: BuildPlan,
    writer: StoreWriter,
    workers: int,
    progress: Progress,
    say: Callable[[str], None] = lambda line: None,
) -> BuildPlan:
    """Store all images of the plan that the writer does not hold yet; returns the plan in the mode that they needed.

    DataError if there is none.
    """
    while True:
        plan = replace(plan, mode=writer.mode)
        try:
            check_encoding(plan)
            _store(plan, writer, workers, progress)
            break
        except Wider as wider:
            say(f"{wider.name} needs {wider.mode}, and the images before it fitted {plan.mode}: starting anew")
            writer.restart(wider.mode)
    if not writer.count:
        first = writer.skipped[0]
        raise DataError(nothing_readable(plan.source, first.name, first.reason))
    return plan


def manifest_fields(plan: BuildPlan) -> dict[str, Any]:
    """What a plan alone tells about the dataset that it will be."""
    return {
        "channels": plan.channels,
        "base": plan.base,
        "levels": plan.levels,
        "encoding": plan.encoding,
        "lossy": not ENCODINGS[plan.encoding].lossless,
        "transform": plan.transform,
        "classes": plan.source.classes,
        "label_dim": plan.source.label_dim,
        "source": plan.source.name,
    }


def _keep_freed_pages() -> None:
    """Let glibc reuse the memory of images: getting it anew from the kernel for each costs about as much as decoding.

    Freeing one large block makes malloc hold on to blocks up to that size from then on.
    """
    np.empty(31 << 20, np.uint8)


def _store(plan: BuildPlan, writer: StoreWriter, workers: int, progress: Progress) -> None:
    _keep_freed_pages()
    size = chunk_size(plan)
    count = plan.source.count
    starts = range(writer.consumed, count, size)
    workers = min(workers, max(1, len(starts) // 2))  # to fork for less does not pay
    most = 2 * size * plan.raw_bytes + 4096 * size * len(plan.levels)  # noise as JPEG is larger than as pixels
    results = in_order(partial(make_chunk, plan, size), starts, workers, most, private=[writer.file])

    def items() -> Generator[int, None, None]:
        with closing(results):
            for chunk, values in results:
                levels = len(plan.levels)
                images = [values[first : first + levels] for first in range(0, len(values), levels)]
                writer.add(
                    chunk.items, plan.levels, images, chunk.digests, chunk.labels, chunk.skipped, chunk.color_changes
                )
                yield from range(chunk.items)

    with closing(items()) as stored:
        for _ in progress(stored, count - writer.consumed, "build"):
            pass


def make_chunk(plan: BuildPlan, size: int, start: int) -> Result:
    """(Chunk, values of its images, all levels of one after the other) of at most `size` items from `start` on."""
    stop = min(start + size, plan.source.count)
    tops = np.empty((stop - start, *plan.size, plan.channels), np.uint8)
    labels: list[StoredLabel] = []
    skipped = []
    color_changes: Counter[str] = Counter()
    position = start
    for position, item in enumerate(plan.source.read(start, stop), start + 1):
        if not plan.fixed_mode:
            _check_mode(item, plan.mode)
        top = plan.fit(item)
        if isinstance(top, str):
            refuse(item, top, plan.strict)
            skipped.append(Skipped(position - 1, item.name, top))
        else:
            tops[len(labels)] = top
            labels.append(_plain(item.label))
            color_changes += _color_change(item)
    if position != stop:
        raise DataError(f"{plan.source.name} ended after {position} of {plan.source.count} images: it has changed")
    pyramids = pyramid(tops[: len(labels)], len(plan.levels))
    encoded = [encode_image([level[index] for level in pyramids], plan.encoding) for index in range(len(labels))]
    values = [value for image, _ in encoded for value in image]
    return Chunk(stop - start, [digest for _, digest in encoded], labels, skipped, color_changes), values


def _check_mode(item: Item, mode: str) -> None:
    """Wider if an image needs more than the mode has."""
    if isinstance(item.image, str) or MODES[natural_mode(item.image)] <= MODES[mode]:
        return
    needed = needed_mode(item.image)  # which may decode the image
    if MODES[needed] > MODES[mode]:
        raise Wider(item.name, needed)


def _color_change(item: Item) -> Counter[str]:
    change = None if isinstance(item.image, str | np.ndarray) else color_change(item.image)
    return Counter([change] if change else [])


def _plain(label: int | np.ndarray | None) -> StoredLabel:
    """A label that JSON can hold, and float32 without loss."""
    return label.tolist() if isinstance(label, np.ndarray) else label
