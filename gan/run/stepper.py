"""Runs training steps: eagerly, or on a GPU as captured graphs, one for each kind of step. Both give the same bits."""

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gan.draws import Draws
from gan.inputs import step_inputs
from gan.ranks.capture import Capture
from gan.ranks.statistics import Statistics
from gan.schedules import Moment
from gan.state import StepInputs, Task, TrainState

WARM_UP = 2  # eager steps of a kind before it is captured: libraries choose and allocate what they need
MOST_KINDS = 16  # of one stage; where penalties take turns there may be more: the others run eagerly, beside the graphs


@dataclass(frozen=True)
class KeptDraws(Draws):
    """Draws into tensors that stay in place: the next step's draws of the same kind are copied into them."""

    first: int = 0  # the step's first coupling group
    kept: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)  # (groups from `first` on, what is drawn) -> it

    def latents(self, purpose: str, z_dim: int) -> Tensor:
        return self._keep("latents", purpose, z_dim)

    def coins(self, purpose: str) -> Tensor:
        return self._keep("coins", purpose)

    def uniform(self, purpose: str, count: int) -> Tensor:
        return self._keep("uniform", purpose, count)

    def noise(self, purpose: str, like: Tensor) -> Tensor:
        shape = (1, *like.shape[1:])
        return self._keep("noise", purpose, _Like(shape, like.dtype, like.device))

    def _keep(self, kind: str, *what: Any) -> Tensor:
        key = (tuple(group - self.first for group in self.groups), kind, *what)
        if key not in self.kept:
            self.kept[key] = draw(self, key, self.first)
        return self.kept[key]


@dataclass(frozen=True)
class _Like:
    """Shape, dtype and device of images, which are all that drawing noise looks at."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def draw(like: Draws, key: tuple[Any, ...], first: int) -> Tensor:
    """What KeptDraws keeps under `key`, drawn for the step whose first coupling group is `first`."""
    groups, kind, *what = key
    return getattr(Draws(like.seed, [first + g for g in groups], like.size, like.device), kind)(*what)


def kept_inputs(inputs: StepInputs) -> StepInputs:
    """Inputs in tensors of their own, to be overwritten by those of later steps."""
    draws = inputs.draws
    return StepInputs(
        images=inputs.images.clone(),
        labels=None if inputs.labels is None else inputs.labels.clone(),
        numbers={name: number.clone() for name, number in inputs.numbers.items()},
        draws=KeptDraws(draws.seed, draws.groups, draws.size, draws.device, draws.groups[0]),
    )


def overwrite(kept: StepInputs, new: StepInputs) -> None:
    """Copy a step's inputs, and its draws, into the tensors of an earlier one."""
    kept.images.copy_(new.images)
    if kept.labels is not None and new.labels is not None:
        kept.labels.copy_(new.labels)
    torch._foreach_copy_(list(kept.numbers.values()), [new.numbers[name] for name in kept.numbers])
    assert isinstance(kept.draws, KeptDraws)
    for key, tensor in kept.draws.kept.items():
        tensor.copy_(draw(new.draws, key, new.draws.groups[0]))


@dataclass
class Kind:
    """Steps of one kind: the first one's moment, their inputs, how often one has run, and what was captured of it."""

    now: Moment
    inputs: StepInputs
    runs: int = 0
    capture: Capture | None = None
    gradients: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)  # parameter -> .grad in the graph


class Stepper:
    """Takes training steps that add to `stats`. say: is told once if graphs cannot be had, and why."""

    def __init__(
        self, state: TrainState, task: Task, stats: Statistics, say: Callable[[str], object] = lambda line: None
    ) -> None:
        self.state = state
        self.task = task
        self.stats = stats
        self.say = say
        self.kinds: dict[Hashable, Kind] = {}
        self.stage = -1
        self.graphs = wants_graphs(task)
        self.stream = side_stream(task)
        if task.config.run.graphs == "1" and not self.graphs:
            say("note: run.graphs=1 has no effect here: graphs need a GPU, and in exact mode a single rank")

    def step(self, now: Moment, images: Tensor, labels: Tensor | None, stopping: float = 0.0) -> None:
        """One step; arguments as in `gan.inputs.step_inputs`."""
        inputs = step_inputs(self.task, now, images, labels, stopping)
        if self.stream is None:
            self._step(now, inputs)
            return
        outer = torch.cuda.current_stream()
        self.stream.wait_stream(outer)
        with torch.cuda.stream(self.stream):
            self._step(now, inputs)
        outer.wait_stream(self.stream)

    def _step(self, now: Moment, inputs: StepInputs) -> None:
        if now.stage != self.stage:  # graphs of the stage before would hold its memory
            self.kinds.clear()
            self.stage = now.stage
        name = self.task.family.kind(self.task, now)
        kind = self.kinds.get(name)
        if kind is None and (not self.graphs or len(self.kinds) >= MOST_KINDS):
            self.task.family.step(self.state, self.task, now, inputs, self.stats)
            return
        if kind is None:
            kind = self.kinds[name] = Kind(now, kept_inputs(inputs))
        overwrite(kind.inputs, inputs)
        if self.graphs and kind.runs >= WARM_UP and not kind.capture:
            self._capture(kind)
        if kind.capture:
            kind.capture.replay()
            for parameter, gradient in kind.gradients:
                parameter.grad = gradient
        else:
            self._drop_captures()  # an eager step cannot use the memory of graphs, and may not fit beside it
            self._eager(kind)
        self.state.images_seen = now.images_seen + self.task.config.batch
        kind.runs += 1

    def _eager(self, kind: Kind) -> None:
        """A step of this kind. Its groups are those of the first one, but what is drawn for them is this step's."""
        self.task.family.step(self.state, self.task, kind.now, kind.inputs, self.stats)

    def _capture(self, kind: Kind) -> None:
        """Capture a step of this kind, or go on without graphs if that fails."""
        parameters = [p for network in self.state.trains.values() for p in self.state.networks[network].parameters()]
        for p in parameters:
            p.grad = None
        capture = Capture(next((other.capture for other in self.kinds.values() if other.capture), None))
        try:
            with capturable(self.state.optimizers.values()):
                capture.record(partial(self._eager, kind))
            kind.capture = capture
            kind.gradients = [(p, p.grad) for p in parameters]
        except RuntimeError as error:
            self.graphs = False
            self._drop_captures()
            reason = str(error).strip().splitlines()[0]
            self.say(f"note: a step could not be captured as a CUDA graph ({reason}); training goes on without graphs")

    def _drop_captures(self) -> None:
        """Free the memory of all graphs. Kinds that come again are captured again."""
        for kind in self.kinds.values():
            kind.capture = None
            kind.gradients = []


@contextmanager
def capturable(optimizers: Iterable[torch.optim.Optimizer]) -> Iterator[None]:
    """Within the block torch lets steps of the optimizers be captured.

    The fused Adam always can be, but torch refuses unless it is told so, and if it is told so it warns at eager steps.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group in groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group in groups:
            group["capturable"] = False


def side_stream(task: Task) -> torch.cuda.Stream | None:
    """The stream on which steps are captured, and run before that: the device's default stream cannot be captured."""
    return torch.cuda.Stream(task.ranks.device) if task.ranks.device.type == "cuda" else None


def wants_graphs(task: Task) -> bool:
    """Are steps captured as graphs? Only on a GPU, and not in exact mode on several ranks, whose exchange of sums is
    many messages in between."""
    how = task.config.run.graphs
    several = task.config.distributed.exact and task.ranks.world > 1
    return how != "0" and task.ranks.device.type == "cuda" and not several
