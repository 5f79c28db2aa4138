"""Freed pages are kept: counted in page faults, in processes of their own, since the setting is the process's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ops import memory
from ops.registry import kernels

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not memory.is_glibc(), reason="the settings are those of glibc")
COUNT = """
import importlib.util, resource, sys, threading
import torch
spec = importlib.util.spec_from_file_location("memory", PATH)  # not import ops, which keeps pages itself
memory = importlib.util.module_from_spec(spec)
spec.loader.exec_module(memory)
if sys.argv[1] == "keep":
    memory.keep_pages()
torch.set_num_threads(1)

def faults(x, clones):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(clones):
        x.clone()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def count(*sizes):
    for megabytes in sizes:
        x = torch.ones(megabytes * 250_000)
        print(faults(x, 10), faults(x, 3) // 3)

count(100, 8)
thread = threading.Thread(target=count, args=(60, 8))
thread.start()
thread.join()
"""


def faults(what: str) -> list[list[int]]:
    """Page faults of 10 first clones and of one later, of 100 and 8 MB; of 60 and 8 MB in another thread."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    code = COUNT.replace("PATH", repr(str(ROOT / "ops" / "memory.py")))
    done = subprocess.run([sys.executable, "-c", code, what], env=ours, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [[int(number) for number in line.split()] for line in done.stdout.splitlines()]


def test_clones_of_large_tensors_fault_no_more():
    """100 MB are 24 414 pages of 4 kB, and as many faults for every clone otherwise."""
    kept = faults("keep")
    assert all(later < 50 for _, later in kept), kept
    assert kept[0][0] < 4 * 24_414, "the heap grows by far more than is in use"
    left = faults("leave")
    assert left[0][1] > 10_000 and left[2][1] > 10_000, "the trouble is gone: keep_pages may go too"


PLACES = """
import torch
from ops import bias_leaky_relu, setup_filter, upfirdn2d
filter, x, bias = setup_filter([1, 3, 3, 1]), torch.randn(8, 64, 64, 64), torch.randn(64)
for op in (lambda: upfirdn2d(x, filter, padding=[2, 1, 2, 1]), lambda: bias_leaky_relu(x, bias)):
    print(len({op().data_ptr() for _ in range(40)}))
"""


@pytest.mark.skipif(kernels() != "compiled", reason="reference kernels leave it to torch where their outputs are")
def test_outputs_of_the_same_size_come_back_to_the_same_place():
    """Else they go round six to fourteen of them, more than the cache holds."""
    done = subprocess.run([sys.executable, "-c", PLACES], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(int(places) <= 2 for places in done.stdout.split()), done.stdout


def test_what_the_user_set_stays(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_TUNABLES"))]:
        monkeypatch.delenv(name)
    calls = []

    class Libc:
        def __init__(self, name):
            self.malloc, self.free = (lambda size: None), (lambda address: None)

        def mallopt(self, number, value):
            calls.append((number.value, value.value))
            return int(number.value != refused)

    refused = None
    monkeypatch.setattr(memory.ctypes, "CDLL", Libc)
    largest = 2**31 - 1
    assert len(memory.keep_pages()) == 3
    assert calls == [(-1, -1), (-3, largest), (-2, 64 * 2**20)]
    calls.clear()
    refused = -3  # as older glibc does
    assert memory.keep_pages() == {
        "glibc.malloc.trim_threshold": -1,
        "glibc.malloc.top_pad": 64 * 2**20,
        "glibc.malloc.mmap_max": 0,
    }
    calls.clear()
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000000")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=1000000:glibc.malloc.top_pad=4096")
    assert memory.keep_pages() == {} and calls == []


def test_without_glibc_nothing_is_set(monkeypatch):
    monkeypatch.setattr(memory.ctypes, "CDLL", None)
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    assert memory.keep_pages() == {}
    monkeypatch.setattr(memory.sys, "platform", "linux")
    monkeypatch.setattr(memory.os, "confstr", lambda name: None)  # musl
    assert memory.keep_pages() == {}
