"""What is about to be built from a source: sizes, levels, mode, encoding, and what that will cost."""

import mmap
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any, TypeVar

import numpy as np

from data.decoding import MODES, decode, natural_mode, needed_mode
from data.encodings import ENCODINGS, encode_image
from data.errors import DataError
from data.items import Item, Source
from data.resizing import TRANSFORMS, pyramid
from data.sizes import Size, format_size

T = TypeVar("T")
Progress = Callable[[Iterable[T], int, str], Iterable[T]]  # (items, how many, what is done to them) -> the same items

MAX_PIXELS = 1 << 26  # of one stored image
RAW_LIMIT = 8 << 30  # bytes up to which a dataset is stored raw unless told otherwise: then it fits most page caches
MODE_SAMPLE = 256  # images whose headers are read to guess the mode
ALPHA_SAMPLE = 32  # images of those that are decoded to see whether they are transparent
COST_SAMPLE = 8  # images that are encoded to guess size and time


def silent(items: Iterable[T], total: int, label: str) -> Iterable[T]:
    """The progress display that shows nothing."""
    return items


def top_level(base: Size, resolution: Size) -> int:
    """The k with base * 2**k == resolution; DataError if there is none, naming the nearest."""
    if resolution[0] * resolution[1] > MAX_PIXELS:
        raise DataError(f"--resolution={format_size(resolution)}: choose one of at most {MAX_PIXELS} pixels")
    fitting = largest_level(base, resolution)
    if fitting is not None and (base[0] << fitting, base[1] << fitting) == resolution:
        return fitting
    low = fitting or 0
    nearest = [(base[0] << level, base[1] << level) for level in (low, low + 1)]
    square = all(height == width for height, width in (resolution, *nearest))
    shown = [str(size[0]) if square else format_size(size) for size in (resolution, *nearest)]
    raise DataError(
        f"--resolution={shown[0]} is not {format_size(base)} times a power of two; nearest: {', '.join(shown[1:])}"
    )


