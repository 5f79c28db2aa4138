"""`saddle demo`: train on real digits, or on photos, then make pictures, a video and a score."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from launch.cli import run
from launch.pictures import enlarge, grid_picture, images_of_seeds, keyframe_seeds, opaque, save_png, walk
from launch.ranks import call
from launch.samples import find_snapshot, last_run, load_network, spread
from launch.scores import HALF, build_reference, check_scores, score_table
from launch.settings import read_preset
from launch.tables import write_json
from launch.video import find_ffmpeg, write_video

if TYPE_CHECKING:
    from gan.checkpoint import Snapshot
    from gan.metrics.score import Score

RESOLUTION = 16
CELL = 96  # pixels that an image is enlarged to about: one of 16 or 32 pixels is too small to look at
GRID_COLUMNS, GRID_ROWS = 10, 10
STRIP_COLUMNS, STRIP_ROWS = 10, 10
WALK_COLUMNS, WALK_ROWS = 5, 2
WALK_KEYFRAMES = 4  # of each cell
WALK_FRAMES = 60  # per keyframe
WALK_FPS = 30
SAMPLES = 10_000  # for the score
RECONSTRUCTIONS = 50  # in rows of 5
PAIRS, STEPS = 10, 8  # of real images, and of what is between them
PICTURES = {
    "grid": "one hundred generated images",
    "video": "a walk through latent space",
    "progress": "ten latents during training, from left to right",
    "reconstructions": "real images, each with what the decoder makes of its code to the right",
    "interpolations": "rows from one real image to another",
}
FIGURES = {  # the name of a figure -> its name in summary.json
    "fd-classifier": "frechet_distance",
    "mode-kl": "mode_kl",
    "mode-kl-by-chance": "mode_kl_floor",
    "as-asked": "accuracy_as_asked",
}


@dataclass(frozen=True)
class Kind:
    """What the demo does with a kind of model."""

    digits: str  # its preset for digits
    photos: str  # and for the user's own images
    folder: str  # by default
    encodes: bool  # does it also map images to latents, and give them a likelihood?


KINDS = {
    "gan": Kind("digits", "photos", "runs/demo", encodes=False),
    "vae": Kind("vae-digits", "vae", "runs/demo-vae", encodes=True),
}


@click.command(context_settings={"show_default": True})
@click.option("--model", type=click.Choice(list(KINDS)), default="gan", help="What kind of model to train.")
@click.option(
    "--outdir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for all files.  [default: runs/demo, or runs/demo-vae]",
)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="A dataset of `saddle prepare`, such as photos of 32x32; without it, scikit-learn's digits.",
)
@click.option(
    "--preset", help="Of `saddle train`.  [default: digits, or photos with --data; of a VAE vae-digits or vae]"
)
@click.option("--cond", type=bool, help="Train on the labels too.  [default: 1 for --data with classes, else 0]")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, help="Seed of the training and of the score.")
@click.option("--gpus", type=click.IntRange(1), default=2, help="Processes, each on a GPU if there are GPUs.")
def main(
    model: str, outdir: Path | None, data: Path | None, preset: str | None, cond: bool | None, seed: int, gpus: int
) -> int:
    """Train on real digits for a few minutes and show the results: grid, video, progress strip and score, and of a VAE
    also reconstructions, interpolations and a likelihood.

    With --data=photos.lmdb it trains on photos instead, for about an hour on two CPU cores. Run it again to resume a
    training that was stopped. A finished training is not repeated.
    """
    seconds: dict[str, float] = {}
    find_ffmpeg()  # if it is missing, say so now and not after the training
    kind = KINDS[model]
    outdir = outdir or Path(kind.folder)
    preset = preset or (kind.photos if data else kind.digits)
    read_preset(preset)  # if there is none, say so before anything is made
    with timed(seconds, "prepare"):
        data, classes = (data, has_classes(data)) if data else (prepare_digits(outdir / "digits.lmdb"), False)
    cond = classes if cond is None else cond
    training = outdir / f"training-{preset}-seed{seed}{'-cond' * cond}"
    with timed(seconds, "train"):
        code = train(data, training, preset, cond, seed, gpus)
    if code:
        return code
    training = last_run(training)
    made = show(outdir, training, seconds)
    if kind.encodes:
        with timed(seconds, "reconstructions"):
            made |= show_codes(outdir, training, data, seed)
    with timed(seconds, "score"):
        scored = score(training, data, seed)
    if kind.encodes:
        with timed(seconds, "likelihood"):
            scored |= judge(training, data, seed)
    paths = {name: str(path) for name, path in {"data": data, **made}.items()}
    summary = {"preset": preset, "seed": seed, "cond": cond, **scored, "seconds": seconds, "paths": paths}
    write_json(outdir / "summary.json", summary)
    click.echo(closing_words(made, outdir))
    return 0


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Record under `name` how many seconds the block took."""
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 2)


