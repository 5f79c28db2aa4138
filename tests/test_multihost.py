"""Two hosts x two ranks, started by launch/multi_node.sh as a user does, and what befalls hosts, ranks and links."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hosts import NETWORK, ROOT, family, kill, listens, ranks_of, two_hosts, wait_until, why_not
from safetensors.torch import load_file

from data.prepare import prepare

pytestmark = [pytest.mark.multihost, pytest.mark.slow, pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")]
PORTS = iter(range(29600 + os.getpid() % 300, 40000, 7))
FLAGS = [
    *("--preset=digits", "--batch=16", "--tick=0.16", "--snap=1", "--set=growth.shares=[0.5,0.5]"),
    *("--set=run.threads=1", "--set=network.widths=[8,8]", "--set=network.z_dim=8", "--set=distributed.timeout=10"),
]
LENGTH = 3200  # images: 200 steps, about ten seconds


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "digits.lmdb"
    prepare("digits", path, resolution=(8, 8), max_images=200)
    return path


@pytest.fixture
def hosts(tmp_path):
    with two_hosts(tmp_path) as made:
        yield made


class Job:
    """One run on both hosts."""

    def __init__(self, hosts, digits: Path, nodes: str = "2", *flags: str, deadline: int = 60):
        self.hosts, self.out = hosts, hosts.folder / "runs"
        self.command = [str(ROOT / "launch" / "multi_node.sh"), f"--data={digits}", f"--outdir={self.out}", *FLAGS]
        self.command += [f"--kimg={LENGTH / 1000}", *flags]
        self.env = {"MASTER": "nodea", "NODES": nodes, "RANKS": "2", "DEADLINE": str(deadline)}
        self.env |= {"PYTHON": sys.executable, "JOB": f"job{os.getpid()}"}
        self.submit()

    def submit(self) -> None:
        self.env["PORT"] = str(next(PORTS))
        self.launchers = [self.start(i) for i in range(2)]

    def start(self, host: int) -> subprocess.Popen:
        return self.hosts.start(host, self.command, self.hosts.folder / f"{host}.log", self.env)

    def log(self, host: int) -> str:
        return (self.hosts.folder / f"{host}.log").read_text()

    @property
    def run(self) -> Path:
        (run,) = self.out.glob("0*")
        return run

    def seen(self) -> int:
        """Images seen by the newest training state."""
        return max((int(p.name[-10:]) for p in self.out.glob("*/training-state-*")), default=0)

    def until(self, images: int, seconds: float = 90.0) -> float:
        return wait_until(lambda: self.seen() >= images, seconds, f"image {images}")

    def begins(self) -> int:
        """How many times ranks have begun to train."""
        return sum(self.log(i).count("self-test: ") for i in range(2))

    def until_ticks_again(self, begins: int) -> float:
        """Seconds until ranks began once more, and completed a tick."""

        def again() -> bool:
            texts = [self.log(i) for i in range(2)]
            return self.begins() > begins and any(t.rpartition("self-test: ")[2].count("\ntick ") for t in texts)

        return wait_until(again, 60, "training again")

    def codes(self, seconds: float = 120.0) -> list[int]:
        return [process.wait(timeout=seconds) for process in self.launchers]

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.run / f"training-state-{LENGTH:010d}" / "tensors.safetensors")


def alone(ranks: int, digits: Path, folder: Path, *flags: str) -> dict[str, torch.Tensor]:
    """The weights of an undisturbed run on this host."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "launch.train", f"--data={digits}", f"--outdir={folder}", *FLAGS]
    command += [f"--kimg={LENGTH / 1000}", f"--gpus={ranks}", *flags]
    subprocess.run(command, env=env, check=True, timeout=200, stdout=subprocess.DEVNULL)
    (run,) = folder.glob("0*")
    return load_file(run / f"training-state-{LENGTH:010d}" / "tensors.safetensors")


@pytest.fixture(scope="module")
def undisturbed(digits, tmp_path_factory) -> dict[str, torch.Tensor]:
    return alone(4, digits, tmp_path_factory.mktemp("undisturbed"))


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    "flags,images,tolerance",
    [
        (["--set=precision.dtype=float64", "--kimg=0.48"], 480, 1e-9),  # 30 steps
        (["--set=distributed.exact=true", "--kimg=0.8"], 800, 0.0),  # 50 steps, across a growth boundary
    ],
)
def test_two_hosts_compute_what_one_rank_does(hosts, digits, tmp_path, flags, images, tolerance):
    job = Job(hosts, digits, "2", *flags)
    assert job.codes() == [0, 0]
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "launch.train", *job.command[1:], f"--outdir={tmp_path / 'alone'}"]
    subprocess.run(command, env=env, check=True, timeout=100, stdout=subprocess.DEVNULL)
    (one,) = (tmp_path / "alone").glob(f"0*/training-state-{images:010d}/tensors.safetensors")
    ours, theirs = load_file(job.run / one.relative_to(one.parents[1])), load_file(one)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=tolerance, msg=name)
    assert "self-test: 4 ranks on nodea, nodeb agree" in job.log(0)


