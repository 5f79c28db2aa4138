"""Snapshots of a run are scored beside it: by a stand-in for the process, and by the real one in a small run."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import pytest
from hosts import family
from test_evaluate import dataset, flat, means, saddle_evaluate  # noqa: F401 - fixtures
from test_train_command import SHORT, only_run, saddle

from gan.metrics.provenance import Features, Provenance
from gan.run.scoring import Scorer, Scoring, await_scores
from launch.ranks import environment

# Scores a snapshot by the number that its file holds, which a number of samples may follow; "die", "fail" and "sleep"
# are done instead. Arguments: what the scores depend on, and the metrics.
STAND_IN = """
import json, os, pathlib, sys, time
about = json.loads(sys.argv[1])
for line in sys.stdin:
    text = pathlib.Path(line.strip()).read_text()
    if text == "die":
        os._exit(7)
    if text == "sleep":
        time.sleep(100)
    if text == "fail":
        print(json.dumps({"error": "too few"}), flush=True)
        continue
    value, _, samples = text.partition(" ")
    about["samples"] = int(samples or 100)
    figures = {"fd-x": {"value": float(value), "low": 0.0, "high": 9.0}}
    row = {**about, "figures": figures, "best": "fd-x", "higher": False, "pid": os.getpid()}
    print(json.dumps(dict.fromkeys(sys.argv[2:], row)), flush=True)
"""
ABOUT = Provenance(Features("x", "ab" * 32, 0, ""), "c" * 64, (8, 8), 80, 100, 0, "d" * 64)

TWO_STAGES = [flag for flag in SHORT if "widths" not in flag]
TWO_STAGES += ["--set=network.widths=[8,8]", "--set=growth.shares=[0.2,0.8]", "--kimg=0.16"]


class Run:
    """A run's directory, with what was said, and the Scoring of a run that starts at `images_seen`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics: tuple[str, ...] = ("fd-x",)
        self.said: list[str] = []

    def scoring(self, images_seen: int = 0) -> Scoring:
        return Scoring(Scorer(self.metrics, self.start), self.path, images_seen, self.said.append)

    def start(self) -> "subprocess.Popen[str]":
        pipe = subprocess.PIPE
        command = [sys.executable, "-c", STAND_IN, json.dumps(ABOUT.to_json()), *self.metrics]
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

    def snapshot(self, images_seen: int, text: str) -> Path:
        path = self.path / f"network-snapshot-{images_seen:010d}.safetensors"
        path.write_text(text)
        return path

    def scores(self, scoring: Scoring, images_seen: int, text: str) -> None:
        """Write a snapshot and wait for its score."""
        scoring.submit(self.snapshot(images_seen, text))
        await_scores(scoring)

    def lines(self) -> list[dict]:
        return [json.loads(line) for line in (self.path / "metric-fd-x.jsonl").read_text().splitlines()]

    def best(self) -> str:
        return (self.path / "best-fd-x.safetensors").read_text()


@pytest.fixture
def run(tmp_path, monkeypatch) -> Run:
    monkeypatch.setattr("gan.run.scoring.POLL", 0.01)
    return Run(tmp_path)


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_lines_the_log_and_the_best_snapshot(run):
    with closing(run.scoring()) as scoring:
        for images, value in ((100, "3.5"), (200, "1.25"), (300, "2")):
            run.scores(scoring, images, value)
        lines = run.lines()
        assert [line["images_seen"] for line in lines] == [100, 200, 300]
        assert [line["figures"]["fd-x"]["value"] for line in lines] == [3.5, 1.25, 2]
        assert lines[1]["snapshot"] == "network-snapshot-0000000200.safetensors" and lines[1]["metric"] == "fd-x"
        assert len({line["pid"] for line in lines}) == 1
        assert run.best() == "1.25"
        assert os.stat(run.path / lines[1]["snapshot"]).st_nlink == 2
    scored = [line for line in run.said if line.startswith("scores of")]
    assert ["(the best so far)" in line for line in scored] == [True, True, False]
    assert "fd-x 1.25 (0 to 9)" in scored[1]


