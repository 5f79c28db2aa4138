"""Tell how many images runs needed to reach a stated quality, and whether that is what such runs need."""

import math
import statistics
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gan.errors import UserError
from launch.cli import run as run_command
from launch.tables import json_option, save_rows, text_table

if TYPE_CHECKING:
    from data.dataset import ImageDataset
    from launch.scores import Reference

POINTS = Path(__file__).with_name("convergence.toml")
DEFAULT_SAMPLES = 10_000  # of each snapshot, where no point says it
DEVIATIONS = 3.0  # from the mean of known runs, up to which a run is like them
OUTSIDE = 1  # exit code where a run is not like them


@dataclass(frozen=True)
class Point:
    """A quality, and the images that runs of a preset on a dataset needed to reach it."""

    preset: str
    dataset: str  # its content hash
    distance: float  # Fréchet distance in the features of the classifier of the data
    samples: int  # of each snapshot
    kimg: tuple[float, ...] = ()  # of known runs, one a seed
    settings: Mapping[str, Any] = field(default_factory=dict)  # beside those of the preset

    def verdict(self, kimg: float) -> str:
        """What a run that needed `kimg` thousand images is, compared with the known ones; nan: it never got there."""
        if math.isnan(kimg):
            return "outside: not reached"
        if len(self.kimg) < 2:
            return "no runs to compare with"
        mean = statistics.mean(self.kimg)
        reach = DEVIATIONS * statistics.stdev(self.kimg)
        place = "inside" if abs(kimg - mean) <= reach else "outside"
        return f"{place}: {mean:.1f} ± {reach:.1f} kimg over {len(self.kimg)} seeds"


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--data", required=True, type=click.Path(path_type=Path), help="The dataset of the runs.")
@click.option("--distance", type=click.FloatRange(0), help="To reach. [default: that of the point]")
@click.option("--samples", type=click.IntRange(100), help="Samples of each snapshot. [default: those of the point]")
@json_option
def main(
    runs: tuple[Path, ...], data: Path, distance: float | None, samples: int | None, json_path: Path | None
) -> int:
    """Score the snapshots of RUNS, and find where their Fréchet distance first falls below that of the point of their
    preset and dataset (launch/benchmark/convergence.toml).

    Between two snapshots its logarithm is taken to be linear in the images seen. Exit code 1 if a run is outside of
    three standard deviations of the known runs. A run whose settings differ from the preset's is not compared with
    them.
    """
    from data.dataset import ImageDataset
    from launch.scores import build_reference

    chosen = {path: find_point(path, distance, samples) for path in runs}
    others = {path: other_settings(path, point.preset, point.settings) for path, point in chosen.items() if point.kimg}
    dataset = ImageDataset(data)
    for path, point in chosen.items():
        if point.dataset != dataset.manifest.content_hash:
            raise UserError(f"{path} was trained on another dataset than {data}; give that one")

    @cache
    def reference(level: int, count: int) -> "Reference":
        return build_reference(dataset, level, 0, metrics="fd", samples=count)

    rows: list[dict[str, Any]] = []
    for path, point in chosen.items():
        curve = score_run(path, dataset, point.samples, reference)
        kimg = crossing(curve, point.distance)
        last = curve[-1][1]
        differ = ", ".join(others.get(path, ()))
        rows.append(
            {
                "run": str(path),
                "to distance": point.distance,
                "kimg": None if math.isnan(kimg) else round(kimg, 1),
                "last distance": last,
                "known runs": f"other settings than the preset: {differ}" if differ else point.verdict(kimg),
            }
        )
    click.echo(text_table(rows))
    save_rows(json_path, rows)
    return OUTSIDE if any(row["known runs"].startswith("outside") for row in rows) else 0


def read_points() -> dict[str, Point]:
    """The known points, by their names."""
    table = tomllib.loads(POINTS.read_text())
    return {name: Point(**values | {"kimg": tuple(values["kimg"])}) for name, values in table.items()}


def find_point(run: Path, distance: float | None, samples: int | None) -> Point:
    """What a run is to reach. Raises UserError if it is no run, or if none is known for its preset and dataset and no
    distance is given."""
    options = read_options(run)
    preset, dataset = options["preset"], options["images"]["dataset_hash"]
    points = read_points()
    if distance is not None:
        return Point(preset, dataset, distance, samples or DEFAULT_SAMPLES)
    point = next((p for p in points.values() if (p.preset, p.dataset) == (preset, dataset)), None)
    if point is None:
        raise UserError(
            f"no convergence point is of preset {preset} on the dataset of {run}; say what to reach, as by "
            f"--distance=10 (known: {', '.join(points) or 'none'})"
        )
    return replace(point, samples=samples, kimg=()) if samples else point


def read_options(run: Path) -> dict[str, Any]:
    """What a run's training_options.json holds. Raises UserError if it is no run."""
    from gan.run.directories import OPTIONS
    from gan.tensor_files import parse_fields

    try:
        options = parse_fields((run / OPTIONS).read_bytes(), {"preset": str, "images": dict, "config": dict}, more=True)
        _ = options["images"]["dataset_hash"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{run} is not the directory of a run: no {OPTIONS} names its preset and dataset") from error
    return options


def other_settings(run: Path, preset: str, beside: Mapping[str, Any]) -> list[str]:
    """The settings of a run, as "KEY=VALUE", of which its preset, with those beside, has other values. Its seed may
    differ, and the precision that a machine chooses; its length may not, as growth and learning rates go by it.

    Raises UserError for settings that this version does not know.
    """
    from gan.config import TrainConfig, from_dict, override, trajectory, value_of
    from launch.settings import read_preset

    config = from_dict(read_options(run)["config"])
    wanted = override(TrainConfig(), {**read_preset(preset), **beside})
    keys = {*trajectory(config), *trajectory(wanted), "run.kimg"} - {"format", "seed", "precision.compute"}
    differ = [key for key in sorted(keys) if value_of(config, key) != value_of(wanted, key)]
    return [f"{key}={value_of(config, key)}" for key in differ]


def score_run(
    run: Path, dataset: "ImageDataset", samples: int, reference: "Callable[[int, int], Reference]"
) -> list[tuple[int, float]]:
    """(images seen, Fréchet distance) of a run's snapshots at the last stage, none of them fading, in that order.

    reference: (level, samples) -> the reals. Raises UserError if there are no such snapshots, or they do not fit the
    dataset.
    """
    from gan.metrics.classifier import one_thread
    from launch.samples import check_match, whole_snapshots

    whole = whole_snapshots(run)
    if not whole:
        raise UserError(f"{run} has no snapshot whose last stage is faded in; train on, or save more often (--snap)")
    level = max(check_match(path, network, dataset) for path, network in whole.items())
    with one_thread():
        reals = reference(level, samples)
        return [(n.images_seen, reals.score_network(n, samples)["fd-classifier"]) for n in whole.values()]


def crossing(curve: Sequence[tuple[int, float]], distance: float) -> float:
    """The thousands of images at which a curve of (images, distance) first falls to `distance`; nan if it never does.

    Between its points the logarithm of the distance is linear. A curve that begins below crossed before: its first
    point is returned.
    """
    before: tuple[int, float] | None = None
    for images, value in curve:
        if value <= distance:
            if before is None or value <= 0:
                return images / 1000
            share = math.log(before[1] / distance) / math.log(before[1] / value)
            return (before[0] + share * (images - before[0])) / 1000
        before = (images, value)
    return math.nan


if __name__ == "__main__":
    run_command(main, "saddle benchmark convergence")
