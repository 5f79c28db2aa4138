"""Steps of one stage in turns: ours, those of the plain loop, and those of ranks that do not communicate."""

import math
import time
from collections.abc import Callable, Collection, Generator, Iterable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from itertools import count, repeat
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from data.dataset import ImageDataset
from data.loader import load
from gan.config import TrainConfig, override
from gan.families import build_task
from gan.methods.pairs import configured
from gan.networks import ImageFormat
from gan.ranks import distributed
from gan.ranks.distributed import Ranks
from gan.ranks.statistics import Statistics
from gan.run.loop import to_device
from gan.run.stepper import WARM_UP, Stepper
from gan.schedules import build_schedule, moment
from gan.state import Batch, Task, initial_state
from launch.benchmark.plain_loop import PlainLoop, obstacle
from launch.benchmark.step_work import Product, Work, flops_of, seconds_alone

ALSO: dict[str, dict[str, Any]] = {  # contestant -> what it changes in ours
    "exact": {"distributed.exact": True},
    "bf16 sums": {"distributed.compress": "bf16"},
}
BARE = "no penalty"
PLAIN = ("ours", "plain")  # who takes part with --against=plain
PRODUCTS = "products alone"
SECONDS = 0.3  # a sample should last
SUMS = 20  # timings of each sum over ranks


@dataclass(frozen=True)
class Case:
    """What is measured of one preset."""

    preset: str
    config: TrainConfig
    images: ImageFormat
    stages: tuple[int, ...]
    dataset: ImageDataset | None = None


class Contestant:
    """Takes steps of one stage, and knows how long it waited for their data."""

    def __init__(self, task: Task, stage: int, dataset: ImageDataset | None = None) -> None:
        self.task = task
        self.batches = feed(task, stage, dataset)
        self.share = task.samples(0)[1]  # samples of this rank in a step
        self.period = math.lcm(task.config.regularizer.every, task.config.optimizer.n_critic)
        self.now = stopwatch(task.ranks, dataset)
        self.warm_up = self.period  # steps in which libraries choose and allocate what they need
        self.steps = 0
        self.waited = 0.0  # seconds

    def step(self) -> None:
        """One step on the next batch."""
        begin = time.perf_counter()
        images, labels = to_device(next(self.batches), self.task)
        self.waited += time.perf_counter() - begin
        self.train(images, labels)
        self.steps += 1

    def train(self, images: torch.Tensor, labels: torch.Tensor | None) -> None:
        """The step itself; images: uint8 [n, H, W, C], labels: [n] of a conditional network."""
        raise NotImplementedError

    def sample(self, steps: int) -> float:
        """Seconds of a step, the mean of so many; all ranks begin together."""
        wait_for_all(self.task.ranks.device)
        begin = self.now()
        for _ in range(steps):
            self.step()
        finish(self.task.ranks.device)
        return (self.now() - begin) / steps


class Ours(Contestant):
    """The step that `saddle train` takes."""

    def __init__(self, task: Task, stage: int, dataset: ImageDataset | None = None) -> None:
        super().__init__(task, stage, dataset)
        self.state = initial_state(task)
        self.stepper = Stepper(self.state, task, Statistics(), print)  # it says if steps could not be captured
        self.moment = replace(moment(task.schedule, 0), stage=stage)
        self.warm_up = self.period * (WARM_UP + 1)  # graphs are captured then

    def train(self, images: torch.Tensor, labels: torch.Tensor | None) -> None:
        """See Contestant."""
        now = replace(self.moment, step=self.steps, images_seen=self.steps * self.task.config.batch)
        self.stepper.step(now, images, labels)

    def messages(self) -> list[float]:
        """Bytes of D's and of G's sum over ranks, mean over steps."""
        sizes = []
        for name, every in (("D", 1), ("G", self.task.config.optimizer.n_critic)):
            gradients = [p.grad for p in self.state.networks[name].parameters() if p.grad is not None]
            sizes.append((sum(g.nbytes for g in gradients) + gradients[0].element_size()) / every if gradients else 0.0)
        return sizes


