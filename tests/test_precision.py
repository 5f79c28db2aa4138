"""bfloat16 and the memory order: what is computed in which dtype, and that nothing is copied between orders."""

import subprocess
import sys

import pytest
import torch
from tiny import one_thread, tiny_config, tiny_feed, tiny_format, tiny_task  # noqa: F401 - a fixture
from torch.utils._python_dispatch import TorchDispatchMode

from gan.config import override
from gan.errors import UserError
from gan.inputs import step_inputs
from gan.precision import resolve
from gan.ranks.gradients import pack
from gan.ranks.statistics import Statistics
from gan.run.plan import plan_run
from gan.schedules import moment
from gan.state import initial_state
from gan.trainer import train_step

COPIES = {"aten::clone": 0, "aten::_to_copy": 0, "aten::copy_": 1}  # op -> position of the tensor that is copied
KERNEL = (3, 3)
BF16 = {"precision.compute": "bf16"}


def advance(values: dict, steps: int = 1, first: int = 0, state=None):
    """Steps of a tiny run -> its state and task."""
    task = tiny_task(tiny_config(values))
    state = state or initial_state(task)
    for _ in range(steps):
        now = moment(task.schedule, state.images_seen or first)
        images, labels = next(tiny_feed(iter([(*task.samples(now.images_seen), now.stage)])))
        images = torch.from_numpy(images)
        labels = torch.from_numpy(labels) if task.config.data.cond else None
        train_step(state, task, now, step_inputs(task, now, images, labels), Statistics())
    return state, task


class Watch(TorchDispatchMode):
    """Notes the dtypes of convolutions, and every copy of activations from one memory order to the other."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions: list[torch.dtype] = []
        self.reordered: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.name()
        if name.startswith("gan_ops::conv2d"):
            self.convolutions.append(args[0].dtype)
        if name in COPIES:
            copied = args[COPIES[name]]
            planes = copied.dim() == 4 and min(copied.shape[1:]) > 1
            if planes and copied.stride() != result.stride():
                self.reordered.append(tuple(copied.shape))
        return result


@pytest.mark.parametrize("values", [{}, {"data.cond": 1, "regularizer.name": "r1_r2"}, {"regularizer.name": "wgan_gp"}])
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_activations_are_copied_between_memory_orders_only_next_to_the_linear_layers(values, compute):
    """At stage 0 G's first layer hands over rows of features, and D's last takes them: there the order changes."""
    with Watch() as watch:
        advance(values | {"precision.compute": compute, "regularizer.every": 1, "growth.mode": "none"})
    assert watch.convolutions
    assert {shape[2:] for shape in watch.reordered} - {KERNEL} == {(4, 4)}


def test_every_convolution_computes_in_bfloat16_and_everything_kept_is_float32():
    with Watch() as watch:
        state, _ = advance(BF16 | {"regularizer.every": 1, "growth.mode": "none"})
    assert set(watch.convolutions) == {torch.bfloat16}
    assert {t.dtype for t in state.tensors().values()} == {torch.float32}
    assert {p.grad.dtype for p in state.networks["D"].parameters() if p.grad is not None} == {torch.float32}


def test_a_penalty_in_float32_takes_the_passes_that_it_differentiates_along():
    values = BF16 | {"growth.mode": "none", "regularizer.every": 1, "precision.penalty": "fp32"}
    with Watch() as watch:
        advance(values)
    both = {dtype: watch.convolutions.count(dtype) for dtype in set(watch.convolutions)}
    assert both.keys() == {torch.bfloat16, torch.float32}
    with Watch() as watch:
        advance(values | {"regularizer.name": "none"})
    assert set(watch.convolutions) == {torch.bfloat16}


@pytest.mark.parametrize("name", ["r1_projection", "r1_r2_projection"])
def test_a_penalty_by_steps_along_noise_is_the_same_in_bfloat16(name):
    """It divides a difference of D's outputs by .01. Rounded to 8 bits, such differences are noise."""

    def penalty(compute):
        task = tiny_task(tiny_config({"precision.compute": compute, "regularizer.name": name, "growth.mode": "none"}))
        state = initial_state(task)
        with torch.no_grad():
            state.networks["D"].logit.bias.add_(3.0)  # outputs around 3, whose steps in bfloat16 are 1/64
        now = moment(task.schedule, 0)
        images, _ = next(tiny_feed(iter([(*task.samples(0), now.stage)])))
        stats = Statistics()
        train_step(state, task, now, step_inputs(task, now, torch.from_numpy(images), None), stats)
        return stats.take()[f"Loss/{name}_penalty"]

    assert penalty("bf16") == pytest.approx(penalty("fp32"), rel=0.05)


def test_gradients_in_bfloat16_are_near_those_in_float32():
    """Of one step, relative to the size of all gradients of a network. A bfloat16 number has 8 significant bits."""
    gradients = []
    for compute in ("fp32", "bf16"):
        state, _ = advance({"precision.compute": compute, "regularizer.every": 1, "growth.mode": "none"})
        gradients.append({n: pack(list(state.networks[n].parameters()), 0.0) for n in "GD"})
    for name, exact in gradients[0].items():
        error = (gradients[1][name] - exact).norm() / exact.norm()
        assert 1e-5 < error < 6e-2


def test_a_run_in_bfloat16_stopped_after_any_step_resumes_bit_equal():
    whole, _ = advance(BF16, 7)
    for stop in (1, 4):
        half, task = advance(BF16, stop)
        resumed = initial_state(task)
        resumed.load_tensors({name: t.clone() for name, t in half.tensors().items()}, half.images_seen)
        resumed, _ = advance(BF16, 7 - stop, state=resumed)
        theirs = whole.tensors()
        assert all(torch.equal(t, theirs[name]) for name, t in resumed.tensors().items())


def test_auto_is_resolved_before_a_run_starts_and_belongs_to_its_trajectory(monkeypatch):
    config = tiny_config()
    plans = {}
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    for gpu, amx in ((False, False), (False, True), (True, False)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        monkeypatch.setattr("gan.precision.has_amx", lambda amx=amx: amx)
        plans[gpu, amx] = plan_run(config, tiny_format(), "tiny")
    assert [plan.config.precision.compute for plan in plans.values()] == ["fp32", "bf16", "bf16"]
    assert plans[False, False].trajectory_hash != plans[False, True].trajectory_hash


def test_bfloat16_without_hardware_for_it_is_refused(monkeypatch):
    with pytest.raises(UserError, match=r"float64 .* give precision.compute=fp32"):
        resolve(override(tiny_config(), BF16 | {"precision.dtype": "float64"}))
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    with pytest.raises(UserError, match="this CPU has no bfloat16 arithmetic; give"):
        resolve(override(tiny_config(), BF16))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    with pytest.raises(UserError, match="Tesla V100 has no bfloat16 arithmetic"):
        resolve(override(tiny_config(), BF16))
    assert resolve(tiny_config()).precision.compute == "fp32"


def test_numbers_too_small_for_all_their_digits_are_0_in_every_thread_of_a_run():
    code = """
import torch
from gan.ranks.distributed import Ranks, set_precision
set_precision(Ranks(), deterministic=False)
torch.set_num_threads(2)
smallest = torch.finfo(torch.float32).tiny
print(int((torch.full([1 << 20], smallest) * 0.5).count_nonzero()), int(torch.full([8], smallest).count_nonzero()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "8"]
