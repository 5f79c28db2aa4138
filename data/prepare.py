"""From a source of images to a dataset file: each image decoded once, fitted to one size, and its pyramid stored."""

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.build import manifest_fields, store_images
from data.build_plan import BuildPlan, Cost, Progress, estimate_costs, make_plan, silent
from data.errors import DataError
from data.sizes import Size
from data.sources import open_source
from data.store import Manifest, open_reader, part_path
from data.store_writer import Skipped, StoreWriter, check_new

MOST_WORKERS = 16  # one process writes what the others encode
LABEL_BYTES = 32  # of one number of a label, as text and as float32


@dataclass(frozen=True)
class BuildReport:
    """What was built: `found` images are the `manifest.count` stored ones and the `skipped` ones."""

    manifest: Manifest
    found: int
    skipped: list[Skipped]
    ignored: Mapping[str, int]  # suffix of the source's files that are no images -> how many
    notes: tuple[str, ...]  # what the user should know of the source
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
    encoding: str | None = None,
    max_images: int | None = None,
    strict: bool = False,
    workers: int | None = None,
    progress: Progress = silent,
    announce: Callable[[BuildPlan, dict[str, Cost], int], None] = lambda plan, costs, workers: None,
    say: Callable[[str], None] = lambda line: None,
) -> BuildReport:
    """Build the dataset `dest` from `source`, of any kind in data/sources, and say what happened.

    Sizes are (height, width); the default resolution is the largest base * 2**k within the first readable image.
    `levels` keeps that many of the largest levels. Images that cannot be read are skipped and reported; with `strict`
    the first one is a DataError. DataError too if nothing can be built, and then nothing is left behind. The default
    encoding is raw, or lossless WebP where that would take more than 8 GB; the default number of workers is that of
    the cores, at most MOST_WORKERS. The file is the same whatever their number, and whether or not the build was killed
    and called again.
    """
    started = time.monotonic()
    path = Path(dest)
    check_new(path)
    workers = workers or min(_cores(), MOST_WORKERS)
    opened = open_source(source, max_images)
    plan = make_plan(
        opened,
        resolution=resolution,
        base=base,
        levels=levels,
        transform=transform,
        mode=mode,
        encoding=encoding,
        strict=strict,
    )
    costs = estimate_costs(plan)
    _check_space(path, plan, costs)
    announce(plan, costs, workers)
    settings = [fingerprint(opened.files), opened.name, opened.count, opened.classes, opened.label_dim]
    settings += [plan.size, plan.base, plan.levels, transform, mode, plan.encoding]
    listing = path.with_name(path.name + ".skipped.txt")
    largest = max(2 * plan.raw_bytes, LABEL_BYTES * opened.count * (opened.label_dim or 0))
    with StoreWriter(path, settings, plan.mode, say, largest) as writer:
        plan = store_images(plan, writer, workers, progress, say)
        _write_skipped(listing, writer.skipped)  # before its names are lost with the part
        manifest = writer.finish(**manifest_fields(plan))
    labels = open_reader(path).labels() if manifest.classes else None
    return BuildReport(
        manifest=manifest,
        found=opened.count,
        skipped=writer.skipped,
        ignored=opened.ignored,
        notes=opened.notes,
        bytes=path.stat().st_size,
        seconds=time.monotonic() - started,
        empty_classes=0 if labels is None else len(manifest.classes or ()) - len(np.unique(labels)),
        skipped_file=listing if os.path.exists(listing) else None,  # not where that name would be too long,
    )


def fingerprint(files: Sequence[Path]) -> str:
    """What tells that one of these files has changed: their names, sizes and times; "" if there are none."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file}\0".encode(errors="replace"))
        with suppress(OSError):  # a broken link is an image that is skipped
            status = file.stat()
            digest.update(f"{status.st_size} {status.st_mtime_ns}\0".encode())
    return digest.hexdigest() if files else ""


def _cores() -> int:
    """Cores that this process may use; macOS does not tell, and has all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_space(path: Path, plan: BuildPlan, costs: dict[str, Cost]) -> None:
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    part = part_path(path)
    free = shutil.disk_usage(folder).free + (part.stat().st_size if part.exists() else 0)
    needed = costs[plan.encoding].bytes
    if needed > free:
        others = [f"--encoding={name} {cost.bytes >> 20} MB" for name, cost in costs.items() if cost.bytes <= free]
        hint = f"make room, or take {' or '.join(others)}" if others else "make room"
        raise DataError(f"{path} needs about {needed >> 20} MB and {folder} has {free >> 20} MB free: {hint}")


def _write_skipped(listing: Path, skipped: Sequence[Skipped]) -> None:
    """Write `name<tab>reason` lines; the list of an earlier build of that name goes.

    Nothing if the list cannot be written: the dataset stands, and its manifest has the counts.
    """
    with suppress(OSError):
        listing.unlink(missing_ok=True)
        if skipped:
            listing.write_text("".join(f"{one.name}\t{one.reason}\n" for one in skipped), encoding="utf-8")
