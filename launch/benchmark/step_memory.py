"""By how much a process grows that takes training steps on a CPU: its peak of resident memory, from the kernel.

    python -m launch.benchmark.step_memory < pickled jobs > pickled bytes

has loaded everything and computed nothing, and forks for each job, so that all begin alike.
"""

import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from gan.errors import UserError
from gan.ranks.distributed import Ranks
from launch.benchmark.step_contest import Case, build, line_up
from launch.ranks import environment
from ops.registry import kernels

STATUS = Path("/proc/self/status")
SHOWN = ("ours", "plain")
LEAST = 2  # steps that show what a step takes


@dataclass(frozen=True)
class Job:
    """A contestant of one stage on one rank."""

    case: Case
    stage: int
    name: str
    threads: int


def peak_bytes(cases: Sequence[Case], threads: int) -> dict[tuple[str, int], dict[str, int]]:
    """(preset, stage) -> of our step and of the plain loop, by name, on noise. Nothing where the kernel does not tell
    (elsewhere than on Linux). Raises UserError where the measuring process fails."""
    jobs = [
        Job(replace(case, dataset=None), stage, name, threads)
        for case in cases
        for stage in case.stages
        for name in line_up(case, Ranks(), ())
        if name in SHOWN and STATUS.exists()
    ]
    command = [sys.executable, "-m", "launch.benchmark.step_memory"]
    done = subprocess.run(command, input=pickle.dumps(jobs), stdout=subprocess.PIPE, env=environment(1))
    if done.returncode:
        raise UserError("measuring the memory of a step failed; what it said is above")
    found: dict[tuple[str, int], dict[str, int]] = {}
    for job, grown in zip(jobs, pickle.loads(done.stdout), strict=True):
        found.setdefault((job.case.preset, job.stage), {})[job.name] = grown
    return found


def growth(job: Job) -> int:
    """Bytes between this process's resident memory now and its peak while a contestant is built and takes steps."""
    torch.set_num_threads(job.threads)
    before = resident("VmRSS")
    contestant = build(line_up(job.case, Ranks(), ())[job.name], job.case, job.stage)
    for _ in range(max(contestant.period, LEAST)):
        contestant.step()
    return resident("VmHWM") - before


def resident(key: str) -> int:
    """Bytes of this process: VmRSS, resident now, or VmHWM, at the peak."""
    fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return 1024 * int(fields[key].split()[0])


def in_a_fork(job: Job) -> int:
    """`growth` in a child process. Raises RuntimeError if it did not end well."""
    reader, writer = os.pipe()
    if not os.fork():
        os.write(writer, str(growth(job)).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        found = answer.read()
    os.wait()
    if not found:
        raise RuntimeError(f"no answer for {job.name}")
    return int(found)


def main(jobs: Sequence[Job]) -> list[int]:
    """Bytes of each job."""
    kernels()  # loads ours, or compiles them
    torch.optim.Adam([torch.zeros(1)])  # the first optimizer of a process imports torch._dynamo, some 100 MB
    return [in_a_fork(job) for job in jobs]


if __name__ == "__main__":
    sys.stdout.buffer.write(pickle.dumps(main(pickle.load(sys.stdin.buffer))))
