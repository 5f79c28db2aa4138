"""A step that is rehearsed on the meta device: its bytes against those of a real one, its FLOPs against arithmetic."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gan import rehearsal
from gan.config import override
from gan.methods.objectives import OBJECTIVES
from gan.methods.regularizers import REGULARIZERS
from gan.rehearsal import META, Meter, Rehearsal
from ops import conv2d, memory
from ops.registry import kernels
from tests.tiny import tiny_config, tiny_format

ROOT = Path(__file__).resolve().parent.parent


def tiny_rehearsal(values: dict | None = None) -> Rehearsal:
    return Rehearsal(tiny_config(values), tiny_format())


# Two real steps in a process that gives all memory back: its resident memory is then that of live tensors.
REAL = """
import json, os, sys
from dataclasses import replace
import torch
from gan.config import TrainConfig, override
from gan.families import build_task
from gan.inputs import step_inputs
from gan.networks import ImageFormat
from gan.ranks.distributed import Ranks
from gan.ranks.statistics import Statistics
from gan.rehearsal import Rehearsal
from gan.schedules import build_schedule, moment
from gan.state import initial_state

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))

def steps(config, images):
    task = build_task(config, build_schedule(config, images.last), images, Ranks())
    state = initial_state(task)
    for index in range(2):
        real = torch.zeros(config.batch, *images.size(images.last), 3, dtype=torch.uint8)
        now = moment(task.schedule, index * config.batch)
        task.family.step(state, task, now, step_inputs(task, now, real, None), Statistics())

def compare(values):
    last = values.pop("last")
    config = override(TrainConfig(), {"growth.mode": "none", **values})
    images = ImageFormat(3, (4, 4), last, (), "")
    steps(override(config, {"batch": 8, "network.widths": [8, 8], "distributed.micro": 0}), replace(images, last=1))
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    steps(config, images)
    peak = status("VmHWM") - before
    rehearsed = Rehearsal(config, images).cost(last, config.batch, config.distributed.micro)
    print(json.dumps([peak, rehearsed.peak]), flush=True)

torch.set_num_threads(1)
for values in json.loads(sys.argv[1]):
    if os.fork() == 0:  # a fresh heap for each
        compare(values)
        os._exit(0)
    if os.wait()[1]:
        sys.exit(1)
