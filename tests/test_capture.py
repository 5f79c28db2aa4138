"""Captured segments, with stand-ins for torch's graphs; tests/test_stepper.py has real ones."""

from functools import partial

import pytest
import torch

from gan.ranks import capture as module
from gan.ranks.capture import Capture, outside

done: list[str] = []


class Graph:
    """Notes what is asked of it. Ending it fails after an error within, as torch's does."""

    broken = False
    at_end = 0  # the end of which graph fails by itself, counted from 1

    def capture_begin(self, pool, capture_error_mode):
        done.append("begin")

    def capture_end(self):
        if Graph.broken or done.count("begin") == Graph.at_end:
            raise RuntimeError("operation failed due to a previous error during capture")
        done.append("end")

    def replay(self):
        done.append("replay")


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    done.clear()
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, partial(told, name), raising=False)


def told(name, *pool):
    done.append(f"{name} {pool}")


GIVEN_UP = ["_cuda_endAllocateToPool (0, (0, 7))", "_cuda_releasePool (0, (0, 7))"]


def test_what_cannot_be_captured_runs_between_two_graphs_when_they_are_replayed():
    capture = Capture()
    capture.record(lambda: outside(lambda: done.append("sum")))
    assert done == ["begin", "end", "begin", "end"]
    done.clear()
    capture.replay()
    assert done == ["replay", "sum", "replay"]
    outside(lambda: done.append("at once"))
    assert done[-1] == "at once"


def test_captures_share_memory_where_asked(monkeypatch):
    numbers = iter(range(9))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, next(numbers)))
    first = Capture()
    assert Capture(first).pool == first.pool != Capture().pool


def test_the_first_error_is_raised_and_the_allocator_is_told(monkeypatch):
    def work():
        Graph.broken = True
        raise RuntimeError("the reason")

    monkeypatch.setattr(Graph, "broken", False)
    with pytest.raises(RuntimeError, match="the reason"):
        Capture().record(work)
    assert done == ["begin", *GIVEN_UP] and module._capturing is None


@pytest.mark.parametrize(("which", "before"), [(1, ["begin"]), (2, ["begin", "end", "begin"])])
def test_a_segment_that_cannot_be_ended_leaves_its_memory_to_others(which, before, monkeypatch):
    monkeypatch.setattr(Graph, "at_end", which)
    with pytest.raises(RuntimeError, match="a previous error"):
        Capture().record(lambda: outside(lambda: None))
    assert done == [*before, *GIVEN_UP] and module._capturing is None


def test_memory_that_a_graph_releases_by_itself_is_not_released_twice(monkeypatch):
    """It does if its capture has ended, and only making it executable fails."""

    def refuse(*pool):
        raise RuntimeError("not currently recording to mempool_id")

    monkeypatch.setattr(Graph, "at_end", 1)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", refuse, raising=False)
    with pytest.raises(RuntimeError, match="a previous error"):
        Capture().record(lambda: None)
    assert done == ["begin"]
