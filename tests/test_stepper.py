"""Captured steps against eager ones: on a GPU by CUDA graphs, on a CPU by a tape that replays torch's operations."""

import gc
import weakref

import pytest
import torch
from devices import CUDA
from tiny import one_thread, tiny_config, tiny_feed, tiny_task  # noqa: F401 - a fixture
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves

from gan.ranks.distributed import Ranks
from gan.ranks.statistics import Statistics
from gan.run import stepper as module
from gan.run.loop import steps, to_device
from gan.run.stepper import WARM_UP, Stepper
from gan.state import initial_state

ONE_STAGE = {"growth.mode": "none", "growth.shares": []}
LAZY = {"regularizer.every": 3, "optimizer.n_critic": 2, "data.mirror": 1, "ema.posthoc": [0.05, 0.1]}
PAIR = {"objective.name": "relativistic", "regularizer.name": "r1_r2", "data.cond": 1, "data.aug": "diff"}
CASES = [
    LAZY,
    PAIR,
    {"regularizer.name": "wgan_gp", "distributed.micro": 16},
    {"regularizer.name": "instance_noise", "distributed.exact": True, "data.aug": "ada", "data.aug_kimg": 0.5},
    {"regularizer.name": "spectral_norm", "precision.compute": "bf16"},
    {"regularizer.name": "clip", "regularizer.gamma": 0.5},
    {"regularizer.name": "r1_r2_projection", "regularizer.share": 0.5, "regularizer.decay": "cosine"}
    | {"regularizer.decay_kimg": 1},
]


class Tape(TorchDispatchMode):
    """Stands in for `gan.ranks.capture.Capture` on a CPU: notes what torch does to which tensors, and does it again to
    the same tensors. As after a capture, nothing is changed until it is replayed."""

    def __init__(self, beside: "Tape | None" = None) -> None:
        super().__init__()
        self.operations: list[tuple] = []

    def record(self, work) -> None:
        self.before = {}
        with self:
            work()
        with torch.no_grad():
            for tensor, old in reversed(self.before.values()):  # a capture runs nothing
                tensor.copy_(old)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = {a.name: value for a, value in zip(function._schema.arguments, args, strict=False)} | kwargs
        changed = [a.name for a in function._schema.arguments if a.alias_info and a.alias_info.is_write]
        written = tree_leaves([given[name] for name in changed if name in given])
        for tensor in written:
            self.before.setdefault(id(tensor), (tensor, tensor.clone()))
        result = function(*args, **kwargs)
        self.operations.append((function, args, kwargs, result))
        return result

    def replay(self) -> None:
        with torch.no_grad():
            for function, args, kwargs, result in self.operations:
                again = function(*args, **kwargs)
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    shares = isinstance(old, torch.Tensor) and old.data_ptr() == new.data_ptr()
                    if isinstance(old, torch.Tensor) and not shares:
                        old.copy_(new)


def run(values: dict, graphs: bool, device: str = "cpu", count: int = 30):
    """All tensors after `count` steps, across two stage boundaries, and what was reported of each; and the stepper."""
    config = tiny_config(values | {"run.graphs": "auto" if graphs else "0"})
    task = tiny_task(config, Ranks(device=torch.device(device)))
    state = initial_state(task)
    stats = Statistics()
    said: list[str] = []
    stepper = Stepper(state, task, stats, said.append)
    reported = []
    for now in list(steps(task, 0))[:count]:
        images, labels = to_device(next(tiny_feed(iter([(*task.samples(now.images_seen), now.stage)]))), task)
        stepper.step(now, images, labels)
        reported.append(stats.take())
    return state, reported, stepper, said


@pytest.fixture
def tape(monkeypatch):
    """Let steps on a CPU be captured on tapes."""
    monkeypatch.setattr(module, "Capture", Tape)
    monkeypatch.setattr(module, "wants_graphs", lambda task: task.config.run.graphs != "0")
    monkeypatch.setattr(module, "side_stream", lambda task: None)


def same(values, device="cpu", count=30):
    eager, reported, *_ = run(values, False, device, count)
    captured, again, stepper, said = run(values, True, device, count)
    assert said == []
    assert any(kind.capture for kind in stepper.kinds.values())
    theirs = captured.tensors()
    assert all(torch.equal(t, theirs[name]) for name, t in eager.tensors().items())
    assert again == reported and captured.images_seen == eager.images_seen
    assert torch.equal(captured.stop, eager.stop)
    for name in ("G", "D"):
        pairs = zip(eager.networks[name].parameters(), captured.networks[name].parameters(), strict=True)
        for a, b in pairs:
            assert (a.grad is None) == (b.grad is None) and (a.grad is None or torch.equal(a.grad, b.grad))