def has_classes(data: Path) -> bool:
    """Does the dataset have classes? Raises DataError if it is none, UserError if it cannot be scored in the end."""
    from data.dataset import ImageDataset

    dataset = ImageDataset(data)
    classes = bool(dataset.manifest.classes)
    check_scores(dataset, "", features_for(classes), SAMPLES)
    return classes


def features_for(classes: bool) -> str:
    """What compares images with the reals of a dataset that has classes, or has none."""
    return "classifier" if classes else "lite0"


def prepare_digits(path: Path) -> Path:
    """Build the dataset of digits unless it exists. -> its path."""
    from data.prepare import prepare

    if path.exists():
        return path
    built = prepare("digits", path, resolution=(RESOLUTION, RESOLUTION))
    click.echo(f"prepared {path}: {built.manifest.count} real digits of {RESOLUTION}x{RESOLUTION} pixels")
    return path


def train(data: Path, outdir: Path, preset: str, cond: bool, seed: int, gpus: int) -> int:
    """Run `saddle train` as a user would. -> its exit code."""
    flags = [f"--data={data}", f"--outdir={outdir}", f"--preset={preset}", f"--gpus={gpus}", f"--seed={seed}"]
    flags.append(f"--cond={int(cond)}")
    click.echo(" ".join(["$ saddle train", *flags]))
    return call([sys.executable, "-m", "launch.train", *flags], gpus)


def show(outdir: Path, training: Path, seconds: dict[str, float]) -> dict[str, Path]:
    """Make grid, video and progress strip of a run. -> their paths by name."""
    newest = find_snapshot(training)
    snapshot = load_network(newest)
    made = {
        "network": newest,
        "run": newest.parent,
        "grid": outdir / "grid.png",
        "video": outdir / "walk.mp4",
        "progress": outdir / "progress.png",
    }
    scale = enlargement(snapshot)
    with timed(seconds, "grid"):
        grid = grid_picture(snapshot, range(GRID_COLUMNS * GRID_ROWS), None, 1.0, GRID_COLUMNS)
        save_png(enlarge(grid, scale), made["grid"])
    with timed(seconds, "video"):
        write_video(made["video"], walk_frames(snapshot), WALK_FPS)
    with timed(seconds, "progress"):
        save_png(enlarge(progress_strip(newest.parent), scale), made["progress"])
    return made


def show_codes(outdir: Path, training: Path, data: Path, seed: int) -> dict[str, Path]:
    """Make the pictures that need an encoder. -> their paths by name."""
    from launch.latent_pictures import Encoded, interpolations, reconstructions, save_table

    made = {name: outdir / f"{name}.png" for name in ("reconstructions", "interpolations")}
    encoded = Encoded(str(training), str(data), RECONSTRUCTIONS, seed)
    save_table(reconstructions(encoded), 10, made["reconstructions"], enlargement(encoded.snapshot))
    encoded = Encoded(str(training), str(data), 2 * PAIRS, seed)
    save_table(interpolations(encoded, STEPS), STEPS + 2, made["interpolations"], enlargement(encoded.snapshot))
    return made


def judge(training: Path, data: Path, seed: int) -> dict[str, float]:
    """Estimate log p(x) of images of the dataset and print it. -> the figures of summary.json."""
    from data.dataset import ImageDataset
    from launch.likelihood_estimates import quick_bound

    found = quick_bound(load_network(training), ImageDataset(data), seed)
    click.echo(
        f"log p(x) of {found['images']} training images: at least {found['nats']:.1f} nats, "
        f"or {found['bits']:.3f} bits per number"
    )
    return {"log_likelihood": found["nats"], "bits_per_number": found["bits"]}


