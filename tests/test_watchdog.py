"""A rank that hangs is named, by itself and by the others; a run that gets slower or larger is told."""

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch.distributed as dist
from hosts import family, kill, ranks_of, wait_until

from data.prepare import prepare
from gan.errors import PeerError
from gan.ranks.distributed import Ranks
from gan.ranks.signals import StopRequest
from gan.ranks.watchdog import Heartbeats, Watchdog, doing, naming, place
from gan.run.drift import GROWING_TICKS, SLOW_TICKS, Drift
from launch.ranks import environment

FLAGS = [
    *("--preset=digits", "--batch=16", "--tick=0.16", "--snap=5", "--set=growth.shares=[0.5,0.5]", "--kimg=400"),
    *("--set=run.threads=1", "--set=network.widths=[8,8]", "--set=network.z_dim=8", "--gpus=2"),
]
linux = pytest.mark.skipif(sys.platform != "linux", reason="finds child processes in /proc")


@pytest.fixture
def store(monkeypatch):
    server = dist.TCPStore("localhost", 0, is_master=True)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    return server


def test_a_silent_rank_is_named_before_a_busy_one(store):
    ranks = [Heartbeats(Ranks(rank, 3), "test", 1.0) for rank in range(3)]
    for beat in range(3):
        for each in ranks[: 3 if beat < 2 else 2]:  # rank 2 falls silent
            each.say(7, "all_reduce from sum (gan/x.py:1)", True)
        ranks[0].look(10.0 * beat)
    said = ranks[0].suspects(22.0, silence=8.0)
    assert said.startswith("rank 2 on ") and "has sent nothing for 12 s" in said and "step 7" in said
    ranks[2].say(7, "read (data/store.py:88)", False)
    ranks[0].look(23.0)
    said = ranks[0].suspects(24.0, silence=8.0)
    assert said.startswith("the others wait for rank 2 on ") and said.endswith("at read (data/store.py:88)")
    ranks[2].say(7, "all_reduce", True)
    ranks[0].look(24.0)
    assert "all ranks wait" in ranks[0].suspects(24.0, silence=8.0)


def test_a_store_that_does_not_answer_is_named(monkeypatch):
    code = "import torch.distributed as d, time; s = d.TCPStore('localhost', 0, is_master=True);"
    code += "print(s.port, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as server:
        try:
            monkeypatch.setenv("MASTER_ADDR", "localhost")
            monkeypatch.setenv("MASTER_PORT", server.stdout.readline().strip())
            beats = Heartbeats(Ranks(0, 2), "test", 1.0)
            beats.say(0, "x", False)
            beats.ranks = Ranks(0, 1)
            beats.look(1.0)
            beats.ranks = Ranks(0, 2)
        finally:
            server.kill()
    with pytest.raises(RuntimeError):
        beats.look(2.0)
    assert "the store at localhost:" in beats.suspects(9.0, 4.0) and "not answered for 8 s" in beats.suspects(9.0, 4.0)


def test_what_a_thread_does_is_named_by_our_code_and_the_collective_it_called():
    root = Path(__file__).parent.parent
    stack = [
        ("/x/torch/distributed/c10d_logger.py", "wrapper", 1),
        ("/x/torch/distributed/distributed_c10d.py", "all_reduce", 2),
        (f"{root}/gan/ranks/gradients.py", "sum_gradients", 67),
        (f"{root}/gan/run/loop.py", "train", 5),
    ]
    assert place(iter(stack)) == ("all_reduce from sum_gradients (gan/ranks/gradients.py:67)", True)
    assert place(iter(stack[2:])) == ("sum_gradients (gan/ranks/gradients.py:67)", False)
    where, waiting = doing(threading.get_ident())
    assert "(gan/ranks/watchdog.py:" in where and not waiting


def test_alone_a_hang_ends_the_process_with_its_stacks(tmp_path):
    code = f"""
import pathlib, time
from gan.ranks.distributed import Ranks
from gan.ranks.signals import StopRequest
from gan.ranks.watchdog import Watchdog
dog = Watchdog(Ranks(), pathlib.Path({str(tmp_path)!r}), 1.0, StopRequest())
dog.beat(41)
def the_slow_function(): time.sleep(60)
the_slow_function()
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(1), capture_output=True, text=True, timeout=50)
    assert done.returncode == 1 and "ends itself at step 42" in done.stderr and "(run.watchdog=1)" in done.stderr
    assert "the_slow_function" in (tmp_path / "hang-rank0.txt").read_text()


def test_a_stop_request_that_is_not_met_in_time_ends_the_process(tmp_path):
    code = f"""
