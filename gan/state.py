"""What the training loop works with: the kind of model (Family), what is fixed during a run (Task), and what changes
(TrainState)."""

import copy
import math
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from gan.config import TrainConfig
from gan.draws import Draws
from gan.flat import Flat, set_up_adam
from gan.methods.augment import AUGMENTATIONS
from gan.networks import ImageFormat, network_widths
from gan.ranks.distributed import Ranks, share
from gan.ranks.gradients import GradientSum
from gan.ranks.statistics import Statistics
from gan.schedules import Moment, Schedule, gamma_at, learning_rate

Request = tuple[int, int, int]  # (first global sample, how many, stage)
Batch = tuple[np.ndarray, np.ndarray | None]  # uint8 [n, H, W, C], int64 [n]
Feed = Callable[[Iterator[Request]], Generator[Batch, None, None]]


@dataclass(frozen=True)
class StepInputs:
    """A rank's share of a batch, and what the host computes for it (`gan.inputs`)."""

    images: Tensor  # uint8 [n, H, W, C]
    labels: Tensor | None  # int64 [n]
    numbers: Mapping[str, Tensor]  # 0-dim each: learning rates and other values of schedules
    draws: Draws  # of all of this rank's coupling groups


class Step(Protocol):
    """One training step. It updates `state` in place, and advances `state.images_seen` by a batch. `state.stop` becomes
    the sum over ranks of the number `stopping` of their inputs.

    Of `now` it uses only what its kind names (`Family.kind`); all else that differs from step to step is in `inputs`.
    """

    def __call__(
        self, state: "TrainState", task: "Task", now: Moment, inputs: StepInputs, stats: Statistics
    ) -> None: ...


@dataclass(frozen=True)
class Family:
    """A kind of model: what the loop, checkpoints, sampling and commands must know of it. Rows: `gan.families`."""

    networks: Mapping[str, Callable[[TrainConfig, ImageFormat], nn.Module]]  # name -> builds it; weights drawn in order
    generator: str  # the network that makes images: it is averaged, and a snapshot holds the average
    optimizers: Mapping[str, tuple[str, str]]  # name -> (the network it trains, its learning rate's key)
    step: Step
    kind: Callable[["Task", Moment], Hashable]  # steps of one kind differ in their inputs alone
    check: Callable[[TrainConfig], object]  # raises UserError for settings that do not go together
    remarks: Callable[[TrainConfig], Iterable[str]]  # a line on each setting that is allowed but probably a mistake
    coupled: Callable[[TrainConfig], int]  # how many consecutive samples its losses couple
    named_by: Callable[[TrainConfig], Iterable[str]]  # words for the name of a run's directory, beside dataset and size
    status: Mapping[str, str]  # name in the status line -> name of the statistic
    # numbers of its schedules, by name, beside those that all families have
    numbers: Callable[["Task", Moment], dict[str, float]] = lambda task, now: {}
    remedy: str = "lower the learning rates (optimizer.*_lr)"  # what to do if values are no longer finite
    collapses: bool = False  # can it come to make images that are all alike? Then a run watches for that

    @property
    def average(self) -> str:
        """The name of the generator's average."""
        return f"{self.generator}_ema"


