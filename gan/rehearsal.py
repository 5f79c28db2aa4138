"""A training step without its numbers, on torch's meta device: what it holds in memory and what it computes, at any
resolution and batch, in a fraction of a second and without the device that will train.

The step is the family's own, so whatever a method, a penalty or a precision adds is counted. Not counted is what is
used inside one operation (workspaces of cuDNN and oneDNN; the tensor of which a gradient of `ops.conv2d` reads only the
shape), what the allocator loses to rounding, and on a GPU what `gan.run.stepper` keeps: the inputs of each kind of
step, and graphs beside the eager steps of kinds beyond MOST_KINDS.
"""

import math
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from gan.config import GrowthConfig, TrainConfig
from gan.draws import Draws
from gan.families import find_family
from gan.inputs import step_inputs
from gan.networks import ImageFormat, stage_of
from gan.ranks.distributed import Ranks
from gan.ranks.statistics import Statistics
from gan.schedules import Moment, build_schedule
from gan.state import Task, initial_state

META = torch.device("meta")
PARTS = 3  # of a batch that are rehearsed; more differ only by the images that wait for their turn
MOST_STEPS = 256  # of a cycle of steps, that are looked at


@dataclass(frozen=True)
class Operation:
    """What one operation of a step asks of a device."""

    flops: int  # of products: convolutions and matrices
    moved: int  # bytes that it reads and writes
    width: int  # the smaller number of channels of its factors; 0 for what is no product


@dataclass(frozen=True)
class Cost:
    """What a step costs: `peak` is the most bytes alive at a time, `state` those that stay from step to step."""

    state: int
    peak: int
    operations: list[tuple[float, Operation]]  # each with how often it occurs in a step on average

    @property
    def flops(self) -> float:
        """Of a step, on average over steps with and without a penalty, with and without an update of G."""
        return sum(times * operation.flops for times, operation in self.operations)


class Meter(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, and the work of all operations, while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = 0
        self.peak = 0
        self.operations: list[Operation] = []
        self._storages: dict[int, weakref.ref] = {}
        self._unsettled: tuple[int, int] | None = None  # (storage, bytes alive) of a sum that may be made in place

    def start(self) -> None:
        """Begin to count a step."""
        self.peak = self.alive
        self.operations = []
        self._unsettled = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._settle()
        known = func in ANSWERS and not (isinstance(args[0], Tensor) and args[0].device.type == "cpu")
        out = ANSWERS[func] if known else func(*args, **(kwargs or {}))
        made = [self._track(tensor) for tensor in tree_leaves(out) if isinstance(tensor, Tensor)]
        if any(made) or func._schema.is_mutable:  # and not a view
            self.operations.append(_operation(func, args, out))
        if _sums_gradients(func, args):
            self._unsettled = (args[0].untyped_storage()._cdata, self.alive)
        else:
            self.peak = max(self.peak, self.alive)
        return out

    def _settle(self) -> None:
        """Autograd adds a gradient to one that nobody else holds in place, but not while a mode like this one looks on:
        then the first term is gone by the next operation."""
        if self._unsettled and self._unsettled[0] in self._storages:
            self.peak = max(self.peak, self._unsettled[1])
        self._unsettled = None

    def _track(self, tensor: Tensor) -> bool:
        """Count a tensor's storage until it is freed. -> is it a new one?"""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return False
        self.alive += storage.nbytes()
        self._storages[key] = weakref.ref(storage, partial(self._forget, key, storage.nbytes()))
        return True

    def _forget(self, key: int, size: int, _: Any) -> None:
        self.alive -= size
        del self._storages[key]


aten = torch.ops.aten
# What a meta tensor cannot do: a number read from it is any number; the fused optimizer works in place.
ANSWERS: dict[Any, Any] = {aten._local_scalar_dense.default: 1, aten._fused_adam_.tensor_lr: None}


def _sums_gradients(func: Any, args: Sequence[Any]) -> bool:
    """Is it autograd that adds two gradients, in a backward pass without a graph of its own?"""
    backward = torch._C._current_graph_task_id() != -1
    return func is aten.add.Tensor and backward and not torch.is_grad_enabled() and isinstance(args[0], Tensor)


def _operation(func: Any, args: Sequence[Any], out: Any) -> Operation:
    read = [tensor for tensor in tree_leaves(args) if isinstance(tensor, Tensor)]
    written = [tensor for tensor in tree_leaves(out) if isinstance(tensor, Tensor)]
    moved = sum(tensor.numel() * tensor.element_size() for tensor in read + written)
    name = str(func._overloadpacket)
    if name in CONVOLUTIONS:
        weight, image = CONVOLUTIONS[name](read[0], read[1], out)
        return Operation(2 * image.numel() * weight[0].numel(), moved, min(weight.shape[:2]))
    if func._overloadpacket in flop_registry:
        flops = flop_registry[func._overloadpacket](*args, out_val=out)
        return Operation(flops, moved, min(min(tensor.shape) for tensor in read[-2:]))
    return Operation(0, moved, 0)


# (its two tensors, its result) -> the one in the place of the weight, the one in the place of the output
CONVOLUTIONS: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "gan_ops.conv2d": lambda x, weight, y: (weight, y),
    "gan_ops.conv2d_input_gradient": lambda dy, weight, dx: (weight, dy),
    "gan_ops.conv2d_weight_gradient": lambda dy, x, dweight: (dweight, dy),
}


