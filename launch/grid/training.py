"""Cells that are runs of `saddle train`, each in a process of its own, scored as `saddle evaluate` does."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gan.errors import UserError
from launch.grid.cells import BY_CHANCE, Cell, Result, Work, weighted
from launch.settings import set_flags
from launch.tables import fingerprint

if TYPE_CHECKING:
    from gan.config import TrainConfig
    from gan.metrics.intervals import Estimate
    from launch.scores import Reference

DIVERGED = 3  # exit code of `saddle train`
SCORE = {"score.metrics": "", "score.features": "classifier", "score.samples": 10_000, "score.looks": 4}
ONE_CORE = {"run.threads": 1}  # `--jobs` is how a host's cores are used: results do not depend on it
COLUMNS, ROWS = 8, 4  # of the picture


def split(cell: Cell) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """(preset, settings of the training by key, settings of the scores)."""
    preset, settings, score = split_settings(cell.settings)
    method = {"objective.name": cell.objective, "regularizer.name": cell.regularizer, "seed": cell.seed}
    weight = {"regularizer.gamma": cell.gamma} if weighted(cell.regularizer) else {}
    return preset, {**settings, **method, **weight}, score


def split_settings(given: Mapping[str, Any]) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The same of a plan's settings, without the method."""
    settings = {**ONE_CORE, **given}
    preset = str(settings.pop("preset", "default"))
    score = {key: settings.pop(key, default) for key, default in SCORE.items()}
    return preset, settings, score


def configuration(preset: str, settings: Mapping[str, Any]) -> "TrainConfig":
    """That of a run. Raises UserError for what does not exist or is out of bounds."""
    from gan.config import TrainConfig, override
    from launch.settings import read_preset

    return override(override(TrainConfig(), read_preset(preset)), settings)


def config_of(cell: Cell) -> "TrainConfig":
    """The configuration of a cell's run. Raises UserError for what cannot be."""
    from gan.families import find_family

    preset, settings, _ = split(cell)
    config = configuration(preset, settings)
    find_family(config).check(config)
    return config


