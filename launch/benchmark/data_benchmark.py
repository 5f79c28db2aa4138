"""Time how fast datasets are built and read, beside Pillow on a folder, a copy of the bytes, and litdata."""

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
import torch
from PIL import Image

from data.dataset import ImageDataset
from data.encodings import ENCODINGS
from data.prepare import prepare
from gan.errors import UserError
from launch.benchmark import readers
from launch.benchmark.readers import FORMATS
from launch.benchmark.timing import HostClock, contest, describe_machine, machine_line
from launch.cli import run
from launch.tables import aligned, json_option, save_rows

SIDES = (32, 256)  # of synthetic images
BATCHES = {64: 64, 2**30: 16}  # side up to which a batch holds so many
MOST_IMAGES, MOST_BYTES, FEWEST_IMAGES = 10_000, 200 << 20, 64
REPEATS, QUICK_REPEATS, QUICK_IMAGES = 11, 3, 128
SAMPLE_SECONDS = 0.02
BUDGET = 30.0  # of each size; its contestants read up to 800 encoded images a call
NO_LITDATA = "litdata is not installed"
WORKERS = (1, 2)
# (what, what the other's name begins with, image side at least, at most, wanted ratio of their rates)
WANTED = (
    ("direct", "folder", 32, 32, 30.0),
    ("direct", "litdata", 32, 32, 3.0),
    ("direct", "folder", 256, 256, 100.0),
    ("direct", "memcpy", 256, 256, 0.6),
    ("loader, 1 thread", "direct", 32, 32, 0.5),
    ("loader, 1 thread", "direct", 256, 256, 0.5),
)


@dataclass(frozen=True)
class Rate:
    """One figure: how many images a second, over how long, and their bytes on disk where something was built."""

    doing: str  # build | read
    what: str  # contestant, or encoding
    size: str  # HxW
    batch: int  # images at once; 0 where there are no batches
    workers: int
    images_per_second: float  # by the clock where something was built, of CPU time where it was read
    images_per_cpu_second: float  # of all processes together
    megabytes_per_second: float  # of pixels
    spread: float  # (90th - 10th percentile) / median of the samples; 0 where there is one
    disk_bytes_per_image: float | None = None


@click.command()
@click.option("--data", type=click.Path(path_type=Path), help="Read this dataset, at its largest size.")
@click.option(
    "--source",
    help="Build from this source, not from a folder of PNGs of the images that are read; then the rows of folders, "
    "memcpy and PNG alone are of other pictures than those of datasets.",
)
@click.option("--resolution", "sides", type=click.IntRange(4, 4096), multiple=True, help="Side of synthetic images.")
@click.option(
    "--count", type=click.IntRange(16), help="Number of images.  [default: as many as 200 MB hold, at most 10000]"
)
@click.option("--repeats", type=click.IntRange(1), help=f"Timings of each.  [default: {REPEATS}]")
@click.option("--quick", is_flag=True, help="Only test that everything runs, on a few small images.")
@json_option
def main(
    data: Path | None,
    source: str | None,
    sides: tuple[int, ...],
    count: int | None,
    repeats: int | None,
    quick: bool,
    json_path: Path | None,
) -> int:
    """Measure how fast datasets are built and read: with every encoding, and with one and two threads.

    Reading is measured in CPU time of all threads; all contestants take turns within one run. For the speed of one
    core, pin the command to it (taskset -c 0). Building is measured in wall time. All files are in the page cache.
    Without --data the images are smooth noise, of each --resolution (32 and 256 by default).
    """
    torch.set_num_threads(1)
    machine = describe_machine(torch.device("cpu"))
    click.echo(machine_line(machine))
    rows: list[Rate] = []
    skipped: list[str] = []
    limit = count or (QUICK_IMAGES if quick else MOST_IMAGES)
    with TemporaryDirectory(prefix="saddle-data-") as folder:
        for name, images in subjects(data, sides or ((16,) if quick else SIDES), limit, count is None):
            place = Path(folder) / name
            place.mkdir()
            rows += time_images(images, place, source, repeats or (QUICK_REPEATS if quick else REPEATS), skipped)
    ratios = compare_rates(rows)
    for line in (*rates_table(rows), "", *ratios_table(ratios), *skipped):
        click.echo(line)
    values = {"machine": machine, "rows": [asdict(row) for row in rows], "summary": ratios, "skipped": skipped}
    save_rows(json_path, values)
    return 0


