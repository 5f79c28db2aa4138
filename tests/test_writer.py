"""Saving beside the training: what is saved, what a full disk, a kill and a value that is not finite leave behind."""

import json
import math
import os
import resource
import shutil
import threading
from pathlib import Path

import pytest
import torch
from tiny import one_thread, tiny_config, tiny_feed, tiny_task  # noqa: F401 - a fixture

from gan import checkpoint
from gan.checkpoint import load_state, newest_state, save_state, superseded
from gan.run import loop
from gan.run.writer import Writer, check_space, remove_parts
from gan.state import initial_state


def names(folder, kind: str = "training-state-*") -> list[int]:
    return sorted(int(path.name[-10:]) for path in folder.glob(kind))


def tiny_run(folder, values: dict | None = None, meanwhile=lambda state: None) -> int:
    """30 steps of 32 with a tick and a save every 10; `meanwhile` is called before each batch."""
    folder.mkdir(exist_ok=True)
    task = tiny_task(tiny_config(values))
    state = initial_state(task)

    def feed(requests):
        for batch in tiny_feed(requests):
            meanwhile(state)
            yield batch

    return loop.train(state, task, feed, folder, {})


def test_training_goes_on_while_what_the_tick_saves_is_written(tmp_path, monkeypatch):
    """The write of the first tick ends when steps after it were made, and holds what the tick had."""
    gone_on = threading.Event()

    def slow(path, *rest):
        assert not path.name.startswith("network-snapshot-0000000320") or gone_on.wait(60)
        return checkpoint.save_snapshot(path, *rest)

    values = {"run.keep": 9}
    assert tiny_run(tmp_path / "plain", values) == 0
    monkeypatch.setattr(loop, "save_snapshot", slow)  # which comes before the state
    assert tiny_run(tmp_path / "slow", values, lambda state: state.images_seen >= 416 and gone_on.set()) == 0
    assert names(tmp_path / "slow") == [320, 640, 960]
    for seen in (320, 960):
        ours, theirs = (load_state(tmp_path / run / f"training-state-{seen:010d}")[0] for run in ("slow", "plain"))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
        snapshots = [tmp_path / run / f"network-snapshot-{seen:010d}.safetensors" for run in ("slow", "plain")]
        assert snapshots[0].read_bytes() == snapshots[1].read_bytes()


def full_at(seen_full: int):
    """`save_state` where files cannot grow past 20 kB at one moment of the clock."""

    def save(run, seen, *rest):
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        if seen == seen_full:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, old[1]))
        try:
            return checkpoint.save_state(run, seen, *rest)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)

    return save


def test_a_disk_that_is_full_leaves_the_state_before_and_the_run_alive(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "save_state", full_at(640))
    assert tiny_run(tmp_path) == 0
    assert names(tmp_path) == [320, 960] and not list(tmp_path.glob(".*.part*"))
    assert "NOT SAVED" in capsys.readouterr().out and "NOT SAVED" in (tmp_path / "log.txt").read_text()
    assert json.loads((tmp_path / "exit.json").read_text())["code"] == 0


def test_a_run_whose_last_state_cannot_be_saved_is_not_finished(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "save_state", full_at(960))
    assert tiny_run(tmp_path) == 2
    ended = json.loads((tmp_path / "exit.json").read_text())
    assert ended["code"] == 2 and ended["reason"].startswith("NOT SAVED")
    assert names(tmp_path) == [320, 640]


def test_too_little_space_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))
    said: list[str] = []
    writer = Writer(said.append)
    writer.start(lambda: check_space(tmp_path, [torch.ones(1000)]))
    assert "has 1 MB free and 1 MB are needed" in writer.wait() and len(said) == 1
    writer.close()


def test_errors_that_are_not_about_files_are_raised():
    writer = Writer(print)
    writer.start(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        writer.wait()
    writer.close()


def test_a_state_that_is_not_finite_is_never_saved(tmp_path, capsys):
    def spoil(state):
        if state.images_seen == 352:
            with torch.no_grad():
                state.networks["G_ema"].first.bias[0] = math.nan

    assert tiny_run(tmp_path, meanwhile=spoil) == 3
    assert names(tmp_path) == [320]
    assert [path.name for path in tmp_path.glob("network-snapshot-*")] == ["network-snapshot-0000000320.safetensors"]
    assert "stopped: G_ema/first.bias is not finite" in capsys.readouterr().out


def test_ranks_that_differ_stop_unsaved(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "find_strangers", lambda value, ranks: [1, 3])
    assert tiny_run(tmp_path) == 2
    assert names(tmp_path) == []
    assert "the weights on ranks 1, 3 differ from those on the other ranks" in capsys.readouterr().out
    assert json.loads((tmp_path / "exit.json").read_text())["images_seen"] == 320


class Killed(BaseException):
    pass


def kill_at(monkeypatch, moment: int) -> list[str]:
    """From the call number `moment` on, every call that changes the disk kills; -> the calls."""
    calls: list[str] = []

    def wrap(owner, name: str, half=None) -> None:
        real = getattr(owner, name)

        def call(*arguments, **named):
            calls.append(name)
            if len(calls) > moment:
                if half and len(calls) == moment + 1:
                    half(*arguments)
                raise Killed
            return real(*arguments, **named)

        monkeypatch.setattr(owner, name, call)

    for name in ("replace", "fsync", "unlink", "rmdir", "mkdir"):
        wrap(os, name)
    wrap(Path, "write_bytes", half=lambda path, content: path.write_text("half of it"))
    return calls


def test_killed_at_any_moment_of_a_save_a_sound_state_is_there(tmp_path, monkeypatch):
    tensors = {seen: {"a": torch.full((3,), float(seen))} for seen in (10, 20, 30)}
    moment, found = 0, set()
    while True:
        run = tmp_path / str(moment)
        run.mkdir()
        for seen in (10, 20):
            save_state(run, seen, tensors[seen], {}, keep=2)
        (run / "training-state-0000000030").mkdir()  # one that is damaged, to be written over
        with monkeypatch.context() as patch:
            kill_at(patch, moment)
            try:
                save_state(run, 30, tensors[30], {}, keep=2)
                break
            except Killed:
                pass
        remove_parts(run)
        newest, _ = newest_state(run)
        state, about = load_state(newest)
        found.add(about["images_seen"])
        assert about["images_seen"] >= 20 and torch.equal(state["a"], tensors[about["images_seen"]]["a"])
        assert {path.name[:15] for path in run.iterdir()} == {"training-state-"}
        save_state(run, 30, tensors[30], {}, keep=2)
        assert names(run) == [20, 30]
        moment += 1
    assert moment > 10 and found == {20, 30}


def test_what_a_killed_write_left_is_removed_at_the_start(tmp_path):
    for part in (".training-state-0000000032.part", "stats.jsonl.part", ".fakes0000000032.part.png"):
        (tmp_path / part).mkdir() if "training" in part else (tmp_path / part).write_text("half")
    assert tiny_run(tmp_path) == 0
    assert not [path.name for path in tmp_path.iterdir() if ".part" in path.name]


def test_the_last_states_are_kept_and_the_first_of_every_milestone():
    on_disk: list[int] = []
    for seen in range(30, 1000, 30):
        on_disk.append(seen)
        on_disk = [s for s in on_disk if s not in superseded(on_disk, keep=2, milestone=100)]
    assert on_disk == [120, 210, 300, 420, 510, 600, 720, 810, 900, 960, 990]
    assert superseded([10, 20, 30], keep=2, milestone=0) == [10]
    assert superseded([10], keep=2, milestone=0) == []