def test_a_rank_a_host_and_both_hosts_that_are_killed_come_back(hosts, digits, undisturbed):
    job = Job(hosts, digits)
    job.until(480)
    begins = job.begins()
    kill([ranks_of(job.launchers[1].pid)[max(ranks_of(job.launchers[1].pid))]])
    took = job.until_ticks_again(begins)
    begins = job.begins()
    hosts.lose(job.launchers[1])
    job.launchers[1] = job.start(1)
    took_host = job.until_ticks_again(begins)
    begins = job.begins()
    for launcher in job.launchers:
        hosts.lose(launcher)
    job.submit()
    took_both = job.until_ticks_again(begins)
    assert job.codes() == [0, 0]
    assert equal(job.weights(), undisturbed)
    print(f"back in training after: a rank {took:.1f} s, a host {took_host:.1f} s, both hosts {took_both:.1f} s")


def test_the_other_host_goes_on_alone(hosts, digits, tmp_path):
    flags = ["--set=precision.dtype=float64"]
    job = Job(hosts, digits, "1:2", *flags)
    wait_until(lambda: "self-test: 4 ranks" in job.log(0) + job.log(1), 90, "a meeting of both")
    job.until(job.seen() + 320)
    begins = job.begins()
    hosts.lose(job.launchers[1])
    took = job.until_ticks_again(begins)
    assert job.launchers[0].wait(timeout=120) == 0
    assert "self-test: 2 ranks on nodea agree" in job.log(0)
    assert "world size was 4: samples and draws stay the same" in job.log(0)
    theirs = alone(1, digits, tmp_path / "alone", *flags)
    for name, tensor in job.weights().items():  # the same global batch, samples and draws throughout
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-8, msg=name)
    print(f"goes on alone after {took:.1f} s")


def test_a_link_that_is_down_for_a_while_costs_no_restart(hosts, digits, undisturbed):
    job = Job(hosts, digits)
    job.until(480)
    hosts.cable("down")
    time.sleep(4)
    hosts.cable("up")
    assert job.codes() == [0, 0]
    assert job.begins() == 1
    assert equal(job.weights(), undisturbed)


def test_a_link_that_stays_down_ends_the_job_and_it_can_be_submitted_again(hosts, digits, undisturbed):
    job = Job(hosts, digits, deadline=15)
    job.until(480)
    begin = time.time()
    hosts.cable("down")
    codes = job.codes(120)
    took = time.time() - begin
    assert 0 not in codes and job.seen() < LENGTH
    for host, name in enumerate(("nodea", "nodeb")):
        assert f" on {name}, after " in job.log(host) and " images, in " in job.log(host), job.log(host)
    hosts.cable("up")
    job.env["DEADLINE"] = "60"
    job.submit()
    job.until(job.seen() + 160)
    hosts.lose(job.launchers[0])  # it holds the store at which all meet
    begin = time.time()
    assert job.launchers[1].wait(timeout=120) not in (0, None)
    took_store = time.time() - begin
    assert " on nodeb, after " in job.log(1)
    job.submit()
    assert job.codes() == [0, 0]
    assert equal(job.weights(), undisturbed)
    print(f"link down: ended after {took:.1f} s; store lost: after {took_store:.1f} s")


def test_a_signal_to_one_launcher_stops_all_hosts_with_75(hosts, digits, undisturbed):
    """And until then each host listens at the address at which it reaches the other, and nowhere else."""
    job = Job(hosts, digits)
    job.until(320)
    for number, launcher in enumerate(job.launchers, 1):
        assert listens(family(launcher.pid)) == {f"{NETWORK}.{number}"}
    ranks_and_launchers = [ranks_of(p.pid) for p in job.launchers]
    assert sorted(rank for ranks in ranks_and_launchers for rank in ranks) == [0, 1, 2, 3]
    job.launchers[1].send_signal(signal.SIGUSR1)
    assert job.codes(60) == [75, 75]
    ended = json.loads((job.run / "exit.json").read_text())
    assert ended["code"] == 75 and ended["images_seen"] == job.seen() < LENGTH
    job.submit()
    assert job.codes() == [0, 0]
    assert equal(job.weights(), undisturbed)
