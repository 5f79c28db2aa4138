"""A tiny run, killed at random moments, in saves too, and started again by the same command.

SADDLE_KILLS=100 SADDLE_KILL_RANKS=1 for the long version.
"""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hosts import family, kill
from safetensors.torch import load_file

from data.prepare import prepare
from gan.checkpoint import newest_state
from launch.ranks import environment

KILLS = int(os.environ.get("SADDLE_KILLS", 4))
RANKS = int(os.environ.get("SADDLE_KILL_RANKS", 2))
STEP = 16
FLAGS = [
    *("--preset=digits", f"--batch={STEP}", "--tick=0.08", "--snap=1", "--set=growth.shares=[0.3,0.7]"),
    *("--set=run.threads=1", "--set=network.widths=[8,8]", "--set=network.z_dim=8", f"--gpus={RANKS}"),
]
TICK = 80
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="finds child processes in /proc"),
]


def train(data: Path, outdir: Path, images: int, log: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "launch.train", f"--data={data}", f"--outdir={outdir}", *FLAGS]
    with log.open("a") as file:
        return subprocess.Popen(
            [*command, f"--kimg={images / 1000}"], env=environment(2), stdout=file, stderr=subprocess.STDOUT
        )


def finish(process: subprocess.Popen) -> None:
    try:
        assert process.wait(timeout=600 + 20 * KILLS) == 0
    finally:
        kill(family(process.pid))


def states(outdir: Path) -> list[Path]:
    return sorted(outdir.glob("0*/training-state-*"))


def disturb(process: subprocess.Popen, outdir: Path, log: Path, chance: random.Random) -> str:
    """Wait until it trains, and for a random moment; kill all -> when that was, or nothing if it had ended."""
    begun = log.read_text().count("\ntick ")
    deadline = time.time() + 90
    while log.read_text().count("\ntick ") == begun and process.poll() is None:
        assert time.time() < deadline, log.read_text()[-2000:]
        time.sleep(0.02)
    if chance.random() < 0.5:  # in a save: its unfinished folder is there
        while not list(outdir.glob("0*/.*.part*")) and process.poll() is None:
            time.sleep(0.0005)
    else:
        time.sleep(chance.random() * 0.6)
    saving = bool(list(outdir.glob("0*/.*.part*")))
    everyone = family(process.pid)
    if process.poll() is not None:
        return ""
    kill(everyone)
    return "in a save" if saving else "between saves"


def test_killed_again_and_again_it_ends_bit_equal(tmp_path):
    data, chance = tmp_path / "digits.lmdb", random.Random(KILLS)
    prepare("digits", data, resolution=(8, 8), max_images=200)
    images = TICK * (4 * KILLS + 10)
    finish(train(data, tmp_path / "whole", images, tmp_path / "whole.log"))
    outdir, log = tmp_path / "killed", tmp_path / "killed.log"
    log.touch()
    killed: list[str] = []
    while len(killed) < KILLS:
        before = states(outdir)
        process = train(data, outdir, images, log)
        try:
            what = disturb(process, outdir, log, chance)
        finally:
            kill(family(process.pid))
            process.wait(timeout=30)
        assert what, "it ended before it was killed"
        killed.append(what)
        if before:  # it went on from a state that it had verified, not from the start
            assert f"going on from {before[-1].name}" in log.read_text().rpartition("\nrun ")[2]
        (run,) = outdir.glob("0*")
        newest, passed_over = newest_state(run)
        assert newest is None or not passed_over
    finish(train(data, outdir, images, log))
    ends = [states(tmp_path / name)[-1] for name in ("whole", "killed")]
    whole, ours = (load_file(end / "tensors.safetensors") for end in ends)
    assert ends[0].name == ends[1].name and whole.keys() == ours.keys()
    assert all(torch.equal(whole[k], ours[k]) for k in whole)
    left = sorted(p.name for p in ends[1].parent.iterdir())
    assert left == sorted(p.name for p in ends[0].parent.iterdir()), left
    print(f"{KILLS} kills: {killed.count('in a save')} in saves")
