"""What goes wrong with the machine during a run: a disk that is full, read-only or gone, a clock that is set back, two
starts at once. One line and the promised exit code; what was saved stays; nothing half-made is left."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hosts import family, kill, wait_until
from tiny import one_thread, tiny_config, tiny_feed, tiny_format, tiny_task  # noqa: F401 - a fixture

from data.prepare import prepare
from gan.checkpoint import newest_state
from gan.errors import UserError
from gan.run import directories, loop
from gan.run.directories import open_run
from gan.run.plan import plan_run
from gan.state import initial_state
from launch import cli
from launch.outputs import output_file
from launch.ranks import environment
from ops.build import CSRC, LIBRARY, MANIFEST, build, cache
from ops.toolchain import BuildError, recipe

FLAGS = [
    *("--preset=digits", "--batch=16", "--tick=0.16", "--snap=1", "--set=growth.mode=none", "--set=growth.shares=[]"),
    *("--set=run.threads=1", "--set=network.widths=[8,8]", "--set=network.z_dim=8", "--kimg=0.64"),
]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An empty disk of 2 MB, unmounted after the test."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("needs Linux and root, to mount a small disk")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk: Path) -> Path:
    """Write a file that takes all space that is left."""
    path = disk / "filler"
    with path.open("ab", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            return path
    return path


def make_read_only(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)


def tiny_run(folder: Path, meanwhile=lambda state: None) -> int:
    """30 steps of 32 with a tick and a save every 10; `meanwhile` is called before each batch."""
    folder.mkdir(exist_ok=True)
    task = tiny_task(tiny_config())
    state = initial_state(task)

    def feed(requests):
        for batch in tiny_feed(requests):
            meanwhile(state)
            yield batch

    return loop.train(state, task, feed, folder, {})


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "digits.lmdb"
    prepare("digits", path, resolution=(8, 8), max_images=100)
    return path


def saddle(monkeypatch, capfd, *arguments: object) -> str:
    """The one line of `saddle train ARGUMENTS`, in this process, which is refused."""
    monkeypatch.setattr(sys, "argv", ["saddle", "train", *map(str, arguments)])
    threads = torch.get_num_threads()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    torch.set_num_threads(threads)
    said = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("ops: ")]
    assert (ended.value.code, len(said)) == (2, 1), said
    return said[0]


# ---- a full disk


@pytest.mark.parametrize("stop,code", [(False, 2), (True, 75)], ids=["at the end", "on SIGTERM"])
def test_a_disk_that_fills_up_changes_neither_the_exit_code_nor_what_was_saved(small_disk, capfd, stop, code):
    def meanwhile(state):
        if state.images_seen == 640 and not (small_disk / "filler").exists():
            wait_until(lambda: newest_state(small_disk / "run")[0], 30, "the save before")
            time.sleep(0.5)
            fill(small_disk)
            if stop:
                signal.raise_signal(signal.SIGTERM)
                time.sleep(0.3)

    assert tiny_run(small_disk / "run", meanwhile) == code
    said = capfd.readouterr()
    assert "NOT SAVED" in said.out and "Traceback" not in said.err
    assert f"{small_disk / 'run' / 'exit.json'} cannot be written: No space left on device" in said.err
    path, passed_over = newest_state(small_disk / "run")
    assert path and not passed_over and not list((small_disk / "run").glob(".*part*"))
    (small_disk / "filler").unlink()
    assert tiny_run(small_disk / "run") == 0


def test_a_new_run_on_a_full_disk_is_refused_and_leaves_nothing(small_disk, digits, monkeypatch, capfd):
    fill(small_disk)
    said = saddle(monkeypatch, capfd, f"--data={digits}", f"--outdir={small_disk / 'runs'}", *FLAGS)
    assert "0 MB free and 1 MB are needed; make room on that disk" in said
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


def test_a_directory_whose_options_find_no_room_is_not_left(small_disk):
    with (small_disk / "filler").open("wb") as file:
        file.truncate(0)
    fill(small_disk)
    with pytest.raises(UserError, match=r"cannot be written: No space left on device; choose another outdir"):
        directories.create(small_disk, "run", {})
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


def test_a_run_that_finds_its_disk_full_when_it_is_resumed_is_refused(small_disk, digits, monkeypatch, capfd):
    flags = [f"--data={digits}", f"--outdir={small_disk}", *FLAGS]
    (run,) = begun(small_disk, flags)
    fill(small_disk)
    assert f"{run} cannot be written: No space left on device" in saddle(monkeypatch, capfd, *flags)


# ---- a disk that is read-only, or gone


def begun(outdir: Path, flags: list[str]) -> list[Path]:
    """The directory of a run that was started by these flags, and has saved nothing yet."""
    from launch.train import main, make_job

    job = make_job(main.make_context("train", list(flags)).params)
    return [open_run(job.plan, outdir)]


def test_a_read_only_disk_is_said_for_a_new_run_and_for_one_that_is_resumed(small_disk, digits, monkeypatch, capfd):
    flags = [f"--data={digits}", f"--outdir={small_disk}", *FLAGS]
    (run,) = begun(small_disk, flags)
    make_read_only(small_disk)
    assert f"{run} cannot be written: Read-only file system" in saddle(monkeypatch, capfd, *flags)
    said = saddle(monkeypatch, capfd, *flags, "--resume=none")
    assert f"{small_disk} cannot be written: Read-only file system; choose another outdir" in said


def test_a_lock_that_cannot_be_written_is_said(digits, tmp_path, monkeypatch, capfd):
    flags = [f"--data={digits}", f"--outdir={tmp_path}", *FLAGS]
    (run,) = begun(tmp_path, flags)
    (run / ".lock").unlink(missing_ok=True)
    (run / ".lock").mkdir()
    assert f"{run} cannot be written" in saddle(monkeypatch, capfd, *flags)


def test_a_run_whose_directory_is_removed_stops_at_its_next_tick(tmp_path):
    seen = []

    def remove(state):
        seen.append(state.images_seen)
        if state.images_seen == 352:
            # Renamed first: the last tick is still being written, and a file that comes while the directory is emptied
            # would keep it.
            (tmp_path / "run").rename(tmp_path / "removed")

    with pytest.raises(UserError, match=r"run was removed during training: nothing can be saved"):
        tiny_run(tmp_path / "run", remove)
    assert max(seen) <= 640 and not (tmp_path / "run").exists()


def test_an_error_of_the_system_that_nobody_expects_is_one_line(monkeypatch, capfd, tmp_path, digits):
    def fail(*_):
        raise OSError(5, "Input/output error", str(tmp_path / "x"))

    monkeypatch.setattr("gan.run.directories.find_run", fail)
    said = saddle(monkeypatch, capfd, f"--data={digits}", f"--outdir={tmp_path}", *FLAGS)
    assert said == f"saddle train: error: {tmp_path / 'x'}: Input/output error"


@pytest.mark.slow
def test_a_full_disk_for_standard_output_stops_no_run(digits, tmp_path):
    command = [sys.executable, "-m", "launch.train", f"--data={digits}", f"--outdir={tmp_path}", *FLAGS]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, env=environment(1), stdout=full, stderr=full, timeout=580)
    assert done.returncode == 0
    (run,) = tmp_path.glob("0*")
    assert "standard output is closed" in (run / "log.txt").read_text()
    assert newest_state(run)[0].name == "training-state-0000000640"


def test_output_that_nobody_takes_at_the_end_changes_no_exit_code():
    """Python itself would exit with 120."""
    program = "import sys; from gan.files import flush_output; sys.stdout.write('x'); flush_output(); sys.exit(75)"
    buffered = environment(1) | {"PYTHONUNBUFFERED": ""}
    with open("/dev/full", "w") as full:
        assert subprocess.run([sys.executable, "-c", program], env=buffered, stdout=full).returncode == 75


def test_kernels_are_loaded_from_a_read_only_cache_which_cannot_take_others(small_disk, monkeypatch):
    monkeypatch.setenv("SADDLE_CACHE", str(small_disk))
    made = recipe(CSRC)
    home = cache() / made.key
    home.mkdir(parents=True)
    (home / LIBRARY).write_bytes(b"a library")
    (home / MANIFEST).write_text(json.dumps({"sha256": hashlib.sha256(b"a library").hexdigest()}))
    make_read_only(small_disk)
    assert build(made) == home / LIBRARY
    with pytest.raises(BuildError, match=r"cannot keep compiled kernels in .*Read-only file system.*set SADDLE_CACHE"):
        build(replace(made, key="another"))


# ---- the clock, and two starts at once


def test_a_clock_that_is_set_back_changes_no_duration(tmp_path, monkeypatch, capsys):
    times = iter(range(10**9, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: next(times))
    assert tiny_run(tmp_path / "run") == 0
    said = capsys.readouterr().out
    assert said.count("\ntick ") + said.startswith("tick ") == 3 and " time -" not in said and "left -" not in said
    for line in (tmp_path / "run" / "stats.jsonl").read_text().splitlines():
        assert all(value >= 0 for name, value in json.loads(line).items() if name.startswith("Timing/")), line


def test_two_starts_at_the_same_moment_make_one_run(tmp_path, monkeypatch):
    """Both look before either has made its directory."""
    config = tiny_config()
    looked, barrier = threading.local(), threading.Barrier(2)
    find_run = directories.find_run

    def slow(*arguments):
        found = find_run(*arguments)
        if not hasattr(looked, "once"):
            looked.once = True
            barrier.wait(30)
        return found

    monkeypatch.setattr(directories, "find_run", slow)
    runs: list[Path] = []

    def start() -> None:
        runs.append(open_run(plan_run(config, tiny_format(), "tiny"), tmp_path))

    threads = [threading.Thread(target=start) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(runs) == 2 and runs[0] == runs[1] and list(tmp_path.glob("0*")) == [runs[0]]


# ---- files of commands that were killed


def test_what_a_killed_command_left_is_removed_by_the_next_one_in_that_folder(tmp_path):
    """But not what another process still writes, nor files of other kinds."""
    code = """
import itertools, sys, numpy
from pathlib import Path
from launch.video import write_video
write_video(Path(sys.argv[1]), itertools.repeat(numpy.zeros((16, 16, 3), numpy.uint8)), 30)
"""
    with subprocess.Popen([sys.executable, "-c", code, tmp_path / "walk.mp4"], env=environment(1)) as process:
        wait_until((tmp_path / ".walk.part.mp4").exists, 60, "a video")
        (tmp_path / ".mine.part.txt").touch()
        with output_file(tmp_path / "other.mp4") as part:
            part.write_text("other")
        assert (tmp_path / ".walk.part.mp4").exists(), "it is still being written"
        kill(family(process.pid))
    assert (tmp_path / ".walk.part.mp4").exists()
    with output_file(tmp_path / "other.mp4") as part, output_file(tmp_path / "third.mp4") as third:
        part.write_text("other")
        third.write_text("third")
    assert {path.name for path in tmp_path.iterdir()} == {"other.mp4", "third.mp4", ".mine.part.txt"}