def walk_frames(snapshot: "Snapshot") -> Iterator[np.ndarray]:
    """Yield the frames of the video: uint8 [H, W, 3]."""
    cells = WALK_COLUMNS * WALK_ROWS
    seeds = keyframe_seeds(list(range(cells * WALK_KEYFRAMES)), cells, WALK_KEYFRAMES)
    for frame in walk(snapshot, seeds, None, 1.0, WALK_COLUMNS, WALK_FRAMES):
        yield opaque(enlarge(frame, enlargement(snapshot)))


def enlargement(snapshot: "Snapshot") -> int:
    """The factor by which pictures of a network's images are enlarged."""
    return max(CELL // max(snapshot.images.size(snapshot.stage)), 1)


def progress_strip(run_dir: Path) -> np.ndarray:
    """A picture with a row per latent and a column per snapshot of a run; images of early stages are enlarged to the
    last size: uint8 [H, W, C]."""
    from gan.sampling import tile

    paths = sorted(run_dir.glob("network-snapshot-*.safetensors"))
    columns = [strip_column(path) for path in spread(paths, STRIP_COLUMNS)]
    height = columns[-1].shape[1]
    for index, images in enumerate(columns):
        scale = height // images.shape[1]
        columns[index] = images.repeat(scale, axis=1).repeat(scale, axis=2)
    row_by_row = np.stack(columns, axis=1)  # [STRIP_ROWS, snapshots, H, W, C]
    return tile(row_by_row.reshape(-1, *row_by_row.shape[2:]), len(columns))


def strip_column(path: Path) -> np.ndarray:
    """The images that a snapshot makes of the strip's latents: uint8 [STRIP_ROWS, H, W, C]."""
    return np.stack(list(images_of_seeds(load_network(path), range(STRIP_ROWS), None, 1.0)))


def score(training: Path, data: Path, seed: int) -> dict[str, Any]:
    """Score the trained network and print the table. -> the figures of summary.json."""
    from data.dataset import ImageDataset

    snapshot = load_network(training)
    labeled = bool(snapshot.images.class_names)
    features = features_for(labeled)
    metrics = "fd,pr,classes" if labeled else "fd,pr"
    reference = build_reference(ImageDataset(data), snapshot.stage, seed, metrics=metrics, features=features)
    network_score = reference.score_network(snapshot, SAMPLES)
    floors = reference.floors(SAMPLES)
    click.echo(reference.summary())
    click.echo(score_table({"this network": network_score, **floors}))
    distance = network_score[f"fd-{features}"]
    half = floors[HALF].figures.get(f"fd-{features}")  # None: half of so few has no distance
    blurred = floors["blurred reals"][f"fd-{features}"]
    to_halves = f"{distance / half.value:.1f} times that between two halves of the reals, and " if half else ""
    click.echo(f"\nIts Fréchet distance is {to_halves}{distance / blurred:.2f} times that of blurred reals.")
    if half:
        click.echo("(Halves are small samples, which alone makes their distance larger.)")
    return {
        **figures(network_score),
        "provenance": network_score.provenance and network_score.provenance.to_json(),
        "images_seen": snapshot.images_seen,
        "classifier_accuracy": reference.classifier and reference.classifier.accuracy,
        "floors": {name: figures(floor) for name, floor in floors.items()},
    }


def figures(score: "Score") -> dict[str, float]:
    """The values of a score as summary.json names them."""
    names = {FIGURES.get(name, name): estimate.value for name, estimate in score.figures.items()}
    return {"samples": score.samples, **names}


def closing_words(made: dict[str, Path], outdir: Path) -> str:
    """What to look at, and what to do next."""
    shown = {str(made[name]): text for name, text in PICTURES.items() if name in made}
    shown[str(outdir / "summary.json")] = "the figures"
    width = max(map(len, shown))
    pictures = "\n         ".join(f"{path:{width}}  {text}" for path, text in shown.items())
    return f"""
Look at  {pictures}

Next     saddle prepare FOLDER mine.lmdb --resolution=64
         saddle train --data=mine.lmdb --outdir=runs
         saddle generate video --network=runs"""


if __name__ == "__main__":
    run(main, "saddle demo")
