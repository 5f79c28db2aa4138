"""Scores of a run's snapshots, by a process beside the training, which does not wait for them before its end."""

import json
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gan.checkpoint import SNAPSHOT
from gan.files import replacing
from gan.metrics.provenance import Provenance
from gan.ranks.distributed import from_first
from gan.run.directories import drop_after
from gan.schedules import moment
from gan.state import Task
from gan.tensor_files import parse_fields

POLL = 0.5  # seconds between looks at whether the last snapshot has its score


@dataclass(frozen=True)
class Scorer:
    """The process that scores snapshots, and keeps in memory what it compares them with.

    It reads the path of a snapshot from each line, and answers with a line of JSON: {"error": "why there is no score"},
    or for each metric its name and {"figures": {name: {"value", "low", "high"}}, "best": the name of the figure by
    which snapshots are compared, "higher": is a higher one better, and the fields of a Provenance, ...}.
    """

    metrics: tuple[str, ...]  # their names; the first one chooses the best snapshot
    start: Callable[[], "subprocess.Popen[str]"]


class Scoring:
    """Has snapshots scored, one at a time: always the newest, so that one may be passed over if the next is ready.

    Lines are added to the run's `metric-<name>.jsonl`, and `best-<name>.safetensors` is another name of the best
    snapshot by the first metric, of those whose scores compare with the newest one: a resumed run may have other
    features, or other counts of images. If the process fails, the log says so, and the next snapshot starts it again.
    """

    def __init__(self, scorer: Scorer, run: Path, images_seen: int, say: Callable[[str], object]) -> None:
        self.scorer = scorer
        self.run = run
        self.say = say
        self.process: subprocess.Popen[str] | None = None
        self.newest: Path | None = None  # the snapshot to score next
        self.busy = False
        self.closed = False
        self.changed = threading.Condition()
        for path in run.glob("metric-*.jsonl"):
            drop_after(path, images_seen)
        # The thread lives until the end: Linux can end the process with the thread that started it.
        self.thread = threading.Thread(target=self._work, name="saddle-scoring", daemon=True)
        self.thread.start()

    def submit(self, snapshot: Path) -> None:
        """Score a snapshot when the one before it is done, unless it has its scores already."""
        with self.changed:
            self.newest = snapshot
            self.changed.notify_all()

    def idle(self) -> bool:
        """Is nothing left to score?"""
        with self.changed:
            return not self.busy and self.newest is None

    def close(self) -> None:
        """End the process at once, and the thread."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()
            if self.process:
                self.process.kill()
        self.thread.join()
        self._reap()

    def _work(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.closed or self.newest is not None)
                if self.closed:
                    return
                snapshot, self.newest = self.newest, None
                self.busy = True
            assert snapshot is not None
            try:
                if not all(self._keys(snapshot, name) for name in self.scorer.metrics):
                    self._score(snapshot)
            except Exception as error:  # whatever it is, the run goes on
                self._excuse(snapshot, f"{type(error).__name__}: {error}")
            with self.changed:
                self.busy = False

    def _score(self, snapshot: Path) -> None:
        begin = time.monotonic()
        answer = self._ask(snapshot)
        if answer is None:
            return
        if "error" in answer:
            return self._excuse(snapshot, answer["error"])
        new = {name: row for name, row in answer.items() if _key(row) not in self._keys(snapshot, name)}
        for name, row in new.items():
            line = {
                "images_seen": int(snapshot.stem.removeprefix(SNAPSHOT)),
                "snapshot": snapshot.name,
                "metric": name,
                **row,
                "seconds": round(time.monotonic() - begin, 1),
                "timestamp": time.time(),
            }
            with self._path(name).open("a") as file:
                file.write(json.dumps(line) + "\n")
        best = self._mark_best() == snapshot.name
        figures = [text for row in new.values() for text in map(_figure, row["figures"].items())]
        self.say(f"scores of {snapshot.name}{' (the best so far)' * best}: {', '.join(figures)}")

    def _ask(self, snapshot: Path) -> dict[str, Any] | None:
        """The process's answer; None if it ended instead, which is said unless we ended it."""
        with self.changed:
            if self.closed:
                return None
            if self.process is None:
                self.process = self.scorer.start()
            process = self.process
        assert process.stdin and process.stdout
        with suppress(BrokenPipeError):
            process.stdin.write(f"{snapshot.absolute()}\n")
            process.stdin.flush()
        line = process.stdout.readline()
        if line.endswith("\n"):
            return json.loads(line)
        code = self._reap()
        if not self.closed:
            self._excuse(snapshot, f"the process that scores ended with {code}; the next snapshot starts it again")
        return None

    def _reap(self) -> int | None:
        """Wait until the process has ended. -> its exit code."""
        process, self.process = self.process, None
        if process is None:
            return None
        with suppress(BrokenPipeError), process:  # closes the pipes, one of which may hold what was not read
            pass
        return process.wait()

    def _excuse(self, snapshot: Path, reason: str) -> None:
        self.say(f"note: no score of {snapshot.name}: {reason}")

    def _path(self, metric: str) -> Path:
        return self.run / f"metric-{metric}.jsonl"

    def _keys(self, snapshot: Path, metric: str) -> list[tuple[str, ...]]:
        """What the scores depend on that a snapshot has by a metric."""
        return [_key(line) for line in _lines(self._path(metric)) if line["snapshot"] == snapshot.name]

    def _mark_best(self) -> str:
        """Give the best snapshot by the first metric its second name. -> its first name, "" if there is none."""
        metric = self.scorer.metrics[0]
        best = self.run / f"best-{metric}.safetensors"
        lines = _lines(self._path(metric))
        like_the_newest = [line for line in lines if _key(line) == _key(lines[-1])]
        there = [line for line in like_the_newest if (self.run / line["snapshot"]).exists()]
        if not there:
            best.unlink(missing_ok=True)
            return ""
        name: str = max(there, key=_merit)["snapshot"]
        with replacing(best) as part:
            try:
                os.link(self.run / name, part)
            except OSError:  # a file system without hard links
                shutil.copyfile(self.run / name, part)
        return name