"""
GIVEN_BACK = {
    "MALLOC_MMAP_THRESHOLD_": "131072",
    "MALLOC_TRIM_THRESHOLD_": "131072",
    "MALLOC_MMAP_MAX_": "1000000",
    "MALLOC_TOP_PAD_": "0",
}
measured = pytest.mark.skipif(
    not memory.is_glibc() or kernels() != "compiled",
    reason="the settings are those of glibc, and reference kernels need memory of their own",
)
NARROW = {"network.widths": [64, 64, 64, 64], "network.z_dim": 64, "last": 3}
BOTH = {"objective.name": "relativistic", "regularizer.name": "r1_r2"}


def real_and_rehearsed(*configs: dict) -> list[tuple[int, int]]:
    """Bytes of the peak of two steps, for each configuration."""
    command = [sys.executable, "-c", REAL, json.dumps(configs)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | GIVEN_BACK, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("\n") == len(configs), done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


@measured
def test_the_peak_is_that_of_real_steps():
    pairs = real_and_rehearsed(NARROW | BOTH | {"batch": 16})
    assert all(0.85 < rehearsed / real < 1.15 for real, rehearsed in pairs), pairs


@pytest.mark.slow
@measured
def test_the_peak_is_that_of_real_steps_in_other_configurations():
    pairs = real_and_rehearsed(
        NARROW | {"batch": 32},
        NARROW | {"batch": 32, "distributed.micro": 8},
        NARROW | {"batch": 16, "network.recompute": 2},
        {"last": 4, "batch": 8, "network.widths": [64, 64, 64, 64, 32], "regularizer.every": 4},
        {"last": 5, "batch": 4, "network.widths": [64, 64, 64, 64, 32, 16], "regularizer.name": "wgan_gp"},
    )
    assert all(0.85 < rehearsed / real < 1.15 for real, rehearsed in pairs), pairs


def test_bytes_are_counted_while_they_live():
    meter = Meter()
    with meter:
        a = torch.empty(1000, device=META)
        view = a.view(10, 100)
        b = a + 1
        assert meter.alive == meter.peak == 8000
        del a
        assert meter.alive == 8000, "a view keeps its memory alive"
        del view, b
        assert (meter.alive, meter.peak) == (0, 8000)


def test_gradients_that_autograd_adds_in_place_need_no_third():
    """d/dx (f(x) + g(x)): two gradients of x, of 4000 bytes each, meet. Autograd adds one to the other in place, though
    not while a mode looks on, as here."""
    meter = Meter()
    x = torch.zeros(1000, device=META, requires_grad=True)
    with meter:
        y = (x * 2 + x * 3).sum()
        meter.start()
        torch.autograd.grad(y, x)
    assert meter.peak - meter.alive <= 3 * 4000


@pytest.mark.parametrize("by", ["image", "weight"])
def test_flops_of_a_convolution_and_of_its_derivatives(by):
    """2 * N * H * W * O * I * 9 for the convolution, and as many for its derivative by the image or by the weight."""
    x = torch.zeros(2, 6, 8, 8, device=META, requires_grad=by == "image")
    weight = torch.zeros(5, 6, 3, 3, device=META, requires_grad=by == "weight")
    meter = Meter()
    with meter:
        torch.autograd.grad(conv2d(x, weight, 1).sum(), x if by == "image" else weight)
    products = [operation for operation in meter.operations if operation.flops]
    assert [(product.flops, product.width) for product in products] == [(2 * 2 * 8 * 8 * 5 * 6 * 9, 5)] * 2


def test_flops_of_a_matrix_product():
    meter = Meter()
    with meter:
        torch.zeros(3, 4, device=META) @ torch.zeros(4, 5, device=META)
    assert sum(operation.flops for operation in meter.operations) == 2 * 3 * 4 * 5


def test_flops_and_memory_grow_by_equal_amounts_with_the_batch():
    rehearsed = tiny_rehearsal()
    costs = [rehearsed.cost(2, batch) for batch in (64, 128, 192)]
    assert costs[2].flops - costs[1].flops == pytest.approx(costs[1].flops - costs[0].flops)
    assert costs[2].peak - costs[1].peak == pytest.approx(costs[1].peak - costs[0].peak, rel=0.01)


@pytest.mark.parametrize("name", REGULARIZERS)
def test_every_regularizer_can_be_rehearsed(name):
    objective = "f:kl" if name == "roth" else "nonsaturating"
    values = {"regularizer.name": name, "objective.name": objective, "data.mirror": True, "data.cond": True}
    assert tiny_rehearsal(values).cost(1, 32, fading=True).peak > 0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_can_be_rehearsed(name):
    values = {"objective.name": name, "regularizer.name": "none", "data.aug": "diff"}
    assert tiny_rehearsal(values).cost(1, 32).peak > 0


def test_a_penalty_on_a_share_of_the_batch_needs_less():
    whole, quarter = (tiny_rehearsal({"regularizer.share": share}).peak(2, 32) for share in (1, 0.25))
    assert quarter < whole


def test_parts_are_whole_blocks_as_in_training():
    ours, theirs = (tiny_rehearsal({}).cost(2, 32, micro) for micro in (7, 4))
    assert ours.flops == theirs.flops and ours.peak == pytest.approx(theirs.peak, rel=1e-3)


def test_parts_that_are_not_rehearsed_only_wait(monkeypatch):
    for values, micro in (({}, 8), ({"distributed.exact": True}, 0)):
        estimated = tiny_rehearsal(values).cost(2, 64, micro)
        monkeypatch.setattr(rehearsal, "PARTS", 100)
        complete = tiny_rehearsal(values).cost(2, 64, micro)
        assert estimated.peak == pytest.approx(complete.peak, rel=0.02)
        assert estimated.flops == pytest.approx(complete.flops, rel=0.02)
        monkeypatch.undo()


def test_updates_of_g_and_penalties_count_as_often_as_they_occur():
    every = tiny_rehearsal({"regularizer.every": 1}).cost(2, 32).flops
    half = tiny_rehearsal({"regularizer.every": 2}).cost(2, 32).flops
    never = tiny_rehearsal({"regularizer.name": "none"}).cost(2, 32).flops
    assert half == pytest.approx((every + never) / 2, rel=0.01)
    rarely = override(tiny_config({"regularizer.name": "none"}), {"optimizer.n_critic": 1000})
    seldom = override(rarely, {"optimizer.n_critic": 4})
    without, fourth = (Rehearsal(config, tiny_format()).cost(2, 32).flops for config in (rarely, seldom))
    assert fourth == pytest.approx(without + (never - without) / 4, rel=0.02)


def test_nothing_is_allocated():
    """A generator of 4 GB."""
    config = override(tiny_config(), {"network.widths": [4096, 4096, 4096], "network.z_dim": 512})
    cost = Rehearsal(config, tiny_format()).cost(2, 32)
    assert cost.state > 10e9