class Plain(Contestant):
    """The same step as one would write it without us."""

    def __init__(self, task: Task, stage: int, dataset: ImageDataset | None = None) -> None:
        super().__init__(task, stage, dataset)
        self.loop = PlainLoop(task.config, task.images, stage, task.ranks.device)

    def train(self, images: torch.Tensor, labels: torch.Tensor | None) -> None:
        """See Contestant."""
        shape = (2, len(images), self.task.config.network.z_dim)
        self.loop.step(images, *torch.randn(shape, device=images.device))


class Products(Contestant):
    """The convolutions and matrix products of another contestant's steps and nothing else: what this machine can do."""

    def __init__(self, who: Contestant, stage: int) -> None:
        super().__init__(who.task, stage)
        with Work() as work:
            for _ in range(self.period):
                who.step()
        self.products: dict[Product, int] = dict(work.products)
        self.flops = flops_of(work.products) / self.period  # of a step

    def sample(self, steps: int) -> float:
        """See Contestant; however many steps, it makes those products once that it has seen."""
        return seconds_alone(self.products, self.task.ranks.device) / self.period


def stopwatch(ranks: Ranks, dataset: ImageDataset | None) -> Callable[[], float]:
    """The clock of a step: for one rank of one thread on a CPU the CPU time, which other jobs disturb less. Not where
    other threads of the process read a dataset."""
    on_cpu = ranks.device.type == "cpu" and torch.get_num_threads() == 1
    alone = ranks.world == 1 and not dist.is_initialized() and not dataset
    return time.process_time if alone and on_cpu else time.perf_counter


def feed(task: Task, stage: int, dataset: ImageDataset | None) -> Generator[Batch, None, None]:
    """A rank's batches of a dataset as a run reads them, or the same noise again and again."""
    if dataset:
        requests = ((*task.samples(seen), stage) for seen in count(0, task.config.batch))
        return load(dataset, requests, task.config.seed)
    shape = (task.samples(0)[1], *task.images.size(stage), task.images.channels)
    noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    labels = np.arange(len(noise)) % max(len(task.images.class_names), 1)  # a network without classes gets none of them
    return ((noise, labels) for _ in repeat(None))


def line_up(case: Case, ranks: Ranks, also: Iterable[str]) -> dict[str, tuple[type[Contestant], TrainConfig, Ranks]]:
    """Who takes part: ours; for one rank also the plain loop, and ours without a penalty, which shows what that costs;
    for several also ours without communication."""
    config = case.config
    joined = replace(config, batch=config.batch * ranks.world)
    apart = Ranks(device=ranks.device)
    who: dict[str, tuple[type[Contestant], TrainConfig, Ranks]] = {"ours": (Ours, joined, ranks)}
    if ranks.world > 1:
        who["alone"] = (Ours, config, apart)
    else:
        if not obstacle(config):
            who["plain"] = (Plain, config, apart)
        regularizer = configured(config)[1]
        if regularizer.on_critic and regularizer.is_penalty:
            who[BARE] = (Ours, override(config, {"regularizer.name": "none"}), apart)
    return who | {name: (Ours, override(joined, ALSO[name]), ranks) for name in also}


def build(what: tuple[type[Contestant], TrainConfig, Ranks], case: Case, stage: int) -> Contestant:
    """One of `line_up`, ready for its first step."""
    kind, config, ranks = what
    return kind(build_task(config, build_schedule(config, case.images.last), case.images, ranks), stage, case.dataset)


def without_graphs(config: TrainConfig) -> TrainConfig:
    """The same, but steps are not captured as CUDA graphs."""
    return override(config, {"run.graphs": "0"})


@dataclass(frozen=True)
class Outcome:
    """Of the contestants of one stage: seconds of a step in each round, and the peak of GPU memory where there is one.
    They can still take steps."""

    contestants: dict[str, Any]
    seconds: dict[str, list[float]]
    peak_bytes: dict[str, int]
    eager: Any  # ours, whose step is a sequence of calls that can be counted and watched; None beside the plain loop