@dataclass(frozen=True)
class NoDraws(Draws):
    """Draws of the same shapes, on the meta device."""

    def latents(self, purpose: str, z_dim: int) -> Tensor:
        return torch.empty(len(self.groups) * self.size, z_dim, device=META)

    def coins(self, purpose: str) -> Tensor:
        return torch.empty(len(self.groups) * self.size, dtype=torch.bool, device=META)

    def uniform(self, purpose: str, count: int) -> Tensor:
        return torch.empty(len(self.groups) * self.size, count, device=META)

    def noise(self, purpose: str, like: Tensor) -> Tensor:
        return torch.cat([like.new_empty((self.size, *like.shape[1:])) for _ in self.groups])


@dataclass(frozen=True)
class RehearsedTask(Task):
    """A task whose random numbers are none."""

    def draws(self, images_seen: int, groups: range | None = None) -> Draws:
        real = super().draws(images_seen, groups)
        return NoDraws(real.seed, real.groups, real.size, META)


@dataclass
class Rehearsal:
    """The networks and optimizers of a configuration on the meta device, and the cost of steps with them.

    Raises UserError for widths that do not fit.
    """

    config: TrainConfig
    images: ImageFormat
    meter: Meter = field(default_factory=Meter)

    def __post_init__(self) -> None:
        with META, self.meter:
            self.state = initial_state(self._task(self.config))

    @property
    def block(self) -> int:
        """How many samples must stay together."""
        return self._task(self.config).block

    def parameters(self, network: str, stage: int) -> int:
        """How many parameters of a network train at a stage: those of the stages up to it."""
        named = self.state.networks[network].named_parameters()
        return sum(p.numel() for name, p in named if stage_of(name) <= stage)

    def peak(self, stage: int, samples: int, micro: int = 0, fading: bool = False) -> int:
        """The peak of `cost`, of the steps with a penalty and with an update of G alone: others need less."""
        heaviest = {0, self.config.optimizer.n_critic - 1}
        return self._rehearse(stage, samples, micro, fading, dict.fromkeys(heaviest, 1.0)).peak

    def cost(self, stage: int, samples: int, micro: int = 0, fading: bool = False) -> Cost:
        """Of a step of one rank on `samples` images, in backward passes of `micro` each (0: in one)."""
        return self._rehearse(stage, samples, micro, fading, _kinds(self.config))

    def _rehearse(self, stage: int, samples: int, micro: int, fading: bool, steps: Mapping[int, float]) -> Cost:
        exact = self.config.distributed.exact
        part = self.block if exact else max((micro or samples) // self.block, 1) * self.block  # as `Task.parts` has it
        parts = math.ceil(samples / part)
        few = min(parts, PARTS)
        rehearsed = samples if few == parts else few * part
        task = self._task(_with_batch(self.config, rehearsed, micro, self.block))
        with self.meter:
            state = self._set_gradients(stage)
        operations = []
        peak = 0
        for index, weight in steps.items():
            self.meter.start()
            self._step(task, index, stage, fading)
            peak = max(peak, self.meter.peak)
            operations += [(weight * parts / few, operation) for operation in self.meter.operations]
        peak += (samples - rehearsed) * self._image(stage)
        if exact:  # sums of pairs of blocks, of pairs of pairs and so on wait for each other
            peak += math.floor(math.log2(parts / few)) * self._gradients(stage)
        return Cost(state, peak, operations)

    def _step(self, task: Task, index: int, stage: int, fading: bool) -> None:
        now = Moment(index * task.config.batch, index, stage, 0.5 if fading else 1.0, 1.0)
        height, width = self.images.size(stage)
        with self.meter:
            images = torch.empty(task.config.batch, height, width, self.images.channels, dtype=torch.uint8, device=META)
            labels = torch.empty(task.config.batch, dtype=torch.int64, device=META) if task.config.data.cond else None
            inputs = step_inputs(task, now, images, labels)
            task.family.step(self.state, task, now, inputs, Statistics())

    def _set_gradients(self, stage: int) -> int:
        """Give every parameter that trains the gradient that the step before has left -> bytes alive."""
        for network in self.state.trains.values():
            for name, p in self.state.networks[network].named_parameters():
                p.grad = torch.empty_like(p) if stage_of(name) <= stage else None
        return self.meter.alive

    def _gradients(self, stage: int) -> int:
        """Bytes of the gradients of the largest network."""
        networks = self.state.trains.values()
        return max(self.parameters(network, stage) for network in networks) * self._task(self.config).dtype.itemsize

    def _image(self, stage: int) -> int:
        """Bytes of a real image, as it was read and as the networks see it."""
        dtype = self._task(self.config).dtype
        return math.prod(self.images.size(stage)) * self.images.channels * (1 + dtype.itemsize)

    def _task(self, config: TrainConfig) -> Task:
        config = replace(config, growth=GrowthConfig(mode="none"))
        schedule = build_schedule(config, self.images.last)
        return RehearsedTask(find_family(config), config, schedule, self.images, Ranks(device=META))


def _with_batch(config: TrainConfig, batch: int, micro: int, block: int) -> TrainConfig:
    """The configuration with another batch, and the nearest share of it that a penalty can have."""
    blocks = batch // block
    share = max(round(config.regularizer.share * blocks), 1) / blocks if config.regularizer.share < 1 else 1.0
    return replace(
        config,
        batch=batch,
        regularizer=replace(config.regularizer, share=share),
        distributed=replace(config.distributed, micro=micro),
    )


def _kinds(config: TrainConfig) -> dict[int, float]:
    """A step of each kind, with and without a penalty and an update of G -> the share of steps that are of its kind."""
    every = config.regularizer.every
    n_critic = config.optimizer.n_critic
    length = min(math.lcm(every, n_critic), MOST_STEPS)
    cycle = list(range(length)) + [n_critic - 1] * (n_critic > length)  # the G update, where the cycle is too long
    first: dict[tuple[bool, bool], int] = {}
    counts: Counter[int] = Counter()
    for step in cycle:
        kind = (step % every == 0, (step + 1) % n_critic == 0)
        counts[first.setdefault(kind, step)] += 1
    return {step: count / len(cycle) for step, count in counts.items()}
