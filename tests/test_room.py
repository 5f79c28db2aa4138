"""What fits into memory: the largest batch, accumulation by itself, and lines for what does not fit."""

import math
from dataclasses import replace

import pytest
import torch

from gan.errors import UserError
from gan.ranks.distributed import Ranks
from gan.rehearsal import Rehearsal
from gan.run import room as rooms
from gan.run.room import (
    Room,
    check_fit,
    find_room,
    is_out_of_memory,
    most_samples,
    out_of_memory,
    plan_stages,
    resolve_micro,
    settle_micro,
)
from gan.schedules import build_schedule
from tests.tiny import tiny_config, tiny_format


def room_for(peak: float) -> Room:
    """A room into which a peak just fits."""
    return Room("a toy", total=int(1.02 * peak / (1 - rooms.KEPT_FREE)), overhead=0)


def tiny_peak(samples: int, micro: int = 0, **values) -> int:
    return Rehearsal(tiny_config(values), tiny_format()).peak(2, samples, micro, fading=True)


@pytest.mark.parametrize("free", [999, 1000, 5000, 12_345, 50_000, 10**6])
@pytest.mark.parametrize("block", [1, 4, 12])
def test_the_most_samples_that_fit(free, block):
    """Against trying all, where a peak is the largest of three lines."""

    def peak(samples: int) -> int:
        return max(900 + samples, 600 + 9 * samples, 10 * samples)

    limit = Room("a toy", math.ceil(free / (1 - rooms.KEPT_FREE)), overhead=0)
    expected = max((n for n in range(block, 200_000, block) if peak(n) <= limit.free), default=0)
    assert most_samples(peak, block, limit) == (10, expected)


def test_a_plan_for_each_stage():
    config = tiny_config({"batch": 48, "regularizer.every": 1})
    schedule = build_schedule(config, 2)
    limit = room_for(tiny_peak(64))
    plans = list(plan_stages(config, tiny_format(), schedule, ranks=5, room=limit))
    assert [plan.stage for plan in plans] == [0, 1, 2]
    assert {plan.samples for plan in plans} == {12}, "12 blocks on 5 ranks: 3 blocks at most"
    assert plans[-1].largest == 64
    assert plans[0].largest > plans[1].largest > 64
    networks = Rehearsal(config, tiny_format()).state.networks
    assert plans[-1].parameters == {name: sum(p.numel() for p in networks[name].parameters()) for name in "GD"}
    assert 12 * plans[-1].per_image < plans[-1].cost.peak < tiny_peak(16)


def test_micro_auto_is_as_few_passes_as_fit():
    auto = tiny_config({"batch": 96, "distributed.micro": "auto"})
    images = tiny_format()
    assert resolve_micro(auto, images, 1, find_room()) == 0, "all of it, without a rehearsal"
    assert resolve_micro(auto, images, 1, room_for(tiny_peak(96))) == 0
    limit = room_for(1.08 * tiny_peak(96, 32))
    micro = resolve_micro(auto, images, 1, limit)
    assert micro == 32, "three equal passes"
    assert not limit.holds(tiny_peak(96, 48)), "two do not fit"
    assert resolve_micro(auto, images, 3, limit) == 0, "each of three ranks has a third"
    assert resolve_micro(auto, images, 2, limit) == 24, "each of two has a half"
    with pytest.raises(UserError, match="not even the smallest batch does: lower"):
        resolve_micro(auto, images, 1, room_for(1000))


def test_micro_auto_becomes_a_number(monkeypatch):
    monkeypatch.setattr(rooms, "find_room", lambda ranks: room_for(1.08 * tiny_peak(96, 32)))
    auto = tiny_config({"batch": 96, "distributed.micro": "auto"})
    settled = settle_micro(auto, tiny_format(), Ranks())
    assert settled == replace(auto, distributed=replace(auto.distributed, micro=32))
    assert settle_micro(settled, tiny_format(), Ranks()) is settled


def test_a_batch_that_cannot_fit_is_told_with_the_largest_that_does():
    config = tiny_config({"batch": 64})
    check_fit(config, tiny_format(), 1, room_for(tiny_peak(64)))
    limit = room_for(tiny_peak(32))
    with pytest.raises(UserError) as caught:
        check_fit(config, tiny_format(), 1, limit)
    message = str(caught.value)
    assert message.startswith("batch=64 at 16x16 does not fit into memory: a rank needs about ")
    assert "a toy has" in message and "the largest batch that does is batch=32;" in message
    check_fit(tiny_config({"batch": 32}), tiny_format(), 1, limit)
    check_fit(config, tiny_format(), 2, limit)
    check_fit(tiny_config({"batch": 64, "distributed.micro": "auto"}), tiny_format(), 1, limit)
    with pytest.raises(UserError, match="not even the smallest batch does"):
        check_fit(config, tiny_format(), 1, room_for(1000))


def test_what_may_fit_is_not_refused():
    """The estimate may be wrong by 15 %, and a wrong refusal is worse than an error later."""
    peak = tiny_peak(64)
    check_fit(tiny_config({"batch": 64}), tiny_format(), 1, Room("a toy", int(0.9 * peak), overhead=0))


def test_the_room_of_a_host_is_divided_among_its_ranks(monkeypatch, tmp_path):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(rooms, "CGROUPS", [str(limit), str(tmp_path / "missing")])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    physical = find_room().total
    assert find_room(2).total == physical // 2
    limit.write_text("max\n")
    assert find_room().total == physical
    limit.write_text("1000000000\n")
    assert find_room(4).total == 250_000_000


def test_the_room_of_a_gpu_is_all_of_it(monkeypatch):
    class Device:
        name = "NVIDIA Toy"
        total_memory = 80 * 10**9

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Device)
    assert (find_room(8).name, find_room(8).total) == ("NVIDIA Toy", 80 * 10**9)


def test_a_cpu_that_runs_out_of_memory_is_recognized():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value) and not is_out_of_memory(RuntimeError("shapes differ"))
    line = out_of_memory(caught.value, torch.device("cpu"))
    assert line.startswith("out of memory on cpu") and "lower the batch" in line and "\n" not in line


@pytest.mark.parametrize("reserved,fragmented", [(60e9, True), (41e9, False)])
def test_a_gpu_that_runs_out_of_memory(monkeypatch, reserved, fragmented):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1.5e9, 80e9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 40e9)
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ...")
    assert is_out_of_memory(error)
    line = out_of_memory(error, torch.device("cuda", 0))
    assert line.startswith("out of memory on cuda:0, tried to allocate 2.00 gib; 1.5 of 80.0 GB are free, and ")
    assert ("expandable_segments:True" in line) == fragmented
