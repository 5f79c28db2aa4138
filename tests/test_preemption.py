"""Stopping on a signal: state saved, 75 said, and the same command ends bit-equal; a second signal stops at once."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest
import torch
from hosts import family, kill, ranks_of, wait_until
from safetensors.torch import load_file
from tiny import tiny_config, tiny_feed, tiny_task

from data.prepare import prepare
from gan.checkpoint import newest_state
from gan.ranks.signals import SIGNALS, TOGETHER, StopRequest, listening
from gan.run import loop
from gan.state import initial_state
from launch.ranks import environment

FLAGS = [
    *("--preset=digits", "--batch=16", "--tick=0.16", "--snap=5", "--set=growth.shares=[0.5,0.5]", "--kimg=1.6"),
    *("--set=run.threads=1", "--set=network.widths=[8,8]", "--set=network.z_dim=8"),
]
TRAIN = [sys.executable, "-m", "launch.train"]
linux = pytest.mark.skipif(sys.platform != "linux", reason="finds child processes in /proc")


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "digits.lmdb"
    prepare("digits", path, resolution=(8, 8), max_images=200)
    return path


@pytest.fixture(scope="module")
def undisturbed(digits, tmp_path_factory) -> dict:
    """World size -> the weights of runs that nobody stopped."""
    weights = {}
    for ranks in (1, 2):
        folder = tmp_path_factory.mktemp("undisturbed")
        command = [*TRAIN, f"--data={digits}", f"--outdir={folder}", *FLAGS, f"--gpus={ranks}"]
        subprocess.run(command, env=environment(2), check=True, timeout=120, stdout=subprocess.DEVNULL)
        weights[ranks] = load_file(only(folder) / "training-state-0000001600" / "tensors.safetensors")
    return weights


def only(folder: Path) -> Path:
    (run,) = folder.glob("0*")
    return run


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_the_first_signal_requests_a_stop_and_a_later_one_forces_it():
    request = StopRequest()
    assert not request
    assert not request.hear(signal.SIGUSR1, 100.0) and request.by == "SIGUSR1"
    assert not request.hear(signal.SIGTERM, 100.0 + TOGETHER / 2)  # the same wish, on another way
    assert request.hear(signal.SIGTERM, 100.1 + TOGETHER) and request.by == "SIGUSR1"


def test_signals_set_the_request_in_the_block_and_are_handled_as_before_after_it():
    before = [signal.getsignal(number) for number in SIGNALS]
    with listening() as request:
        assert not request
        signal.raise_signal(signal.SIGUSR1)
        wait_until(lambda: request, 10, "hearing")
        assert request.by == "SIGUSR1"
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert not [t for t in threading.enumerate() if t.name == "saddle-signals"]


def test_a_signal_that_was_ignored_at_the_start_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with listening() as request:
            signal.raise_signal(signal.SIGHUP)
            time.sleep(0.3)
            assert not request and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_loop_finishes_the_step_saves_and_goes_on_bit_equal(tmp_path):
    task = tiny_task(tiny_config({"run.tick": 32 * 3 / 1000, "run.snap": 100}))  # else it saves at the end alone
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    whole, stopped = initial_state(task), initial_state(task)
    assert loop.train(whole, task, tiny_feed, tmp_path_of(tmp_path, "whole"), {}) == 0

    def feed(requests):
        for number, batch in enumerate(tiny_feed(requests)):
            if number == 8:  # the first is a picture of the reals
                signal.raise_signal(signal.SIGTERM)
                time.sleep(0.3)
            yield batch

    run = tmp_path_of(tmp_path, "stopped")
    assert loop.train(stopped, task, feed, run, {}) == 75
    ended = json.loads((run / "exit.json").read_text())
    assert ended == {"code": 75, "reason": "stopped: SIGTERM asked for it", "images_seen": stopped.images_seen}
    path, passed_over = newest_state(run)
    assert int(path.name[-10:]) == stopped.images_seen < 960 and not passed_over
    resumed = initial_state(task)
    resumed.load_tensors(load_file(path / "tensors.safetensors"), stopped.images_seen)
    assert loop.train(resumed, task, tiny_feed, run, {}) == 0
    assert equal(resumed.tensors(), whole.tensors())
    torch.set_num_threads(threads)


def tmp_path_of(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    return folder / name


def handle_all() -> None:
    """In a child: as if started from a terminal, even where these tests run in the background or under nohup."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


class Run:
    """`saddle train` or launch/single_node.sh on a new run, trained for a while."""

    def __init__(self, digits: Path, folder: Path, ranks: int, script: bool = False, restarts: int = 0):
        self.outdir, flags = folder / "runs", [f"--data={digits}", f"--outdir={folder / 'runs'}", *FLAGS]
        env = environment(2) | {"PYTHON": sys.executable, "RANKS": str(ranks), "RESTARTS": str(restarts)}
        script_path = str(Path(__file__).parent.parent / "launch" / "single_node.sh")
        self.command = [script_path, *flags] if script else [*TRAIN, *flags, f"--gpus={ranks}"]
        self.env = env
        self.process = subprocess.Popen(self.command, env=env, preexec_fn=handle_all)
        try:
            wait_until(lambda: list(self.outdir.glob("*/stats.jsonl")), 60, "training")
            wait_until(lambda: (only(self.outdir) / "stats.jsonl").stat().st_size, 60, "a tick")
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        kill(family(self.process.pid))
        self.process.wait(timeout=30)

    def again(self) -> dict:
        """The weights at the end of the same command."""
        subprocess.run(self.command, env=self.env, check=True, timeout=120, stdout=subprocess.DEVNULL)
        return load_file(only(self.outdir) / "training-state-0000001600" / "tensors.safetensors")


