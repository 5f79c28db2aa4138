"""A run before it starts: its checked settings, its name, and the hash by which the same run is found again."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gan.config import OUTSIDE, TrainConfig, flatten, trajectory
from gan.families import build_task, find_family
from gan.networks import ImageFormat, network_widths
from gan.precision import resolve
from gan.ranks.distributed import Ranks
from gan.schedules import Schedule, build_schedule
from gan.state import Task


@dataclass(frozen=True)
class RunPlan:
    """A checked configuration, with the schedule and the name that follow from it."""

    config: TrainConfig
    schedule: Schedule
    images: ImageFormat
    name: str  # of the run's directory, without its number
    options: dict[str, Any]  # what training_options.json holds

    @property
    def trajectory_hash(self) -> str:
        """A hash of everything that decides the weights: runs with the same hash are the same run."""
        return self.options["trajectory_hash"]

    def task(self, ranks: Ranks) -> Task:
        """The task of one rank. Raises UserError if there are more ranks than blocks in a batch."""
        task = build_task(self.config, self.schedule, self.images, ranks)
        _ = task.groups
        return task


def plan_run(
    config: TrainConfig, images: ImageFormat, dataset: str, preset: str = "default", data: str | None = None
) -> RunPlan:
    """Check that a configuration fits the dataset's images, and name the run.

    dataset: a short name for the run's directory. data: the dataset's path, to be recorded in the options.
    Raises UserError for settings that do not fit together, or that this machine cannot compute with.
    """
    config = resolve(config)
    find_family(config).check(config)
    schedule = build_schedule(config, images.last)
    network_widths(config, images)
    options = {
        "data": data or dataset,
        "preset": preset,
        "config": asdict(config),
        "images": asdict(images),
        "schedule": asdict(schedule),
        "trajectory_hash": trajectory_hash(config, schedule, images),
    }
    return RunPlan(config, schedule, images, run_name(config, images, dataset, preset), options)


def trajectory_hash(config: TrainConfig, schedule: Schedule, images: ImageFormat) -> str:
    """A hash of everything that decides the weights.

    If stages are shares of the run, or gamma changes over the whole of it, the run's length is part of the trajectory.
    If stages are given in kimg, it is not, and such a run can be made longer.
    """
    gamma = config.regularizer
    over_the_run = gamma.decay != "constant" and not gamma.decay_kimg
    stages = {key: value for key, value in asdict(schedule).items() if key != "total" or over_the_run}
    values = [trajectory(config), stages, asdict(images)]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def run_name(config: TrainConfig, images: ImageFormat, dataset: str, preset: str) -> str:
    """`<preset>-<dataset>-<objective>-<regularizer>-<resolution>-b<batch>[-desc]`."""
    height, width = images.size(images.last)
    size = str(width) if height == width else f"{height}x{width}"
    # Programs such as scp and rsync take what precedes a colon in a path for the name of a host.
    methods = [re.sub("[:,=]+", "_", name) for name in find_family(config).named_by(config)]
    parts = [Path(preset).stem, dataset, *methods, size, f"b{config.batch}", config.run.desc]
    return "-".join(filter(None, parts))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The keys whose values make the runs of two options files different trajectories."""
    before = _compared(old)
    after = _compared(new)
    outside = (*(f"config.{key}" for key in OUTSIDE), "schedule.total")
    return [key for key in sorted(before | after) if before.get(key) != after.get(key) and not key.startswith(outside)]


def _compared(options: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by dotted key, converted as by JSON; keys that an older file lacks get their defaults."""
    defaults = {"config": asdict(TrainConfig())}
    given = {key: options[key] for key in ("config", "images", "schedule")}
    return flatten(json.loads(json.dumps(defaults))) | flatten(json.loads(json.dumps(given)))