def hold_contest(
    case: Case,
    ranks: Ranks,
    stage: int,
    also: Iterable[str],
    rounds: int,
    stack: ExitStack,
    only: Collection[str] | None = None,
) -> Outcome:
    """Build all contestants of a stage, or `only` some, and let them take turns. `stack` closes what they read from."""
    contestants: dict[str, Contestant] = {}
    peaks = {}
    for name, what in line_up(case, ranks, also).items():
        if only and name not in only:
            continue
        before = reset_peak(ranks.device)
        contestants[name] = build(what, case, stage)
        stack.enter_context(closing(contestants[name].batches))
        contestants[name].sample(contestants[name].warm_up)
        if ranks.device.type == "cuda":
            peaks[name] = torch.cuda.max_memory_allocated() - before
    if only:
        return Outcome(contestants, take_turns(contestants, rounds), peaks, None)
    eager = contestants["ours"]
    kind, config, place = line_up(case, ranks, ())["ours"]
    if without_graphs(config) != config:
        eager = build((kind, without_graphs(config), place), case, stage)
        stack.enter_context(closing(eager.batches))
    if ranks.world == 1:
        contestants[PRODUCTS] = Products(eager, stage)
    return Outcome(contestants, take_turns(contestants, rounds), peaks, eager)


def take_turns(contestants: Mapping[str, Contestant], rounds: int) -> dict[str, list[float]]:
    """Samples of each, seconds of a step, in rounds that begin with another one each. A sample holds whole periods of
    lazy penalties and of n_critic."""
    period = math.lcm(*(contestant.period for contestant in contestants.values()))
    lengths = {}
    for name, contestant in contestants.items():
        took = distributed.from_first(contestant.sample(period))
        lengths[name] = period * max(round(SECONDS / took / period), 1)
        contestant.waited = contestant.steps = 0
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            samples[name].append(contestants[name].sample(lengths[name]))
    return samples


def stage_row(outcome: Outcome, case: Case, ranks: Ranks, stage: int) -> dict[str, Any]:
    """What is reported of a stage on any number of ranks.

    Times are those of the fastest tenth of the rounds, because other jobs of the machine can only slow a step down;
    ratios are medians over rounds of the ratio within a round.
    """
    contestants = outcome.contestants
    ours = contestants["ours"]
    # Of all ranks together, images per second in each round.
    speeds = {name: rates(who.share, outcome.seconds[name], ranks.device) for name, who in contestants.items()}
    best = {name: float(np.quantile(rate, 0.9)) for name, rate in speeds.items()}
    return {
        "preset": case.preset,
        "gpus": ranks.world,
        "stage": stage,
        "size": case.images.size_name(stage),
        "share": ours.share,
        "ms": {name: 1e3 * ours.share * ranks.world / rate for name, rate in best.items()},
        "messages": ours.messages(),
        "data_wait_ms": 1e3 * ours.waited / ours.steps,
        "images_per_second": best["ours"],
        "times_as_fast_as": {name: float(np.median(speeds["ours"] / speeds[name])) for name in contestants},
    }


def rates(share: int, seconds: list[float], device: torch.device) -> np.ndarray:
    """Images per second of all ranks together, in each round."""
    mine = torch.tensor([share / s for s in seconds], dtype=torch.float64)
    return distributed.sum_over_ranks(mine.to(device)).cpu().numpy()


def time_sums(sizes: list[float], device: torch.device) -> list[float]:
    """Seconds that a sum over ranks of so many bytes takes each, while nothing is computed: medians, of rank 0."""
    medians = []
    for size in sizes:
        values = torch.zeros(max(round(size / 4), 1), device=device)
        samples = []
        for _ in range(SUMS):
            wait_for_all(device)
            begin = time.perf_counter()
            distributed.sum_over_ranks(values)
            finish(device)
            samples.append(time.perf_counter() - begin)
        medians.append(float(np.median(samples)))
    return distributed.from_first(medians)


def reset_peak(device: torch.device) -> int:
    """Start to look for the peak of a GPU's memory -> bytes that are allocated already."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def finish(device: torch.device) -> None:
    """Until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def wait_for_all(device: torch.device) -> None:
    """Until every rank is here and its device idle."""
    finish(device)
    if dist.is_initialized():
        dist.barrier()