def _lines(path: Path) -> list[dict[str, Any]]:
    """The scores in a file, without lines that were cut off by a kill, or that do not say which snapshot of a run they
    are of and what they depend on."""
    found = []
    for text in path.read_text().splitlines() if path.exists() else []:
        with suppress(ValueError):
            line = parse_fields(text, {"snapshot": str, "figures": dict}, more=True)
            _key(line)
            if re.fullmatch(rf"{SNAPSHOT}\d+\.safetensors", line["snapshot"], re.ASCII):
                found.append(line)
    return found


def _key(line: Mapping[str, Any]) -> tuple[str, ...]:
    """Scores with equal keys compare. Raises UserError if the line does not say what it depends on."""
    return Provenance.from_json(line).key()


def _merit(line: Mapping[str, Any]) -> float:
    value = line["figures"][line["best"]]["value"]
    return value if line["higher"] else -value


def _figure(item: tuple[str, Mapping[str, float]]) -> str:
    name, estimate = item
    if estimate["low"] == estimate["high"]:
        return f"{name} {estimate['value']:.4g}"
    return f"{name} {estimate['value']:.4g} ({estimate['low']:.4g} to {estimate['high']:.4g})"


def start_scoring(scorer: Scorer, task: Task, run: Path, images_seen: int, say: Callable[[str], object]) -> Scoring:
    """The Scoring of a run that starts or is resumed at `images_seen`; the snapshot from there is scored if it is not
    yet, as its run may have been stopped before that."""
    scoring = Scoring(scorer, run, images_seen, say)
    snapshot = run / f"{SNAPSHOT}{images_seen:010d}.safetensors"
    if snapshot.exists() and moment(task.schedule, images_seen - task.schedule.batch).alpha == 1:
        scoring.submit(snapshot)
    return scoring


def await_scores(
    scoring: Scoring | None, stop: Callable[[], bool] = lambda: False, beat: Callable[[], None] = lambda: None
) -> None:
    """Wait until rank 0 has all scores, or is asked to stop. All ranks call it, as none may leave the others early."""
    if scoring and not scoring.idle():
        scoring.say("waiting for the scores of the last snapshot")
    while not from_first(scoring is None or scoring.idle() or stop()):
        beat()
        time.sleep(POLL)