@pytest.mark.parametrize("values", CASES)
def test_captured_steps_give_the_same_bits(values, tape):
    same(values)


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("values", CASES)
def test_graphs_give_the_same_bits(values, device):
    """Across stages for one case in float32, and within the last stage for the others in bfloat16, which saves time."""
    torch.use_deterministic_algorithms(True)
    try:
        if values is LAZY:
            same(values | {"precision.compute": "fp32"}, device)
        else:
            same(ONE_STAGE | {"precision.compute": "bf16"} | values, device, count=10)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("graphs", ["0", "auto"])
def test_nothing_waits_for_the_device_between_ticks(graphs, device):
    config = tiny_config(LAZY | ONE_STAGE | {"run.graphs": graphs})
    task = tiny_task(config, Ranks(device=torch.device(device)))
    stepper = Stepper(initial_state(task), task, Statistics())
    moments = list(steps(task, 0))
    for now in moments[:24]:  # each kind of step is captured by then
        images, labels = to_device(next(tiny_feed(iter([(*task.samples(now.images_seen), now.stage)]))), task)
        stepper.step(now, images, labels)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for now in moments[24:30]:
            images, labels = to_device(next(tiny_feed(iter([(*task.samples(now.images_seen), now.stage)]))), task)
            stepper.step(now, images, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_that_cannot_be_captured_runs_eagerly_and_says_so_once(tape, monkeypatch):
    record = Tape.record
    tapes = []

    def fail_at_the_second(self, work):
        tapes.append(self)
        if len(tapes) == 2:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        record(self, work)

    monkeypatch.setattr(Tape, "record", fail_at_the_second)
    eager, *_ = run(LAZY, False)
    captured, _, stepper, said = run(LAZY, True)
    theirs = captured.tensors()
    assert all(torch.equal(t, theirs[name]) for name, t in eager.tensors().items())
    assert len(tapes) == 2 and not stepper.graphs
    assert not any(kind.capture for kind in stepper.kinds.values())
    assert said == [
        "note: a step could not be captured as a CUDA graph (operation not permitted when stream is capturing); "
        "training goes on without graphs"
    ]


@pytest.fixture
def tapes(tape, monkeypatch):
    """[all that is recorded from now on, as weak references]."""
    recorded = []
    record = Tape.record

    def noting(self, work):
        recorded.append(weakref.ref(self))
        record(self, work)

    monkeypatch.setattr(Tape, "record", noting)
    return recorded


def test_nothing_captured_is_left_when_a_step_runs_eagerly(tapes, monkeypatch):
    """It could not use the memory of graphs. Kinds of steps become known late: here every fourth has a penalty, and at
    the end of a fade all are new."""
    eager = Stepper._eager
    left = []

    def noting(self, kind):
        if not isinstance(_get_current_dispatch_mode(), Tape):
            gc.collect()
            left.append(sum(tape() is not None for tape in tapes) + sum(len(k.gradients) for k in self.kinds.values()))
        eager(self, kind)

    monkeypatch.setattr(Stepper, "_eager", noting)
    same({"regularizer.every": 4, "optimizer.n_critic": 2})
    assert set(left) == {0} and len(left) < 30 and len(tapes) > 2


def test_steps_of_too_many_kinds_run_eagerly_beside_what_was_captured_once(tapes, monkeypatch):
    monkeypatch.setattr(module, "MOST_KINDS", 2)
    same(LAZY | ONE_STAGE)
    assert len(tapes) == 2


def test_optimizers_may_be_captured_only_while_a_step_is(tape, monkeypatch):
    """torch refuses to capture a step of an optimizer that is not capturable, and warns at an eager step of one that
    is."""
    seen = {"captured": set(), "eager": set()}
    adam_step = torch.optim.Adam.step

    def noting(optimizer, *args):
        how = "captured" if isinstance(_get_current_dispatch_mode(), Tape) else "eager"
        seen[how] |= {group["capturable"] for group in optimizer.param_groups}
        return adam_step(optimizer, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", noting)
    run(LAZY | ONE_STAGE, True, count=14)
    assert seen == {"captured": {True}, "eager": {False}}


def test_only_what_a_stage_needs_is_kept(tape):
    _, _, stepper, _ = run(LAZY, True)
    assert {now.stage for now in (kind.now for kind in stepper.kinds.values())} == {2}
    assert all(kind.runs <= WARM_UP or kind.capture for kind in stepper.kinds.values())


def test_graphs_that_cannot_be_had_are_a_note_and_steps_run_eagerly():
    task = tiny_task(tiny_config({"run.graphs": "1"}))
    said: list[str] = []
    stepper = Stepper(initial_state(task), task, Statistics(), said.append)
    assert not stepper.graphs
    assert said == ["note: run.graphs=1 has no effect here: graphs need a GPU, and in exact mode a single rank"]