def test_a_resumed_run_drops_later_lines_and_scores_nothing_twice(run):
    with closing(run.scoring()) as scoring:
        for images, value in ((100, "3"), (200, "2"), (300, "1")):
            run.scores(scoring, images, value)
    with (run.path / "metric-fd-x.jsonl").open("a") as file:
        file.write('{"images_seen": 400, "sna')  # killed in the middle of a line
    with closing(run.scoring(images_seen=200)) as scoring:
        assert [line["images_seen"] for line in run.lines()] == [100, 200]
        run.scores(scoring, 200, "die")  # it has its score and is not asked for again
        run.scores(scoring, 250, "2.5")
        assert [line["images_seen"] for line in run.lines()] == [100, 200, 250]
    assert run.best() == "die"  # the snapshot of 200 images, no longer that of 300
    assert not any(line.startswith("note") for line in run.said)


def test_the_best_is_chosen_among_scores_that_compare_with_the_newest(run):
    """As of a run that was resumed with another number of samples, and then with the first one again."""
    with closing(run.scoring()) as scoring:
        best = {}
        for images, text in ((100, "1"), (200, "2"), (300, "3 50"), (400, "2.5 50"), (500, "2.7 50"), (600, "1.5")):
            run.scores(scoring, images, text)
            best[images] = run.best()
    assert best == {100: "1", 200: "1", 300: "3 50", 400: "2.5 50", 500: "2.5 50", 600: "1"}


def test_a_snapshot_that_lacks_a_score_gets_all_that_depend_on_something_else(run):
    with closing(run.scoring()) as scoring:
        run.scores(scoring, 100, "1")
        run.scores(scoring, 200, "2")
    run.metrics = ("fd-x", "kid-x")
    with closing(run.scoring(images_seen=200)) as scoring:
        run.scores(scoring, 200, "3 50")
        run.scores(scoring, 100, "1")
    assert [(line["images_seen"], line["samples"]) for line in run.lines()] == [(100, 100), (200, 100), (200, 50)]


def test_lines_that_do_not_say_what_they_depend_on_count_as_none(run):
    line = {"images_seen": 50, "snapshot": run.snapshot(50, "9").name, "best": "fd-x", "higher": False}
    (run.path / "metric-fd-x.jsonl").write_text(json.dumps({**line, "figures": {"fd-x": {"value": 0.0}}}) + "\n")
    with closing(run.scoring(images_seen=50)) as scoring:
        run.scores(scoring, 100, "2")
        assert run.best() == "2"
        run.scores(scoring, 50, "1")
    assert run.best() == "1" and not any(line.startswith("note") for line in run.said)


def test_only_the_newest_of_waiting_snapshots_is_scored(run):
    with closing(run.scoring()) as scoring:
        with scoring.changed:  # the thread cannot take the first one
            scoring.submit(run.snapshot(100, "1"))
            scoring.submit(run.snapshot(200, "2"))
        await_scores(scoring)
        assert [line["images_seen"] for line in run.lines()] == [200]


@pytest.mark.parametrize("text, reason", [("die", "ended with 7"), ("fail", "too few"), ("sleep", "ended with -9")])
def test_a_failed_score_is_said_and_the_next_snapshot_has_one(run, text, reason):
    with closing(run.scoring()) as scoring:
        scoring.submit(run.snapshot(100, text))
        if text == "sleep":
            wait_for(lambda: scoring.process)
            os.kill(scoring.process.pid, signal.SIGKILL)
        await_scores(scoring)
        notes = [line for line in run.said if line.startswith("note: no score")]
        assert len(notes) == 1 and "network-snapshot-0000000100" in notes[0] and reason in notes[0]
        run.scores(scoring, 200, "2")
        assert [line["images_seen"] for line in run.lines()] == [200]


def test_closing_ends_a_process_that_is_busy_without_a_word(run):
    scoring = run.scoring()
    scoring.submit(run.snapshot(100, "sleep"))
    wait_for(lambda: scoring.process)
    process = scoring.process
    scoring.close()
    assert process.returncode == -signal.SIGKILL and run.said == []


def test_a_process_that_cannot_start_harms_nothing(run):
    run.start = lambda: subprocess.Popen(["/no/such/program"])
    with closing(run.scoring()) as scoring:
        run.scores(scoring, 100, "1")
    assert "note: no score of network-snapshot-0000000100.safetensors: FileNotFoundError" in run.said[-1]