import pathlib, time
from gan.ranks.distributed import Ranks
from gan.ranks.signals import StopRequest
from gan.ranks.watchdog import Watchdog
Watchdog(Ranks(), pathlib.Path({str(tmp_path)!r}), 2.0, StopRequest("SIGTERM", time.monotonic()), grace=1.0).beat(0)
time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(1), capture_output=True, text=True, timeout=50)
    assert done.returncode == 1 and "not stopped 1 s after SIGTERM" in done.stderr


def test_only_errors_of_collectives_become_peer_errors(tmp_path):
    dog = Watchdog(Ranks(), tmp_path, 100.0, StopRequest())
    with pytest.raises(RuntimeError, match=r"^ours$") as ours, naming(dog, lambda: "now"):
        raise RuntimeError("ours")
    assert not isinstance(ours.value, PeerError)
    code = compile("def all_reduce(): raise RuntimeError('Connection closed by peer')", "distributed_c10d.py", "exec")
    names: dict = {}
    exec(code, names)
    said = r"rank 0 on .*, now, in all_reduce.*: Connection closed by peer"
    with pytest.raises(PeerError, match=said), naming(dog, lambda: "now"):
        names["all_reduce"]()
    dog.close()
    assert not any(thread.is_alive() for thread in dog.threads)


def test_the_warning_of_lower_speed_comes_once_per_stage():
    drift = Drift()
    series = [4.0, 2.0, 2.1, *[3.2] * (SLOW_TICKS + 3)]
    said = [drift.tick(0, seconds, 1.0) for seconds in series]
    assert [len(s) for s in said] == [0] * 5 + [1] + [0] * 3
    assert "3.2 sec/kimg, and the best at this resolution was 2" in said[5][0]
    assert not any(drift.tick(1, 9.0, 1.0) for _ in range(9))  # a larger stage takes longer, rightly
    assert not any(drift.tick(1, seconds, 1.0) for seconds in [14.0, 14.0, 9.0] * 5)  # now and then is no drift


def test_the_warning_of_memory_needs_growth_in_every_tick():
    drift, n = Drift(), GROWING_TICKS
    assert not any(drift.tick(0, 1.0, 2.0 + 0.01 * i) for i in range(n))  # too little to matter
    assert not any(drift.tick(1, 1.0, 2.0 + (i % 3)) for i in range(5 * n))  # up and down
    said = [drift.tick(2, 1.0, 2.0 + 0.1 * i) for i in range(n + 5)]
    assert [len(s) for s in said] == [0] * n + [1] + [0] * 4 and "from 2 to 3 GB" in said[n][0]


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "digits.lmdb"
    prepare("digits", path, resolution=(8, 8), max_images=200)
    return path


@linux
@pytest.mark.slow
def test_a_rank_that_is_stopped_is_named_and_one_that_goes_on_in_time_is_not(digits, tmp_path):
    log = tmp_path / "log"
    command = [sys.executable, "-m", "launch.train", f"--data={digits}", f"--outdir={tmp_path}", *FLAGS]
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--set=run.watchdog=12"], env=environment(2), stdout=file, stderr=subprocess.STDOUT
        )
    ticks = lambda: log.read_text().count("\ntick ")  # noqa: E731
    try:
        wait_until(lambda: ticks() > 1, 90, "training")
        stopped = ranks_of(process.pid)[1]
        os.kill(stopped, signal.SIGSTOP)
        threading.Event().wait(5)
        os.kill(stopped, signal.SIGCONT)
        before = ticks()
        wait_until(lambda: ticks() > before + 1, 30, "going on")
        os.kill(stopped, signal.SIGSTOP)
        wait_until(lambda: "ends itself" in log.read_text(), 60, "the end")
    finally:
        kill(family(process.pid))
        process.wait(timeout=30)
    (line,) = [line for line in log.read_text().splitlines() if "ends itself" in line]
    # Wherever rank 0 was when the other stopped: in a step, or comparing weights or paths at the end of a tick.
    where = re.search(r", in (?:all_reduce|all_gather|broadcast_object_list) from (\w+) \(gan/", line)
    assert line.startswith("rank 0 on ") and where, line
    assert "rank 1 on " in line and f"(process {stopped}) has sent nothing for" in line
    (stacks,) = tmp_path.glob("0*/hang-rank0.txt")
    assert where[1] in stacks.read_text()
    assert not list(tmp_path.glob("0*/exit.json"))
