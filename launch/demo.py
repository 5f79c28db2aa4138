"""`saddle demo`: real digits, a few minutes of training, and everything that a trained network can show."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from launch.cli import run
from launch.evaluate import build_reference, describe, score_network, table
from launch.generate import enlarge, find_snapshot, grid_picture, keyframe_seeds, load, opaque, sample, save_png, walk
from launch.ranks import call
from launch.tables import write_json
from launch.video import find_ffmpeg, write_video

if TYPE_CHECKING:
    from gan.checkpoint import Snapshot

RESOLUTION = 16
SCALE, GAP = 6, 2  # of the pictures: a digit of 16 pixels is too small to look at, and it fills its square
STRIP_ROWS, STRIP_COLUMNS = 10, 10
SAMPLES = 10_000
WALK_COLUMNS, WALK_ROWS, WALK_KEYFRAMES, WALK_FRAMES, WALK_FPS = 5, 2, 4, 60, 30


@click.command(context_settings={"show_default": True})
@click.option("--outdir", type=click.Path(path_type=Path, file_okay=False), default="runs/demo", help="Where all goes.")
@click.option("--cond", type=bool, default=False, help="Train on the labels too: a column of the grid per digit.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, help="Of the training and of the score.")
@click.option("--gpus", type=click.IntRange(1), default=2, help="Ranks (processes where there is no GPU).")
def main(outdir: Path, cond: bool, seed: int, gpus: int) -> int:
    """Train on real digits for a few minutes and show the results: grid, video, progress strip and score.

    Run it again to go on where it was stopped; a finished training is not repeated.
    """
    seconds: dict[str, float] = {}
    find_ffmpeg()  # missing? say so now, not after the training
    data, training = outdir / "digits.lmdb", outdir / f"training-seed{seed}{'-cond' * cond}"
    with timed(seconds, "prepare"):
        prepare_digits(data)
    with timed(seconds, "train"):
        code = train(data, training, cond, seed, gpus)
    if code:
        return code
    made = show(outdir, training, seconds)
    with timed(seconds, "score"):
        scored = score(training, data, seed)
    files = {name: str(path) for name, path in {"data": data, **made}.items()}
    about = {"seed": seed, "cond": cond, **scored, "seconds": seconds, "paths": files}
    write_json(outdir / "summary.json", about)
    click.echo(closing_words(made, outdir))
    return 0


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Note how long the block took."""
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 2)


def prepare_digits(path: Path) -> None:
    """Build the dataset of digits unless it is there."""
    from data.prepare import prepare

    if path.exists():
        return
    report = prepare("digits", path, resolution=(RESOLUTION, RESOLUTION))
    click.echo(f"prepared {path}: {report.manifest.count} real digits of {RESOLUTION}x{RESOLUTION} pixels")


def train(data: Path, outdir: Path, cond: bool, seed: int, gpus: int) -> int:
    """Run `saddle train` as a user would -> its exit code."""
    flags = [f"--data={data}", f"--outdir={outdir}", "--preset=digits", f"--gpus={gpus}", f"--seed={seed}"]
    click.echo(" ".join(["$ saddle train", *flags, *["--cond=1"] * cond]))
    command = [sys.executable, "-m", "launch.train", *flags, f"--cond={int(cond)}"]
    return call(command, gpus)


def show(outdir: Path, training: Path, seconds: dict[str, float]) -> dict[str, Path]:
    """Make grid, video and progress strip from the newest run of `training` -> their paths by name."""
    newest = find_snapshot(training)
    snapshot = load(newest)
    made = {"network": newest, "run": newest.parent}
    made |= {"grid": outdir / "grid.png", "video": outdir / "walk.mp4", "progress": outdir / "progress.png"}
    with timed(seconds, "grid"):
        save_png(enlarge(grid_picture(snapshot, range(100), None, 1.0, 10, GAP), SCALE), made["grid"])
    with timed(seconds, "video"):
        cells = keyframe_seeds(list(range(40)), WALK_COLUMNS * WALK_ROWS, WALK_KEYFRAMES)
        frames = walk(snapshot, cells, None, 1.0, WALK_COLUMNS, WALK_FRAMES, GAP)
        write_video(made["video"], (opaque(enlarge(frame, SCALE)) for frame in frames), WALK_FPS)
    with timed(seconds, "progress"):
        save_png(enlarge(progress_strip(newest.parent), SCALE), made["progress"])
    return made


def progress_strip(run_dir: Path) -> np.ndarray:
    """A row per latent, a column per snapshot of a run, early ones enlarged to the last size: uint8 [H, W, C]."""
    from gan.sampling import tile

    paths = sorted(run_dir.glob("network-snapshot-*.safetensors"))
    columns = [column(load(path)) for path in spread(paths, STRIP_COLUMNS)]
    height = columns[-1].shape[1]
    sized = [images.repeat(height // images.shape[1], 1).repeat(height // images.shape[1], 2) for images in columns]
    return tile(np.stack(sized, 1).reshape(-1, *sized[-1].shape[1:]), len(columns), GAP)


def column(snapshot: "Snapshot") -> np.ndarray:
    """The images of the strip's latents: uint8 [STRIP_ROWS, H, W, C]."""
    return np.stack(list(sample(snapshot, range(STRIP_ROWS), None, 1.0)))


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the items, evenly spaced, the first and the last among them."""
    picks = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[pick] for pick in picks]


def score(training: Path, data: Path, seed: int) -> dict[str, Any]:
    """Score the trained network, print the table -> the figures of summary.json."""
    from data.dataset import ImageDataset

    snapshot = load(find_snapshot(training))
    reference = build_reference(ImageDataset(data), snapshot.stage, seed)
    row, floors = score_network(snapshot, reference, snapshot.stage, SAMPLES, seed), reference.floors()
    half, blurred = (floors[name].frechet_distance for name in ("half of the reals", "blurred reals"))
    click.echo(f"\n{describe(reference)}\n{table({'this network': row, **floors})}")
    click.echo(
        f"\nIts Fréchet distance is {row.frechet_distance / half:.1f} times that between two halves of the reals, and "
        f"{row.frechet_distance / blurred:.2f} times that of blurred reals. (Halves are small samples, which by itself "
        "makes their distance larger.)"
    )
    return {
        **asdict(row),
        "images_seen": snapshot.images_seen,
        "classifier_accuracy": reference.classifier.accuracy,
        "floors": {name: asdict(floor) for name, floor in floors.items()},
    }


def closing_words(made: dict[str, Path], outdir: Path) -> str:
    """What to look at, and what to do next."""
    return f"""
Look at  {made["grid"]}      one hundred digits that nobody wrote
         {made["video"]}      a walk through the space between them
         {made["progress"]}  how ten of them came to be: time runs to the right
         {outdir / "summary.json"}  the figures

Next     saddle prepare FOLDER mine.lmdb --resolution=64
         saddle train --data=mine.lmdb --outdir=runs
         saddle generate video --network=runs"""


if __name__ == "__main__":
    run(main, "saddle demo")