def test_a_run_has_the_scores_that_evaluate_gives(flat, means, tmp_path, monkeypatch, capfd):  # noqa: F811
    flags = [f"--data={flat}", f"--features={means}"]
    command = [*flags, *TWO_STAGES, f"--outdir={tmp_path}", "--metrics=kid,pr", "--set=run.metric_samples=60"]
    assert saddle(monkeypatch, *command) == 0
    run = only_run(tmp_path)
    last = "network-snapshot-0000000160.safetensors"
    lines = [json.loads(line) for line in (run / "metric-kid-means.jsonl").read_text().splitlines()]
    line = lines[-1]
    assert line["snapshot"] == last and line["samples"] == 60 and line["features"]["sha256"] == means[-64:]
    best = min(lines, key=lambda line: line["figures"]["kid-means"]["value"])["snapshot"]
    assert f"scores of {best} (the best so far): kid-means" in (run / "log.txt").read_text()
    assert (run / "best-kid-means.safetensors").samefile(run / best)
    out = tmp_path / "rows.json"
    result = saddle_evaluate(*flags, f"--network={run}", "--metrics=kid,pr", "--samples=60", f"--json={out}")
    assert result.exit_code == 0, result.exception
    row = json.loads(out.read_text())["rows"][0]
    recall = json.loads((run / "metric-pr-means.jsonl").read_text().splitlines()[-1])["figures"]
    assert row["network"].endswith(last) and row["figures"] == line["figures"] | recall
    assert Provenance.from_json(line) == Provenance.from_json(row)
    rows = {row["name"]: row for row in json.loads(out.read_text())["rows"]}
    half = line["floors"]["half of the reals"]
    assert half["samples"] == rows["half of the reals"]["samples"] == 40
    assert half["figures"]["kid-means"] == rows["half of the reals"]["figures"]["kid-means"]

    (run / "metric-kid-means.jsonl").unlink()  # as after a run that was killed at its end
    before = (run / "metric-pr-means.jsonl").read_text()
    assert saddle(monkeypatch, *command) == 0
    (again,) = (run / "metric-kid-means.jsonl").read_text().splitlines()
    assert json.loads(again)["figures"] == line["figures"]
    assert (run / "metric-pr-means.jsonl").read_text() == before


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--metrics=fid"], "--metrics=fid is unknown; did you mean fd"),
        (["--metrics=fd"], "has no labels, .*--features=lite0"),
        (
            ["--metrics=fd", "--features=MEANS", "--set=run.metric_samples=6"],
            "6 samples are too few for fd, .* needs 7",
        ),
        (["--metrics=pr,classes", "--features=MEANS"], "--metrics=classes needs a classifier"),
    ],
)
def test_metrics_that_cannot_be_had_are_refused_before_the_run(
    flags,
    message,
    flat,  # noqa: F811
    means,  # noqa: F811
    tmp_path,
    monkeypatch,
    capsys,
):
    flags = [flag.replace("MEANS", means) for flag in flags]
    command = [f"--data={flat}", *TWO_STAGES, f"--outdir={tmp_path / 'runs'}", *flags]
    assert saddle(monkeypatch, *command) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(message, error), error
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_ranks_wait_for_the_last_score_and_a_killed_run_takes_its_scorer_along(flat, means, tmp_path):  # noqa: F811
    flags = [f"--data={flat}", f"--features={means}", *TWO_STAGES, f"--outdir={tmp_path}", "--metrics=kid", "--gpus=2"]
    command = [sys.executable, "-m", "launch.train", *flags, "--set=run.metric_samples=60"]
    log = tmp_path / "output.txt"
    with log.open("w") as output:
        first = subprocess.Popen(command, env=environment(2), stdout=output, stderr=output)
        try:
            wait_for(lambda: _scorers(first.pid))
            (scorer,) = _scorers(first.pid)
        finally:
            for process in set(family(first.pid)) - set(_scorers(first.pid)):
                os.kill(process, signal.SIGKILL)
            first.wait()
        wait_for(lambda: not family(scorer))
    done = subprocess.run(command, env=environment(2), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    lines = (only_run(tmp_path) / "metric-kid-means.jsonl").read_text().splitlines()
    seen = [json.loads(line)["images_seen"] for line in lines]
    assert seen == sorted(set(seen)) and seen[-1] == 160


def _scorers(pid: int) -> list[int]:
    """The processes below a launcher that score."""
    found = []
    for process in family(pid):
        with suppress(OSError):  # it has ended meanwhile
            if b"launch.scorer" in Path(f"/proc/{process}/cmdline").read_bytes():
                found.append(process)
    return found