def subjects(data: Path | None, sides: tuple[int, ...], limit: int, capped: bool) -> Iterator[tuple[str, np.ndarray]]:
    """(name, uint8 images [N, H, W, C]): of the dataset, or made up. Its first `limit`, or fewer if `capped`."""
    if data is None:
        for side in sides:
            yield f"{side}", synthetic(_fitting(limit, (side, side, 3), capped), side)
        return
    dataset = ImageDataset(data)
    level = dataset.manifest.levels[-1]
    shape = dataset.shape(level)
    if shape[2] not in (1, 3):
        raise UserError(f"{data} has {shape[2]} channels, and JPEG folders hold 1 or 3; measure another dataset")
    count = min(_fitting(limit, shape, capped), len(dataset))
    yield "data", dataset.read(np.arange(count), level)


def _fitting(limit: int, shape: tuple[int, int, int], capped: bool) -> int:
    return max(min(limit, MOST_BYTES // int(np.prod(shape))), FEWEST_IMAGES) if capped else limit


def synthetic(count: int, side: int) -> np.ndarray:
    """Smooth noise with a little grain, so that encoders find about as much to do as in photographs."""
    random = np.random.default_rng(0)
    images = np.empty((count, side, side, 3), np.uint8)
    coarse = max(side // 10, 2)
    for image in images:
        small = Image.fromarray(random.integers(0, 256, (coarse, coarse, 3), np.uint8))
        smooth = np.asarray(small.resize((side, side), Image.Resampling.BICUBIC), np.float32)
        image[:] = (smooth + random.normal(0, 4, smooth.shape)).clip(0, 255)
    return images


def time_images(images: np.ndarray, place: Path, source: str | None, repeats: int, skipped: list[str]) -> list[Rate]:
    """All rows of one set of images."""
    batch = min(next(n for side, n in BATCHES.items() if max(images.shape[1:3]) <= side), len(images))
    folders = {kind: readers.write_folder(images, place / kind, kind) for kind in FORMATS}
    origin = source or str(place / "PNG")
    rows, datasets = build_all(origin, images, place, skipped)
    raw = datasets["raw", 1]
    level = raw.manifest.levels[-1]
    one: dict[str, readers.Call] = {  # calls that read one batch
        "direct": readers.direct(raw, level, batch),
        "direct, checksums": readers.direct(raw, level, batch, check=True),
        "memcpy": readers.memcpy(images, batch),
    }
    for kind, paths in folders.items():
        one[f"folder {kind}"] = readers.pillow(paths, batch)
        one[f"folder {kind}, as floats"] = readers.pillow(paths, batch, floats=True)
    litdata = readers.litdata(images, place / "litdata", batch)
    if litdata:
        one["litdata"] = litdata
    elif NO_LITDATA not in skipped:
        skipped.append(NO_LITDATA)
    many: dict[str, tuple[readers.Call, int, int]] = {}  # (call, batches that it reads, threads)
    for (encoding, workers), dataset in datasets.items():
        name, batches = ("", 100) if encoding == "raw" else (f" {encoding}", 8)
        if name:
            one[f"direct{name}"] = readers.direct(datasets[encoding, 1], level, batch)
        call = readers.loader(dataset, level, batch, workers, batches)
        many[f"loader{name}, {workers} thread{'s' * (workers > 1)}"] = call, batches, workers
    everything = {name: (call, 1, 0) for name, call in one.items()} | many
    clock = HostClock(1)
    clock.sample_seconds = SAMPLE_SECONDS
    clock.budget = BUDGET
    times, _ = contest({name: call for name, (call, *_) in everything.items()}, clock, repeats)
    for name, taken in times.items():
        _, batches, workers = everything[name]
        rate = 1e3 * batches * batch / taken.median
        spread = (taken.p90 - taken.p10) / taken.median
        rows.append(_rate("read", name, images.shape[1:], batch, workers, rate, rate, spread))
    return rows


def build_all(
    source: str, images: np.ndarray, place: Path, skipped: list[str]
) -> tuple[list[Rate], dict[tuple[str, int], ImageDataset]]:
    """Build with every encoding and number of workers that there is."""
    rows = []
    datasets = {}
    height, width, channels = images.shape[1:]
    cpu_began = _cpu_seconds()
    began = time.perf_counter()
    for path in sorted((place / "PNG").iterdir()):
        with Image.open(path) as image:
            np.asarray(image)
    by_clock = len(images) / max(time.perf_counter() - began, 1e-3)
    by_cpu = len(images) / max(_cpu_seconds() - cpu_began, 1e-3)
    rows.append(_rate("build", "decode PNG alone", images.shape[1:], 0, 1, by_clock, by_cpu))
    for encoding in ENCODINGS:
        for workers in WORKERS:
            path = place / f"{encoding}-{workers}.lmdb"
            before = _cpu_seconds()
            report = prepare(
                source,
                path,
                resolution=(height, width),
                base=_base((height, width)),
                mode="L" if channels == 1 else "RGB",
                max_images=len(images),
                encoding=encoding,
                workers=workers,
            )
            stored = report.manifest.count
            rates = stored / report.seconds, stored / max(_cpu_seconds() - before, 1e-3)
            rows.append(_rate("build", encoding, images.shape[1:], 0, workers, *rates, disk=report.bytes / stored))
            datasets[encoding, workers] = ImageDataset(path)
    return rows, datasets


def _cpu_seconds() -> float:
    """Of this process and of those it has started that have ended."""
    return time.process_time() + sum(os.times()[2:4])


def _base(size: tuple[int, int]) -> tuple[int, int]:
    """The smallest size of at least 4 that doubles to this one."""
    while all(side % 2 == 0 and side >= 8 for side in size):
        size = size[0] // 2, size[1] // 2
    return size


def _rate(
    doing: str,
    what: str,
    shape: tuple[int, ...],
    batch: int,
    workers: int,
    rate: float,
    cpu_rate: float,
    spread: float = 0.0,
    disk: float | None = None,
) -> Rate:
    megabytes = rate * int(np.prod(shape)) / 1e6
    return Rate(doing, what, f"{shape[0]}x{shape[1]}", batch, workers, rate, cpu_rate, megabytes, spread, disk)


def rates_table(rows: list[Rate]) -> Iterator[str]:
    """The rows for people."""
    head = ["", "what", "size", "batch", "threads", "images/s", "per CPU s", "MB/s", "spread", "bytes/image"]
    yield from aligned([head, *map(_cells, rows)], right=range(3, 10))


def _cells(row: Rate) -> list[str]:
    numbers = [f"{row.batch or '-'}", f"{row.workers or '-'}", f"{row.images_per_second:.0f}"]
    numbers.append(f"{row.images_per_cpu_second:.0f}")
    spread = f"{row.spread:.0%}" if row.spread else "-"
    disk = f"{row.disk_bytes_per_image:.0f}" if row.disk_bytes_per_image else "-"
    return [row.doing, row.what, row.size, *numbers, f"{row.megabytes_per_second:.0f}", spread, disk]


def compare_rates(rows: list[Rate]) -> list[dict[str, Any]]:
    """Ratios of rates within each size: of reading to each reference, with the figure wanted where there is one."""
    found = []
    for size in dict.fromkeys(row.size for row in rows):
        rates = {row.what: row.images_per_second for row in rows if row.size == size and row.doing == "read"}
        found += [
            {"what": what, "of": of, "size": size, "ratio": rates[what] / rates[of], "wanted": _wanted(what, of, size)}
            for what, of in _compared(rates)
        ]
    return found


def _compared(rates: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    for what in rates:
        if what.startswith(("folder", "litdata", "memcpy")):
            yield "direct", what
        elif what == "direct, checksums":
            yield what, "direct"
        elif what.startswith("loader"):  # of an encoding: beside the direct read of the same
            yield what, what.partition(",")[0].replace("loader", "direct")


def _wanted(what: str, of: str, size: str) -> float | None:
    side = min(map(int, size.split("x")))
    known = (row for row in WANTED if row[0] == what and of.startswith(row[1]) and row[2] <= side <= row[3])
    return next((ratio for *_, ratio in known), None)


def ratios_table(ratios: list[dict[str, Any]]) -> Iterator[str]:
    """The ratios for people."""
    head = ["size", "what", "of", "ratio", "wanted"]
    cells = [
        [r["size"], r["what"], r["of"], f"{r['ratio']:.2f}", f">= {r['wanted']:g}" if r["wanted"] else "-"]
        for r in ratios
    ]
    yield from aligned([head, *cells], right=(3, 4))


if __name__ == "__main__":
    run(main, "saddle benchmark data")
