"""One rank of `saddle benchmark step`: ranks that sum their gradients, and ranks that do not, in turns."""

import math
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import count, repeat
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from data.dataset import ImageDataset
from data.loader import load
from gan.config import TrainConfig, override
from gan.errors import UserError
from gan.families import build_task
from gan.methods.pairs import configured
from gan.networks import ImageFormat
from gan.ranks import distributed
from gan.ranks.distributed import Ranks
from gan.ranks.statistics import Statistics
from gan.run.loop import to_device
from gan.run.stepper import Stepper
from gan.schedules import build_schedule, moment
from gan.state import Batch, Task, initial_state

ALSO: dict[str, dict[str, Any]] = {  # contestant -> what it changes in a joined one
    "exact": {"distributed.exact": True},
    "bf16": {"distributed.compress": "bf16"},
}
LARGE = 4 * 2**20  # bytes of the larger sum that the link is measured by
SECONDS = 0.3  # a sample should last


class Contestant:
    """A training state of its own, that takes steps of one stage."""

    def __init__(self, task: Task, stage: int, dataset: ImageDataset | None) -> None:
        self.task = task
        self.batches = feed(task, stage, dataset)
        self.state = initial_state(task)
        self.stepper = Stepper(self.state, task, Statistics())
        self.now = replace(moment(task.schedule, 0), stage=stage)
        self.share = task.samples(0)[1]
        self.steps = 0
        self.waited = 0.0  # seconds, for data

    def step(self) -> None:
        """One step on the next batch."""
        begin = time.perf_counter()
        images, labels = to_device(next(self.batches), self.task)
        self.waited += time.perf_counter() - begin
        now = replace(self.now, step=self.steps, images_seen=self.steps * self.task.config.batch)
        self.stepper.step(now, images, labels)
        self.steps += 1

    def sample(self, steps: int) -> float:
        """Seconds of a step, the mean of so many; all ranks begin together."""
        wait_for_all(self.task.ranks.device)
        begin = time.perf_counter()
        for _ in range(steps):
            self.step()
        if self.task.ranks.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / steps

    def messages(self) -> list[float]:
        """Bytes of D's and of G's sum, mean over steps."""
        sizes = []
        for name, every in (("D", 1), ("G", self.task.config.optimizer.n_critic)):
            gradients = [p.grad for p in self.state.networks[name].parameters() if p.grad is not None]
            sizes.append((sum(g.nbytes for g in gradients) + gradients[0].element_size()) / every if gradients else 0.0)
        return sizes


def measure_stages(
    config: TrainConfig,
    images: ImageFormat,
    dataset: ImageDataset | None,
    stages: Sequence[int],
    also: Sequence[str],
    rounds: int,
    threads: int,
) -> tuple[Ranks, list[dict[str, Any]]]:
    """Measure on the ranks that torchrun started -> (this one, a row per stage)."""
    ranks = distributed.start()
    distributed.set_threads(threads)
    distributed.set_precision(ranks, config.distributed.deterministic)
    link = time_link(ranks) if ranks.world > 1 else None
    rows = [measure_stage(config, images, ranks, stage, also, rounds, dataset) for stage in stages]
    return ranks, [{**row, "link": link} for row in rows]


def noise_format(resolution: int) -> ImageFormat:
    """Color images from 4x4 to a resolution. UserError where that is not 4, 8, 16, ..."""
    last = round(math.log2(max(resolution, 1) / 4))
    if last < 0 or 4 * 2**last != resolution:
        raise UserError(f"--resolution={resolution} is not 4, 8, 16, ...")
    return ImageFormat(channels=3, base=(4, 4), last=last, class_names=(), dataset_hash="noise")


