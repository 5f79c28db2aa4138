"""From a source of images to a dataset file: each image decoded once, fitted to one size, and its pyramid stored."""

import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from data.errors import DataError
from data.images import MODES, TRANSFORMS, Size, decode, natural_mode, pyramid
from data.sources import Item, Source, open_source
from data.store import Manifest, Writer, check_new, estimated_bytes

T = TypeVar("T")
Progress = Callable[[Iterable[T], int, str], Iterable[T]]  # (items, how many, what is done to them) -> the same items

MAX_PIXELS = 1 << 26  # of one stored image


def silent(items: Iterable[T], total: int, label: str) -> Iterable[T]:
    """The progress display that shows nothing."""
    return items


def format_size(size: Size) -> str:
    """A size as HxW."""
    return f"{size[0]}x{size[1]}"


def parse_size(text: str) -> Size:
    """(height, width) of "64" or "64x128"; DataError for anything else."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(re.fullmatch("[0-9]{1,6}", side) and int(side) for side in sides):
        raise DataError(f"{text!r} is not a size: write one side, such as 64, or HEIGHTxWIDTH, such as 64x128")
    return int(sides[0]), int(sides[-1])


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
class Plan:
    """What is about to be built."""

    source: Source
    size: Size
    base: Size
    levels: tuple[int, ...]
    mode: str  # key of MODES
    transform: str  # key of TRANSFORMS

    @property
    def estimated_bytes(self) -> int:
        """About how large the file will be if every image of the source is stored."""
        sizes = [(self.base[0] << level, self.base[1] << level) for level in self.levels]
        return estimated_bytes(self.source.count, MODES[self.mode], sizes)


@dataclass(frozen=True)
class Report:
    """What was built: `found` images are the `manifest.count` stored ones and the `skipped` ones."""

    manifest: Manifest
    found: int
    skipped: list[tuple[str, str]]  # (name, reason)
    ignored: int  # files of the source that do not claim to be images
    bytes: int
    seconds: float
    empty_classes: int  # classes of the source of which nothing was stored
    skipped_file: Path | None  # where the whole list of skipped images is, if there are any


def prepare(
    source: str,
    dest: str | os.PathLike[str],
    *,
    resolution: Size | None = None,
    base: Size = (4, 4),
    levels: int | None = None,
    transform: str = "center-crop",
    mode: str = "auto",
    max_images: int | None = None,
    strict: bool = False,
    progress: Progress = silent,
    announce: Callable[[Plan], None] = lambda plan: None,
) -> Report:
    """Build the dataset `dest` from `source` (a built-in name, a folder or a zip) and say what happened.

    Sizes are (height, width); the default resolution is the largest base * 2**k within the first readable image.
    `levels` keeps that many of the largest levels. Images that cannot be read are skipped and reported; with `strict`
    the first one is a DataError. DataError too if nothing can be built, and then nothing is left behind.
    """
    started = time.monotonic()
    path = Path(dest)
    check_new(path)
    opened = open_source(source, max_images)
    plan = make_plan(
        opened,
        resolution=resolution,
        base=base,
        levels=levels,
        transform=transform,
        mode=mode,
        strict=strict,
        progress=progress,
    )
    _check_space(path, plan.estimated_bytes)
    announce(plan)
    manifest, skipped, labels = _build(plan, path, strict, progress)
    return Report(
        manifest=manifest,
        found=opened.count,
        skipped=skipped,
        ignored=opened.ignored,
        bytes=path.stat().st_size,
        seconds=time.monotonic() - started,
        empty_classes=max(len(manifest.classes or ()) - len(set(labels)), 0),
        skipped_file=_write_skipped(path, skipped),
    )


def make_plan(
    source: Source,
    *,
    resolution: Size | None,
    base: Size,
    levels: int | None,
    transform: str,
    mode: str,
    strict: bool,
    progress: Progress,
) -> Plan:
    """Look at the headers of a source and settle size, levels and mode. DataError if they do not go together."""
    if resolution is not None:
        top_level(base, resolution)  # before the scan, which may take minutes
    first, natural = scan(source, mode, strict, progress)
    if resolution is None:
        resolution = _default_resolution(base, *first)
    top = top_level(base, resolution)
    if levels is not None and not 1 <= levels <= top + 1:
        raise DataError(f"--levels={levels}: from {format_size(base)} to {format_size(resolution)} there are {top + 1}")
    kept = tuple(range(top + 1))[-(levels or top + 1) :]
    return Plan(source, resolution, base, kept, natural if mode == "auto" else mode, transform)


def scan(source: Source, mode: str, strict: bool, progress: Progress) -> tuple[tuple[str, Size], str]:
    """((name, size) of the first readable image, the smallest mode that holds all), from the headers of the others.

    Only as many are read as it takes. DataError if no image is readable, or the first bad one if `strict`.
    """
    first, rank = None, 0
    failure = ("", "")
    for item in progress(source.read(), source.count, "scan"):
        image = item.image
        if first is None and not isinstance(image, str):
            whole = decode(image, "RGBA")  # a header does not tell everything, and EXIF may turn the image
            if isinstance(whole, str):
                image = whole
            else:
                first = item.name, (whole.height, whole.width)
        if isinstance(image, str):
            _refuse(item, image, strict)
            failure = failure if failure[0] else (item.name, image)
            continue
        rank = max(rank, list(MODES).index(natural_mode(image)))
        if mode != "auto" or rank == len(MODES) - 1:
            break
    if first is None:
        raise DataError(_nothing_readable(source, *failure))
    return first, list(MODES)[rank]


def _default_resolution(base: Size, name: str, size: Size) -> Size:
    level = largest_level(base, size)
    if level is None:
        raise DataError(
            f"the first image, {name}, is {format_size(size)}, smaller than the base {format_size(base)}: "
            "give --resolution or a smaller --base"
        )
    return base[0] << level, base[1] << level


def _nothing_readable(source: Source, name: str, reason: str) -> str:
    return f"none of the {source.count} images in {source.name} can be read; the first, {name}: {reason}"


def _refuse(item: Item, reason: str, strict: bool) -> None:
    if strict:
        raise DataError(f"{item.name}: {reason} (without --strict it would be skipped)")


def _check_space(path: Path, needed: int) -> None:
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(f"{path} needs about {needed >> 20} MB and {folder} has {free >> 20} MB free: make room")


def _build(
    plan: Plan, path: Path, strict: bool, progress: Progress
) -> tuple[Manifest, list[tuple[str, str]], list[int]]:
    """Write the dataset; returns its manifest, the (name, reason) of every image that was skipped, and the labels."""
    source, fit = plan.source, TRANSFORMS[plan.transform]
    skipped: list[tuple[str, str]] = []
    labels: list[int] = []
    with Writer(path, channels=MODES[plan.mode], base=plan.base, levels=plan.levels) as writer:
        for item in progress(source.read(), source.count, "build"):
            image = item.image if isinstance(item.image, str) else decode(item.image, plan.mode)
            if isinstance(image, str):
                _refuse(item, image, strict)
                skipped.append((item.name, image))
                continue
            pixels = np.asarray(fit(image, plan.size)).reshape(*plan.size, MODES[plan.mode])
            writer.add(pyramid(pixels, len(plan.levels)))
            labels.append(item.label or 0)
        if not labels:
            raise DataError(_nothing_readable(source, *skipped[0]))
        manifest = writer.finish(
            source=source.name,
            labels=None if source.classes is None else np.array(labels),
            classes=source.classes,
            skipped=dict(Counter(summary(reason) for _, reason in skipped)),
        )
    return manifest, skipped, labels


def summary(reason: str) -> str:
    """The kind of a reason, without what is particular to one image."""
    return reason.split(":")[0]


def _write_skipped(path: Path, skipped: list[tuple[str, str]]) -> Path | None:
    """Write `name<tab>reason` lines beside the dataset; the list of an earlier build of that name goes.

    None if nothing was skipped, or if the list cannot be written: the dataset stands, and its manifest has the counts.
    """
    listing = path.with_name(path.name + ".skipped.txt")
    try:
        listing.unlink(missing_ok=True)
        if not skipped:
            return None
        listing.write_text("".join(f"{name}\t{reason}\n" for name, reason in skipped), encoding="utf-8")
    except OSError:
        return None
    return listing