def children(pid: int, name: str) -> list[int]:
    return [p for p in family(pid) if name in Path(f"/proc/{p}/cmdline").read_text()]


@linux
@pytest.mark.slow
@pytest.mark.parametrize(
    "ranks,script,number,target",
    [
        (1, False, signal.SIGINT, lambda pid: pid),
        (2, False, signal.SIGTERM, lambda pid: pid),
        (2, False, signal.SIGTERM, lambda pid: ranks_of(pid)[1]),
        (2, True, signal.SIGUSR1, lambda pid: children(pid, "launch.ranks")[0]),
        (1, False, signal.SIGHUP, lambda pid: pid),
    ],
    ids=["alone", "saddle", "one rank", "torchrun", "hang-up"],
)
def test_stopped_with_75_and_resumed_bit_equal(digits, tmp_path, undisturbed, ranks, script, number, target):
    run = Run(digits, tmp_path, ranks, script)
    try:
        whole = family(run.process.pid)
        os.kill(target(run.process.pid), number)
        assert run.process.wait(timeout=60) == 75
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in whole), 30, "the end of all processes")
    finally:
        run.end()
    ended = json.loads((only(run.outdir) / "exit.json").read_text())
    assert (ended["code"] == 75 and signal.Signals(number).name in ended["reason"]) or ranks > 1
    assert (only(run.outdir) / f"training-state-{ended['images_seen']:010d}").exists() and ended["images_seen"] < 1600
    assert equal(run.again(), undisturbed[ranks])


@linux
@pytest.mark.slow
def test_a_rank_that_is_killed_is_started_again_with_the_others(digits, tmp_path, undisturbed):
    """Under launch/single_node.sh: from the newest state, and so to the same weights."""
    run = Run(digits, tmp_path, 2, script=True, restarts=1)
    try:
        wait_until(lambda: list(run.outdir.glob("*/training-state-*")), 60, "a state")
        before = ranks_of(run.process.pid)
        kill([before[1]])
        assert run.process.wait(timeout=120) == 0
    finally:
        run.end()
    run_directory = only(run.outdir)
    assert json.loads((run_directory / "exit.json").read_text())["code"] == 0
    assert equal(load_file(run_directory / "training-state-0000001600" / "tensors.safetensors"), undisturbed[2])


@linux
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_stops_at_once_and_what_was_saved_is_intact(digits, tmp_path, undisturbed, number):
    """One rank hangs, so that the step that the first signal waits for never ends."""
    run = Run(digits, tmp_path, 2)
    try:
        wait_until(lambda: list(run.outdir.glob("*/training-state-*")), 60, "a state")
        whole = family(run.process.pid)
        os.kill(ranks_of(run.process.pid)[1], signal.SIGSTOP)
        run.process.send_signal(number)
        time.sleep(TOGETHER + 1)
        assert run.process.poll() is None
        run.process.send_signal(number)
        assert run.process.wait(timeout=30) not in (0, 75)
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in whole), 30, "the end of all processes")
    finally:
        run.end()
    assert not (only(run.outdir) / "exit.json").exists()
    assert equal(run.again(), undisturbed[2])


@linux
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_whose_terminal_is_closed_saves_and_ends(digits, tmp_path, ranks):
    """From then on it cannot print either."""
    command = [*TRAIN, f"--data={digits}", f"--outdir={tmp_path}", *FLAGS, "--kimg=160", f"--gpus={ranks}"]
    ours, theirs = os.openpty()

    def in_the_terminal() -> None:
        handle_all()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    process = subprocess.Popen(
        command, env=environment(2), **streams, start_new_session=True, preexec_fn=in_the_terminal
    )
    os.close(theirs)
    try:
        wait_until(lambda: any(p.stat().st_size for p in tmp_path.glob("*/stats.jsonl")), 60, "a tick")
        os.close(ours)
        assert process.wait(timeout=60) == 75
    finally:
        kill(family(process.pid))
        process.wait(timeout=30)
    ended = json.loads((only(tmp_path) / "exit.json").read_text())
    assert ended["code"] == 75 and ended["images_seen"] > 0
    assert (only(tmp_path) / f"training-state-{ended['images_seen']:010d}").exists()


@linux
@pytest.mark.slow
def test_a_run_under_nohup_goes_on_when_its_terminal_is_closed(digits, tmp_path):
    command = ["nohup", *TRAIN, f"--data={digits}", f"--outdir={tmp_path}", *FLAGS, "--gpus=2"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment(2), stdout=log, stderr=log, start_new_session=True)
    try:
        wait_until(lambda: any(p.stat().st_size for p in tmp_path.glob("*/stats.jsonl")), 60, "a tick")
        for pid in family(process.pid):
            os.kill(pid, signal.SIGHUP)
        assert process.wait(timeout=60) == 0
    finally:
        kill(family(process.pid))
        process.wait(timeout=30)
    assert json.loads((only(tmp_path) / "exit.json").read_text())["code"] == 0


def test_a_second_signal_ends_a_process_whose_standard_error_nobody_reads():
    imports = "import time; from gan.ranks.signals import listening"
    code = f"{imports}\nwith listening():\n print('ready', flush=True)\n time.sleep(60)"
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stderr.close()
        process.send_signal(signal.SIGTERM)
        time.sleep(TOGETHER + 0.3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM
