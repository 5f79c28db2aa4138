"""What is seen of a step beside its time: its parts, its trace, its memory."""

import json
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from devices import DEVICES
from tiny import one_thread, tiny_config  # noqa: F401 - a fixture

from gan.ranks.distributed import Ranks
from launch.benchmark.step_contest import Case, Ours, build, hold_contest, line_up
from launch.benchmark.step_memory import STATUS, peak_bytes
from launch.benchmark.step_parts import PartTimer, ready_profiler, time_parts, trace, watched
from launch.settings import noise_format

NARROW = {"batch": 8, "growth.mode": "none", "growth.shares": [], "network.widths": [8, 8]}


def tiny_case(**changed: object) -> Case:
    return Case("tiny", tiny_config(NARROW | changed), noise_format(8), (0, 1))


def ours_on(device: str, **changed: object) -> Ours:
    case = tiny_case(**changed)
    ours = build(line_up(case, Ranks(device=torch.device(device)), ())["ours"], case, 1)
    assert isinstance(ours, Ours)
    return ours


@pytest.mark.parametrize("device", DEVICES)
def test_forward_passes_and_updates_are_seen_and_only_while_watched(device):
    ours = ours_on(device)
    timer = PartTimer(torch.device(device), ours.now)
    with watched(ours, timer):
        ours.step()
    # G for D's fakes, D for reals and fakes; G, and D for its fakes. Each optimizer once.
    assert [part for part, _, _ in timer.pairs].count("forward") == 5
    assert [part for part, _, _ in timer.pairs].count("optimizer") == 2
    assert all(seconds > 0 for seconds in timer.seconds().values())
    ours.step()
    assert len(timer.pairs) == 7


def test_a_conditional_network_gets_labels():
    case = tiny_case(**{"data.cond": True})
    case = replace(case, images=replace(case.images, class_names=("a", "b", "c")))
    ours = build(line_up(case, Ranks(), ())["ours"], case, 1)
    assert ours.state.networks["G"].embedding.weight.shape[0] == 3
    ours.step()
    assert ours.state.networks["G"].embedding.weight.grad.abs().sum(1).min() > 0  # each class was among the labels


def test_seconds_of_a_part_are_those_between_its_begin_and_its_end():
    readings = iter([1.0, 3.0, 10.0, 11.5, 20.0, 20.5])
    timer = PartTimer(torch.device("cpu"), lambda: next(readings))
    for part in ("forward", "optimizer", "forward"):
        timer.begin(part)
        timer.end(part)
    assert timer.seconds() == {"forward": 2.5, "optimizer": 1.5}


@pytest.mark.parametrize("device", DEVICES)
def test_parts_are_shares_of_a_step(device):
    shares = time_parts(ours_on(device))
    assert shares.keys() == {"forward", "optimizer"}
    assert min(shares.values()) > 0 and sum(shares.values()) < 1


@pytest.mark.parametrize("device", DEVICES)
def test_a_trace_holds_the_steps_operations(device, tmp_path):
    file = tmp_path / "new" / "trace.json"
    busy = trace(ours_on(device, **{"run.graphs": "0"}), file)  # calls, not a graph of them
    names = {event.get("name") for event in json.loads(file.read_text())["traceEvents"]}
    assert {"aten::mm", "gan_ops::bias_leaky_relu"} <= names
    assert busy is None if device == "cpu" else 0 < busy <= 1.1


@pytest.mark.parametrize("device", DEVICES[1:])
def test_a_trace_of_a_captured_step_holds_its_kernels(device, tmp_path):
    ready_profiler(torch.device(device))
    ours = ours_on(device)
    ours.sample(ours.warm_up)
    assert any(kind.capture for kind in ours.stepper.kinds.values())
    file = tmp_path / "trace.json"
    assert 0 < trace(ours, file) <= 1.1
    kernels = [e for e in json.loads(file.read_text())["traceEvents"] if e.get("cat") == "kernel"]
    assert len(kernels) > 100


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("changed", [{}, {"regularizer.name": "wgan_gp"}, {"regularizer.name": "spectral_norm"}])
def test_who_takes_part(device, changed):
    case = tiny_case(**changed)
    with ExitStack() as stack:
        outcome = hold_contest(case, Ranks(device=torch.device(device)), 0, ("exact",), 2, stack)
    plain = {"plain"} if not changed else set()
    bare = {"no penalty"} if changed.get("regularizer.name") != "spectral_norm" else set()
    wanted = {"ours", "exact", "products alone"} | plain | bare
    assert outcome.contestants.keys() == outcome.seconds.keys() == wanted
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in outcome.seconds.values())
    if device == "cuda":
        assert outcome.peak_bytes["ours"] > 0


@pytest.mark.skipif(not STATUS.exists(), reason="only Linux tells the peak")
def test_peak_memory_grows_with_the_batch():
    side, width = 8, 64
    cases = [
        replace(tiny_case(**{"batch": n, "network.widths": [8, width]}), preset=str(n), stages=(1,)) for n in (8, 256)
    ]
    grown = peak_bytes(cases, threads=1)
    activation = 256 * width * side * side * 4  # bytes of one; a backward pass needs several at a time
    for name in ("ours", "plain"):
        assert 0 < grown["8", 1][name] < 100e6  # without what every process of torch has
        assert grown["256", 1][name] - grown["8", 1][name] > 3 * activation