def measure_stage(
    config: TrainConfig,
    images: ImageFormat,
    ranks: Ranks,
    stage: int,
    also: Sequence[str],
    rounds: int,
    dataset: ImageDataset | None,
) -> dict[str, Any]:
    """Every contestant in turn, in rounds that begin with another one each."""
    block = math.lcm(config.distributed.group, configured(config)[0].group)
    half = max(config.batch // 2 // block, 1) * block
    joined = replace(config, batch=config.batch * ranks.world)
    apart = Ranks(device=ranks.device)
    who = {"joined": (joined, ranks), "alone": (config, apart)}
    if ranks.world == 1:
        who["half"] = replace(config, batch=half), apart
    who |= {name: (override(joined, ALSO[name]), ranks) for name in also}
    with ExitStack() as stack:
        contestants = {}
        for name, (its, place) in who.items():
            task = build_task(its, build_schedule(its, images.last), images, place)
            contestants[name] = Contestant(task, stage, dataset)
            stack.enter_context(closing(contestants[name].batches))
        seconds = take_turns(contestants, config, rounds)
    return stage_row(contestants, seconds, images, ranks, stage)


def feed(task: Task, stage: int, dataset: ImageDataset | None) -> Generator[Batch, None, None]:
    """A rank's batches of a dataset as a run reads them, or the same noise again and again."""
    if dataset:
        requests = ((*task.samples(seen), stage) for seen in count(0, task.config.batch))
        return load(dataset, requests, task.config.seed)
    shape = (task.samples(0)[1], *task.images.size(stage), task.images.channels)
    noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return ((noise, None) for _ in repeat(None))


def take_turns(contestants: Mapping[str, Contestant], config: TrainConfig, rounds: int) -> dict[str, list[float]]:
    """Samples of each, seconds of a step, in turns. A sample holds whole periods of lazy penalties and of n_critic."""
    period = math.lcm(config.regularizer.every, config.optimizer.n_critic)
    lengths = {}
    for name, contestant in contestants.items():
        contestant.sample(period)  # what is done once
        took = distributed.from_first(contestant.sample(period))
        lengths[name] = period * max(round(SECONDS / took / period), 1)
        contestant.waited = contestant.steps = 0
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            samples[name].append(contestants[name].sample(lengths[name]))
    return samples


def stage_row(
    contestants: Mapping[str, Contestant],
    seconds: Mapping[str, list[float]],
    images: ImageFormat,
    ranks: Ranks,
    stage: int,
) -> dict[str, Any]:
    """What is reported of a stage.

    Times are those of the fastest tenth of the rounds, because other jobs of the machine can only slow a step down;
    ratios are medians over rounds of the ratio within a round.
    """
    shares = {name: contestant.share for name, contestant in contestants.items()}
    # Of all ranks together, images per second in each round.
    speeds = {name: rates(shares[name], seconds[name], ranks.device) for name in contestants}
    joined = contestants["joined"]
    times = {name: 1e3 * shares[name] * ranks.world / float(np.quantile(rate, 0.9)) for name, rate in speeds.items()}
    return {
        "gpus": ranks.world,
        "stage": stage,
        "size": images.size_name(stage),
        "shares": shares,
        "ms": times,
        "messages": joined.messages(),
        "data_wait_ms": 1e3 * joined.waited / joined.steps,
        "images_per_second": float(np.quantile(speeds["joined"], 0.9)),
        "of_alone": float(np.median(speeds["joined"] / speeds["alone"])),
        "over_joined": {name: float(np.median(speeds["joined"] / speeds[name])) for name in contestants},
    }


def rates(share: int, seconds: list[float], device: torch.device) -> np.ndarray:
    """Images per second of all ranks together, in each round."""
    mine = torch.tensor([share / s for s in seconds], dtype=torch.float64)
    return distributed.sum_over_ranks(mine.to(device)).cpu().numpy()


def time_link(ranks: Ranks) -> tuple[float, float, float]:
    """(seconds of a sum of one number, of one of LARGE bytes, LARGE), medians of the slowest rank's."""
    medians = []
    for size in (1, LARGE // 4):
        values = torch.zeros(size, device=ranks.device)
        samples = []
        for _ in range(20):
            wait_for_all(ranks.device)
            begin = time.perf_counter()
            distributed.sum_over_ranks(values)
            if ranks.device.type == "cuda":
                torch.cuda.synchronize()
            samples.append(time.perf_counter() - begin)
        medians.append(float(np.median(samples)))
    return (*distributed.from_first(medians), float(LARGE))


def wait_for_all(device: torch.device) -> None:
    """Until every rank is here and its device idle."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
