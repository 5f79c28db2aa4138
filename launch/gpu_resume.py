"""Does a run end in the same bits when it is killed and resumed, without CUDA graphs, and as a rank of torchrun?

    python -m launch.gpu_resume FOLDER [FLAGS OF saddle train]

trains small runs on the built-in digits side by side, with deterministic algorithms. `launch/gpu_check.sh` calls it.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from data.prepare import prepare
from gan.errors import UserError
from launch.ranks import environment

RESOLUTION = 16
STEPS = 160
BATCH = 32
TICK = 10  # steps between two saves
FLAGS = (
    *("--preset=digits", "--cond=1", f"--batch={BATCH}", f"--kimg={STEPS * BATCH / 1000}"),
    *(f"--tick={TICK * BATCH / 1000}", "--snap=1", "--set=distributed.deterministic=1", "--set=run.threads=1"),
)
RANK = ("launch.ranks", "--standalone", "--nproc-per-node=1", "-m", "launch.train")
RUNS = {  # name -> what is started, further flags
    "undisturbed": (("launch.train",), ()),
    "without graphs": (("launch.train",), ("--set=run.graphs=0",)),
    "under torchrun": (RANK, ()),
    "killed": (("launch.train",), ()),
}
PATIENCE = 90.0  # seconds for the first state, and for the end


def start(name: str, folder: Path, flags: list[str]) -> subprocess.Popen:
    """Begin or resume a run, in a process group of its own, with its output in a file."""
    module, more = RUNS[name]
    command = [sys.executable, "-m", *module, f"--data={folder / 'digits.lmdb'}", f"--outdir={folder / name}"]
    with (folder / f"{name}.txt").open("a") as log:
        return subprocess.Popen(
            [*command, *FLAGS, *more, *flags], env=environment(1), stdout=log, stderr=log, start_new_session=True
        )


def states(folder: Path, name: str) -> list[Path]:
    """The training states of a run, oldest first."""
    return sorted((folder / name).glob("0*/training-state-*/tensors.safetensors"))


def kill_after_a_save(process: subprocess.Popen, folder: Path) -> str:
    """SIGKILL the run once it has saved twice -> the name of its newest state."""
    deadline = time.monotonic() + PATIENCE
    while len(states(folder, "killed")) < 2:
        if process.poll() is not None or time.monotonic() > deadline:
            raise UserError(f"killed: it ended or hung before it had saved twice; see {folder / 'killed.txt'}")
        time.sleep(0.005)
    time.sleep(0.05)  # into the steps after it
    os.killpg(process.pid, signal.SIGKILL)
    if process.wait() == 0:
        raise UserError("killed: the run had ended by then")
    return states(folder, "killed")[-1].parent.name


def main(folder: Path, flags: list[str]) -> None:
    """Train and compare. Raises UserError for a run that fails or ends in other bits."""
    folder.mkdir(parents=True)
    prepare("digits", folder / "digits.lmdb", resolution=(RESOLUTION, RESOLUTION))
    running = {name: start(name, folder, flags) for name in RUNS}
    try:
        at = kill_after_a_save(running["killed"], folder)
        running["killed"] = start("killed", folder, flags)
        for name, process in running.items():
            if process.wait(PATIENCE):
                raise UserError(f"{name}: exit code {process.returncode}; see {folder / f'{name}.txt'}")
    finally:
        for process in running.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    check_logs(folder)
    compare({name: load_file(states(folder, name)[-1]) for name in RUNS})
    print(f"bit-equal: killed after {at} and resumed, without graphs, under torchrun")


def check_logs(folder: Path) -> None:
    """Raises UserError unless the killed run was resumed, and all that was to be captured as graphs was."""
    if "going on from" not in (folder / "killed.txt").read_text():
        raise UserError("killed: it began anew")
    for name in RUNS:
        for line in (folder / f"{name}.txt").read_text().splitlines():
            if "could not be captured" in line:
                raise UserError(f"{name}: {line}")


def compare(ends: dict[str, dict[str, torch.Tensor]]) -> None:
    """Raises UserError unless all runs have the same tensors."""
    (first, wanted), *others = ends.items()
    for name, tensors in others:
        differ = [key for key, value in wanted.items() if not torch.equal(value, tensors[key])]
        if differ:
            raise UserError(f"{name}: {len(differ)} of {len(wanted)} tensors are not as {first}, {differ[0]} first")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.argv[2:])
    except UserError as error:
        sys.exit(f"gpu_resume: {error}")