def on_this_host(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """A plan's settings, with the precision that this host computes in: runs in another are other cells.

    Raises UserError for settings that do not exist or are out of bounds."""
    from gan.precision import resolve

    preset, own, _ = split_settings(settings)
    compute = resolve(configuration(preset, own)).precision.compute
    return {**settings, "precision.compute": compute}


def decides(cell: Cell) -> Mapping[str, Any]:
    """All on which the result of a cell depends. Raises UserError for what cannot be, DataError for the dataset."""
    from gan.config import trajectory
    from gan.schedules import build_schedule
    from launch.scores import check_scores

    config = config_of(cell)
    score = split(cell)[2]
    dataset = opened(cell.dataset)
    for key, default in SCORE.items():
        if type(score[key]) is not type(default):
            raise UserError(f"{key} wants a {type(default).__name__}, got {score[key]!r:.100}")
    metrics, _ = check_scores(dataset, score["score.metrics"], score["score.features"], score["score.samples"])
    if "fd" not in metrics:
        raise UserError("score.metrics must name fd, by which methods are ranked")
    build_schedule(config, max(dataset.manifest.levels))  # refuses runs that are too short
    about = {"dataset": dataset.manifest.content_hash, "trajectory": trajectory(config), "kimg": config.run.kimg}
    return {**about, **score}


@cache
def opened(path: str) -> Any:
    """The dataset at a path."""
    from data.dataset import ImageDataset

    return ImageDataset(path)


def arguments(cell: Cell, outdir: str) -> list[str]:
    """Those of `saddle train`."""
    preset, settings, _ = split(cell)
    flags = [f"--data={cell.dataset}", f"--outdir={outdir}", f"--preset={preset}"]
    return flags + set_flags(settings)


def run(work: Sequence[tuple[Cell, Work]]) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Train or go on training, and score. Raises UserError for what the user can mend, SystemExit if it is stopped."""
    for cell, place in work:
        code = train(cell, place)
        folder = newest_run(place.folder)
        if code not in (0, DIVERGED):
            log = (place.folder / "train.log").read_text(errors="replace").split("\n")
            reason = next((line for line in reversed(log) if line.strip()), "")
            raise UserError(f"the training of cell {place.identity} ended with exit code {code}: {reason[:300]}")
        yield cell, result_of(cell, folder, code == DIVERGED, shared=place.folder.parents[1])


def train(cell: Cell, place: "Work") -> int:
    """Run `saddle train` in a process that keeps the claim as long as it lives. -> its exit code."""
    from launch.ranks import environment

    command = [sys.executable, "-m", "launch.train", *arguments(cell, str(place.folder))]
    ours = {name: value for name, value in environment(1).items() if not from_torchrun(name)}
    place.folder.mkdir(parents=True, exist_ok=True)
    with (place.folder / "train.log").open("ab") as log:
        child = subprocess.Popen(
            command, env=ours, pass_fds=[place.claim], process_group=0, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            return child.wait()
        except BaseException:  # a signal: let it save and end
            child.send_signal(signal.SIGTERM)
            child.wait()
            raise


def from_torchrun(variable: str) -> bool:
    """Does a rank of torchrun get this variable? A training that it starts is no such rank."""
    return variable.startswith(("TORCHELASTIC", "GROUP_", "ROLE_", "LOCAL_")) or variable in (
        "RANK",
        "WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    )


def newest_run(folder: Path) -> Path:
    """The run in a cell's folder, or the folder itself."""
    return max((path for path in folder.glob("[0-9]*") if path.is_dir()), default=folder)


def result_of(cell: Cell, folder: Path, diverged: bool, shared: Path) -> dict[str, Any]:
    """A cell's result as plain values, as launch.grid.cells.Result has them. shared: the folder of the grid."""
    from gan.metrics.classifier import one_thread
    from gan.metrics.provenance import figures_to_json
    from launch.samples import spread, whole_snapshots

    lines = stats(folder)
    config = config_of(cell)
    images = max((line["images_seen"] for line in lines), default=0)
    seconds = sum(line.get("Timing/sec_per_tick", 0.0) for line in lines)
    about: dict[str, Any] = {
        "steps": images // (config.batch * config.optimizer.n_critic),
        "images": images,
        "seconds": round(seconds, 1),
    }
    if diverged:
        reason = json.loads((folder / "exit.json").read_text())["reason"]
        known = {"dataset_hash": opened(cell.dataset).manifest.content_hash}
        return vars(Result(diverged=str(reason)[:300], figures={}, curve=[], provenance=known, **about))
    score = split(cell)[2]
    snapshots = spread(list(whole_snapshots(folder).values()), int(score["score.looks"]))
    with one_thread():
        of = (cell.dataset, snapshots[-1].stage, json.dumps(score), shared)
        reference = reference_of(*of)
        scores = [reference.score_network(snapshot, int(score["score.samples"])) for snapshot in snapshots]
    curve = [
        [snapshot.images_seen, {name: figure.value for name, figure in found.figures.items()}]
        for snapshot, found in zip(snapshots, scores, strict=True)
    ]
    provenance = scores[-1].provenance
    assert provenance
    return vars(
        Result(
            diverged="",
            figures=figures_to_json({**scores[-1].figures, **floor_of(*of)}),
            curve=curve,
            provenance=provenance.to_json(),
            picture=picture(snapshots[-1]),
            **about,
        )
    )


def stats(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's stats.jsonl."""
    path = folder / "stats.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@cache
def reference_of(dataset: str, level: int, score: str, shared: Path) -> "Reference":
    """The reals that samples are compared with, once for all cells of a process. Their features are kept in the grid's
    folder, for all its hosts."""
    from launch.scores import build_reference

    values = json.loads(score)
    metrics, features = values["score.metrics"], values["score.features"]
    data = opened(dataset)
    kept = shared / "features" / f"{fingerprint([data.manifest.content_hash, level, features])}.safetensors"
    return build_reference(data, level, 0, metrics=metrics, features=features, kept=kept)


@cache
def floor_of(dataset: str, level: int, score: str, shared: Path) -> "dict[str, Estimate]":
    """The Fréchet distance between one half of the reals and the other, by the name of a figure."""
    from launch.scores import HALF

    half = reference_of(dataset, level, score, shared).real_floors(json.loads(score)["score.samples"])[HALF]
    return {f"{name}{BY_CHANCE}": figure for name, figure in half.figures.items() if name.startswith("fd-")}


def picture(snapshot: Any) -> str:
    """A grid of samples, as a PNG in base64."""
    from launch.pictures import grid_picture, png_text

    return png_text(grid_picture(snapshot, range(COLUMNS * ROWS), None, 1.0, COLUMNS))