def largest_level(base: Size, size: Size) -> int | None:
    """The largest k with base * 2**k within `size`; None if the base itself is not."""
    factor = min(size[0] // base[0], size[1] // base[1])
    return factor.bit_length() - 1 if factor else None


@dataclass(frozen=True)
class BuildPlan:
    """What is about to be built."""

    source: Source
    size: Size
    base: Size
    levels: tuple[int, ...]
    mode: str  # key of MODES, at least; `build` widens it if an image needs that and `fixed_mode` lets it
    fixed_mode: bool
    transform: str  # key of TRANSFORMS
    encoding: str  # key of ENCODINGS
    strict: bool = False

    @property
    def channels(self) -> int:
        """Channels of the images stored."""
        return MODES[self.mode]

    @property
    def sizes(self) -> list[Size]:
        """(height, width) of every level."""
        return [(self.base[0] << level, self.base[1] << level) for level in self.levels]

    @property
    def raw_bytes(self) -> int:
        """Bytes of all levels of one image as pixels."""
        return self.channels * sum(height * width for height, width in self.sizes)

    def fit(self, item: Item) -> np.ndarray | str:
        """uint8 [H, W, C], the top level of an item; or why there is none."""
        image = item.image if isinstance(item.image, str) else decode(item.image, self.mode)
        if isinstance(image, str):
            return image
        return np.asarray(TRANSFORMS[self.transform](image, self.size)).reshape(*self.size, self.channels)


@dataclass(frozen=True)
class Cost:
    """About what it takes to build a plan in one encoding."""

    bytes: int
    seconds: float  # on one core


def estimate_costs(plan: BuildPlan) -> dict[str, Cost]:
    """The cost of every encoding that could hold the plan, from a few images that are built without being stored."""
    count = plan.source.count
    fitted, common = _timed(partial(_fit_at, plan), _spread(count, COST_SAMPLE))
    tops = [top for fits in fitted for top in fits if not isinstance(top, str)]
    tops = tops or [np.zeros((*plan.size, plan.channels), np.uint8)]
    pyramids, more = _timed(lambda top: [level[0] for level in pyramid(top[None], len(plan.levels))], tops)
    costs = {}
    for name, row in ENCODINGS.items():
        if plan.channels in row.channels and max(plan.size) <= row.max_side:
            encoded, seconds = _timed(partial(encode_image, encoding=name), pyramids)
            size = sum(_stored_bytes(list(map(len, values))) for values, _ in encoded) / len(encoded)
            costs[name] = Cost(round(count * size), count * (common + more + seconds))
    return costs


def _fit_at(plan: BuildPlan, position: int) -> list[np.ndarray | str]:
    return [plan.fit(item) for item in plan.source.read(position, position + 1)]


def _timed(work: Callable[[Any], Any], items: Sequence[Any]) -> tuple[list[Any], float]:
    """(work(item) of every item, the median of the seconds that took: the first is slow for other reasons)."""
    results = []
    seconds = []
    for item in items:
        started = time.perf_counter()
        results.append(work(item))
        seconds.append(time.perf_counter() - started)
    return results, median(seconds)


def _stored_bytes(values: Sequence[int]) -> int:
    """About how much of a file one image takes whose values are so long, page waste included."""
    page = mmap.PAGESIZE
    sizes = [size + 36 for size in values]  # key and LMDB's own headers
    # Above half a page LMDB gives a value pages of its own; smaller ones share pages that end up about 2/3 full.
    return sum(-(-size // page) * page if size > page // 2 else size * 3 // 2 for size in sizes)


def _spread(count: int, most: int) -> list[int]:
    """At most `most` positions, evenly over [0, count)."""
    chosen = min(count, most)
    return [index * count // chosen for index in range(chosen)]


def make_plan(
    source: Source,
    *,
    resolution: Size | None,
    base: Size,
    levels: int | None,
    transform: str,
    mode: str,
    encoding: str | None,
    strict: bool,
) -> BuildPlan:
    """Look at a few images of a source and settle size, levels, mode and encoding.

    DataError if they do not go together, or if no image is readable.
    """
    if resolution is not None:
        top_level(base, resolution)  # before anything is read
    first = _first_size(source, strict)
    if resolution is None:
        resolution = _default_resolution(base, *first)
    top = top_level(base, resolution)
    if levels is not None and not 1 <= levels <= top + 1:
        raise DataError(f"--levels={levels}: from {format_size(base)} to {format_size(resolution)} there are {top + 1}")
    kept = tuple(range(top + 1))[-(levels or top + 1) :]
    plan = BuildPlan(
        source=source,
        size=resolution,
        base=base,
        levels=kept,
        mode=_sampled_mode(source) if mode == "auto" else mode,
        fixed_mode=mode != "auto",
        transform=transform,
        encoding=encoding or "raw",
        strict=strict,
    )
    if encoding is None and source.count * _stored_bytes([h * w * plan.channels for h, w in plan.sizes]) > RAW_LIMIT:
        plan = replace(plan, encoding="webp")
    check_encoding(plan)
    return plan


def check_encoding(plan: BuildPlan) -> None:
    """DataError if the encoding of a plan cannot hold its images."""
    row = ENCODINGS[plan.encoding]
    if plan.channels not in row.channels:
        raise DataError(f"--encoding={plan.encoding} cannot hold transparency: choose another, or --mode=RGB")
    if max(plan.size) > row.max_side:
        raise DataError(f"--encoding={plan.encoding} holds at most {row.max_side} pixels a side: choose another")


def _first_size(source: Source, strict: bool) -> tuple[str, Size]:
    """(name, size) of the first readable image. DataError if there is none, or the first bad one if `strict`."""
    failure = ("", "")
    for item in source.read():
        # A header does not tell everything, and EXIF may turn the image.
        image = item.image if isinstance(item.image, str) else decode(item.image, "RGBA")
        if not isinstance(image, str):
            return item.name, (image.height, image.width)
        refuse(item, image, strict)
        failure = failure if failure[0] else (item.name, image)
    raise DataError(nothing_readable(source, *failure))


def _sampled_mode(source: Source) -> str:
    """The smallest mode that holds each image of a sample: by their headers, and by alpha for a few that claim it."""
    items = (item for position in _spread(source.count, MODE_SAMPLE) for item in source.read(position, position + 1))
    looks = 0
    found = "L"
    for _, image, _ in items:
        if isinstance(image, str) or MODES[natural_mode(image)] <= MODES[found]:
            continue
        looks += natural_mode(image) == "RGBA"
        if looks <= ALPHA_SAMPLE:
            found = max(found, needed_mode(image), key=list(MODES).index)
        if found == "RGBA":
            break
    return found


def _default_resolution(base: Size, name: str, size: Size) -> Size:
    level = largest_level(base, size)
    if level is None:
        raise DataError(
            f"the first image, {name}, is {format_size(size)}, smaller than the base {format_size(base)}: "
            "give --resolution or a smaller --base"
        )
    return base[0] << level, base[1] << level


def nothing_readable(source: Source, name: str, reason: str) -> str:
    """What to say of a source whose first image cannot be read, nor any other."""
    return f"none of the {source.count} images in {source.name} can be read; the first, {name}: {reason}"


def refuse(item: Item, reason: str, strict: bool) -> None:
    """DataError for an item that cannot be read, if `strict`."""
    if strict:
        raise DataError(f"{item.name}: {reason} (without --strict it would be skipped)")