@dataclass(frozen=True)
class Task:
    """Everything that stays the same during a run."""

    family: Family
    config: TrainConfig
    schedule: Schedule
    images: ImageFormat
    ranks: Ranks

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights, optimizer, losses and sums."""
        return getattr(torch, self.config.precision.dtype)

    @property
    def block(self) -> int:
        """How many samples must stay together on a rank: whole coupling groups, and all samples that a loss couples."""
        return math.lcm(self.config.distributed.group, self.family.coupled(self.config))

    @property
    def posthoc(self) -> dict[str, float]:
        """The averages that are kept for `gan.posthoc`: network -> relative length."""
        return {f"{self.family.average}_{length:g}": length for length in self.config.ema.posthoc}

    @property
    def blocks(self) -> int:
        """The number of blocks in a global batch."""
        return self.config.batch // self.block

    @property
    def groups(self) -> range:
        """The indices, within a global batch, of this rank's coupling groups. They make up whole blocks."""
        mine = share(self.blocks, self.ranks)
        per_block = self.block // self.config.distributed.group
        return range(mine.start * per_block, mine.stop * per_block)

    @property
    def parts(self) -> list[range]:
        """This rank's coupling groups, split by backward pass: in one, or in parts of `distributed.micro` samples.
        auto is one here: `gan.run.room.resolve_micro` has replaced it in a run's configuration."""
        how = self.config.distributed
        mine = self.groups
        micro = 0 if isinstance(how.micro, str) else how.micro
        samples = self.block if how.exact else micro or len(mine) * how.group
        step = max(samples // self.block, 1) * self.block // how.group
        return [mine[i : i + step] for i in range(0, len(mine), step)]

    def gamma(self, now: Moment) -> float:
        """The regularizer's weight in a step."""
        pixels = math.prod(self.images.size(now.stage))
        return gamma_at(now.images_seen, self.config.regularizer, pixels, self.schedule.total)

    def rate(self, optimizer: str) -> float:
        """An optimizer's learning rate at the beginning of the run."""
        _, key = self.family.optimizers[optimizer]
        return learning_rate(getattr(self.config.optimizer, key), network_widths(self.config, self.images))

    def draws(self, images_seen: int, groups: range | None = None) -> Draws:
        """The draws of this rank's groups, or of some of them, for the step that begins at `images_seen`."""
        groups = self.groups if groups is None else groups
        size = self.config.distributed.group
        first = images_seen // size
        return Draws(self.config.seed, range(first + groups.start, first + groups.stop), size, self.ranks.device)

    def sum_gradients(self, parameters: Iterable[Tensor], stopping: Tensor) -> GradientSum:
        """The sum over the global batch of the gradients of a loss with respect to `parameters`, for one step."""
        config = self.config
        return GradientSum(parameters, config.batch, self.blocks, self.ranks, config.distributed, stopping)

    def samples(self, images_seen: int) -> tuple[int, int]:
        """(first, count) of this rank's share of the global samples [images_seen, images_seen + batch)."""
        size = self.config.distributed.group
        return images_seen + self.groups.start * size, len(self.groups) * size


@dataclass
class TrainState:
    """Everything that changes during training."""

    networks: dict[str, Any]  # modules, with the generator's averages
    optimizers: dict[str, torch.optim.Optimizer]
    trains: dict[str, str]  # optimizer -> the network that it trains
    flat: dict[str, Flat]  # network -> its parameters in one tensor
    moments: dict[str, list[Tensor]]  # optimizer -> its state in few tensors
    skipped: Tensor  # [2] steps that non-finite values made void: in total, and the last ones in a row
    augmentation: Tensor  # [2]: its strength, and the average of D's verdicts that it follows (`adapt`)
    stop: Tensor  # 0-dim: how many ranks had been asked to stop when the last step began; not saved
    images_seen: int = 0

    def finish_step(self, images_seen: int, void: Tensor) -> None:
        """Advance the clock to `images_seen`, and count the step as skipped if `void` is 1."""
        self.skipped.copy_(torch.stack([self.skipped[0] + void, (self.skipped[1] + 1) * void]))
        self.images_seen = images_seen

    def changed_by(self, optimizer: str) -> list[Tensor]:
        """All tensors that a step of an optimizer changes: parameters, optimizer state, and the network's buffers."""
        network = self.trains[optimizer]
        return [self.flat[network].data, *self.moments[optimizer], *self.networks[network].buffers()]

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of a training state by name: `network/parameter`, `optimizer/slot/parameter`, `skipped`,
        `augmentation`."""
        flat: dict[str, Tensor] = {}
        for name, network in self.networks.items():
            flat |= {f"{name}/{key}": value for key, value in network.state_dict().items()}
        for name, optimizer in self.optimizers.items():
            flat |= dict(_optimizer_tensors(optimizer, self.networks[self.trains[name]], name))
        return flat | {"skipped": self.skipped, "augmentation": self.augmentation}

    def load_tensors(self, tensors: Mapping[str, Tensor], images_seen: int) -> None:
        """Restore everything, in place, from what `tensors` returned."""
        for name, network in self.networks.items():
            network.load_state_dict(_below(f"{name}/", tensors))
        for name, optimizer in self.optimizers.items():
            parameters = dict(self.networks[self.trains[name]].named_parameters())
            for key, value in _below(f"{name}/", tensors).items():
                slot, parameter = key.split("/")
                optimizer.state[parameters[parameter]][slot].copy_(value)
        self.skipped.copy_(tensors["skipped"])
        if "augmentation" in tensors:  # states of older versions have none
            self.augmentation.copy_(tensors["augmentation"])
        self.images_seen = images_seen


def _optimizer_tensors(optimizer: torch.optim.Optimizer, network: nn.Module, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield an optimizer's state as (name, tensor)."""
    for parameter, p in network.named_parameters():
        for slot, value in optimizer.state[p].items():
            yield f"{name}/{slot}/{parameter}", value


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose name begins with `prefix`, by the rest of their name."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def build_networks(family: Family, config: TrainConfig, images: ImageFormat) -> dict[str, Any]:
    """A family's networks with random weights, which depend on the configuration only. The global random state is
    restored afterwards. Raises UserError for widths that do not fit."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        return {name: build(config, images) for name, build in family.networks.items()}


def initial_state(task: Task) -> TrainState:
    """The state before the first step: random weights on the task's device, equal on all ranks."""
    family = task.family
    device = task.ranks.device
    networks = build_networks(family, task.config, task.images)
    for network in networks.values():
        network.to(device, task.dtype)
    for name in (family.average, *task.posthoc):
        networks[name] = copy.deepcopy(networks[family.generator]).requires_grad_(False)
        networks[name].compute = None  # pictures are made in the weights' dtype
    options = task.config.optimizer
    adam: dict[str, Any] = {"betas": options.betas, "eps": options.eps, "fused": True}
    # Fused Adam reads the learning rate from a tensor on the device; on a GPU it must be float32.
    rate_dtype = torch.float32 if device.type == "cuda" else task.dtype
    flat = {name: Flat(network) for name, network in networks.items()}
    optimizers: dict[str, torch.optim.Optimizer] = {}
    moments: dict[str, list[Tensor]] = {}
    for name, (network, _) in family.optimizers.items():
        lr = torch.tensor(task.rate(name), dtype=rate_dtype, device=device)
        optimizers[name] = torch.optim.Adam(networks[network].parameters(), lr=lr, **adam)
        moments[name] = set_up_adam(optimizers[name], flat[network])
    strength = AUGMENTATIONS[task.config.data.aug].strength
    return TrainState(
        networks=networks,
        optimizers=optimizers,
        trains={name: network for name, (network, _) in family.optimizers.items()},
        flat=flat,
        moments=moments,
        skipped=torch.zeros(2, device=device),
        augmentation=torch.tensor([strength, 0.0], dtype=task.dtype, device=device),
        stop=torch.zeros((), device=device),
    )
