"""The grid of `saddle benchmark regularizers`: its cells, who works on them, and kill -9."""

import fcntl
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from test_benchmark import saddle
from test_evaluate import dataset  # noqa: F401 - a fixture

from gan.errors import UserError
from gan.methods.regularizers import REGULARIZERS
from launch.grid import training, work
from launch.grid.cells import Cell
from launch.grid.kinds import find_kind, units_of
from launch.grid.plan import PLANS, cells_of, narrowed, read_plan
from launch.grid.summary import Row, read_row
from launch.ranks import environment

TINY = ["regularizers", "--datasets=ring", "--set=steps=12"]
KILLS = int(os.environ.get("SADDLE_KILLS", 10))
linux = pytest.mark.skipif(sys.platform != "linux", reason="children end with their parents on Linux only")


def results(outdir: Path) -> list[dict]:
    return [json.loads(line) for line in (outdir / "results.jsonl").read_text().splitlines()]


def identities(cells: list[Cell]) -> list[str]:
    return [name for unit in units_of(cells)[0] for name, _ in unit.cells]


def points_cell(**changes) -> Cell:
    cell = Cell("points", "ring", "f:gan", "r1", 1.0, 0, "", {"steps": 12})
    return replace(cell, **changes)


@pytest.mark.parametrize("path", sorted(PLANS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_plan_can_be_read(path):
    plan = read_plan(path.stem)
    cells = list(cells_of(plan))
    assert cells and len(
        {(c.dataset, c.objective, c.regularizer, str(c.gamma), c.label, c.seed) for c in cells}
    ) == len(cells)
    for cell in cells:
        if cell.kind == "training":
            training.config_of(cell)
    if path.stem == "points":
        units, left_out = units_of(cells)
        assert not left_out and len(identities(cells)) == len(cells)
        assert {cell.regularizer for cell in cells} == set(REGULARIZERS) - {"bcr"}  # which needs pictures
        assert all(len(unit.cells) == 3 for unit in units)


def test_an_identity_is_all_that_decides_the_result_and_nothing_else():
    cell = points_cell()
    same = [points_cell(label="another name"), points_cell(gamma=1)]
    assert {*identities([cell]), *identities(same)} == set(identities([cell]))
    others = [
        points_cell(seed=1),
        points_cell(gamma=2.0),
        points_cell(objective="hinge"),
        points_cell(dataset="grid"),
        points_cell(settings={"steps": 13}),
        points_cell(regularizer="r2"),
    ]
    assert len(set(identities([cell, *others]))) == 7
    units, _ = units_of([cell, points_cell(seed=1), points_cell(gamma=2.0)])
    assert [len(unit.cells) for unit in units] == [2, 1]


def training_cell(path, **changes) -> Cell:
    settings = {"batch": 16, "growth.shares": [1, 1], "run.kimg": 5.0, "score.samples": 300, **changes}
    return Cell("training", str(path), "f:gan", "r1", 10.0, 0, "", settings)


def test_the_length_of_a_training_is_part_of_its_identity(dataset):  # noqa: F811
    cells = [
        training_cell(dataset),
        training_cell(dataset, **{"run.kimg": 95.0}),
        training_cell(dataset, **{"run.tick": 1}),
    ]
    found = identities(cells)
    assert len(found) == 2  # how often it logs is not


def test_a_training_that_cannot_be_reported_is_refused_before_it_begins(dataset):  # noqa: F811
    for settings, reason in (({"run.kimg": 0.016}, "too short"), ({"score.metrics": "kid"}, "must name fd")):
        with pytest.raises(UserError, match=reason):
            units_of([training_cell(dataset, **settings)])
    several = [replace(training_cell(dataset, **{"score.metrics": "kid"}), regularizer=name) for name in ("r1", "r2")]
    with pytest.raises(UserError, match=r"can be: score\.metrics must name fd, by which methods are ranked$"):
        units_of(several)


def test_precision_is_a_setting_of_every_training(monkeypatch):
    from gan import precision

    def compute(has_amx: bool, **settings) -> str:
        monkeypatch.setattr(precision, "has_amx", lambda: has_amx)
        monkeypatch.setattr(precision, "missing_bf16", lambda dtype: "")
        return training.on_this_host({"preset": "digits", **settings})["precision.compute"]

    assert (compute(True), compute(False)) == ("bf16", "fp32")
    assert compute(True, **{"precision.compute": "fp32"}) == "fp32"
    assert find_kind("points").on_this_host({"steps": 12}) == {"steps": 12}


def test_a_regularizer_that_the_plan_has_keeps_its_gammas():
    plan = narrowed(read_plan("digits"), regularizers=["r1", "roth_js", "r2"])
    assert {cell.regularizer: cell.gamma for cell in cells_of(plan)} == {"r1": "auto", "roth_js": 40.0, "r2": "auto"}


def test_gamma_is_tried_where_it_has_an_effect():
    plan = narrowed(read_plan("points"), regularizers=["none", "spectral_norm", "r1", "clip"], gammas=[0.1, 1.0])
    found = [(cell.regularizer, cell.gamma) for cell in cells_of(plan) if cell.seed == 0]
    assert found == [("none", 0.0), ("spectral_norm", 0.0)] + [(n, g) for n in ("r1", "clip") for g in (0.1, 1.0)]


@pytest.mark.parametrize(
    "text,message",
    [
        ("kind = 'points'\n[[methods]]\nregularizers = ['r1']", "datasets missing"),
        ("kind = 'points'\ndatasets = ['ring']", "needs \\[\\[methods\\]\\]"),
        ("kind = 'points'\ndatasets = 'ring'\n[[methods]]\nregularizers = ['r1']", "datasets wants a list"),
        ("kind = 'points'\ndatasets = ['ring']\nseed = [1]\n[[methods]]\nregularizers = ['r1']", "did you mean seeds"),
        ("kind = 'points'\ndatasets = ['ring']\nseeds = [1, 1]\n[[methods]]\nregularizers = ['r1']", "named twice"),
        (
            "kind = 'points'\ndatasets = ['ring']\n[[methods]]\nregularizers = ['r1']\ngammas = ['x']",
            "gammas are numbers",
        ),
        ("kind = ", "cannot be read"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(tmp_path, text, message):
    path = tmp_path / "plan.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_plan(str(path))


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--regularizers=r3"], "did you mean"),
        (["--regularizers=r1,r3"], "regularizers=r3 is unknown"),
        (["--regularizers=r1+r3"], "regularizers=r3 is unknown"),
        (["--objectives=f:gan,hing"], "objectives=hing is unknown; did you mean hinge"),
        (["--plan=digits", "--set=run.kim=3"], "did you mean run.kimg"),
        (["--objectives=hinge", "--regularizers=roth"], "use an objective f:..., or roth_js"),
        (["--regularizers=bcr"], "these are points"),
        (["--datasets=square"], "datasets=square is unknown"),
        (["--plan=pints"], "did you mean points"),
        (["--seeds=0.5"], "is not a seed or a range"),
        (["--gammas=much"], "is no number"),
        (["--gammas=1,-1"], "gammas are numbers from 0"),
        (["--set=step=3"], "points have no setting step; did you mean steps"),
        (["--set=steps=3"], "steps must be at least"),
        (["--set=g_lr=-1.0"], "positive numbers"),
        (["--set=betas=[0.5]"], "betas are two numbers"),
        (["--set=betas=[2,3]"], "betas are two numbers"),
        (["--set=betas=[a,b]"], "betas wants a tuple"),
        (["--set=decay=2.0"], "at most 1"),
        (["--cell=x"], "is the beginning of no cells' hashes"),
    ],
)
def test_what_cannot_be_is_one_line(monkeypatch, capsys, tmp_path, flags, message):
    assert saddle(monkeypatch, "regularizers", f"--outdir={tmp_path / 'out'}", *flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_several_plans_make_one_grid(monkeypatch, tmp_path, capsys):
    plan = tmp_path / "ring.toml"
    plan.write_text("kind = 'points'\ndatasets = ['ring']\nseeds = [7]\n[[methods]]\nregularizers = ['r1']\n")
    alone = ["regularizers", f"--outdir={tmp_path / 'out'}", "-n"]

    def cells(*plans: str) -> list[str]:
        assert saddle(monkeypatch, *alone, *(f"--plan={name}" for name in plans)) == 0
        return capsys.readouterr().out.splitlines()[1:-1]

    both = cells("points", str(plan))
    assert len(cells(str(plan))) == 1
    assert [line.split() for line in both] == [line.split() for line in cells("points") + cells(str(plan))]
    assert len(cells("points", "points")) == len(both) - 1  # the same cells are counted once


def test_seeds_may_be_ranges(monkeypatch, capsys):
    assert saddle(monkeypatch, "regularizers", "--regularizers=r1", "--seeds=0,4-6", "-n") == 0
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()[1:-1]] == ["0", "4", "5", "6"]


def test_cells_are_filled_once_and_reported(monkeypatch, tmp_path, capsys):
    command = [*TINY, "--regularizers=none,r1", "--seeds=0,4", f"--outdir={tmp_path}"]
    assert saddle(monkeypatch, *command) == 0
    rows = results(tmp_path)
    assert [(row["regularizer"], row["seed"]) for row in rows] == [("none", 0), ("none", 4), ("r1", 0), ("r1", 4)]
    assert all(isinstance(read_row(json.dumps(row), ""), Row) for row in rows)
    assert rows[0]["images"] == 12 * 256 and rows[0]["steps"] == 12 and rows[0]["seconds"] > 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()}
    capsys.readouterr()
    assert saddle(monkeypatch, *command) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()} == before
    assert "mode-kl" not in capsys.readouterr().out.replace("wrote", "")

    again = tmp_path / "again"
    words = rows[3]["command"].split()[2:]
    assert saddle(monkeypatch, *words, f"--outdir={again}") == 0
    (made,) = results(again)
    assert made["cell"] == rows[3]["cell"] and made["figures"] == rows[3]["figures"]
    assert saddle(monkeypatch, *words, f"--outdir={tmp_path}") == 0  # beside the others it leaves their page whole
    assert len(results(tmp_path)) == 4


def test_a_page_of_results_never_replaces_those_of_a_sweep(monkeypatch, tmp_path, capsys):
    (tmp_path / "results.jsonl").write_text("{}")
    assert saddle(monkeypatch, "regularizers", f"--results={tmp_path}") == 2
    assert "--results needs --outdir" in capsys.readouterr().err


def test_a_cell_that_fails_keeps_nobody_from_the_others(monkeypatch, tmp_path, capsys):
    found = work.work_on_unit

    def fails_for_none(unit, folder, source):
        if unit.cells[0][1].regularizer == "none":
            raise UserError("out of memory")
        return found(unit, folder, source)

    monkeypatch.setattr(work, "work_on_unit", fails_for_none)
    command = [*TINY, "--regularizers=none,r1", "--seeds=0", f"--outdir={tmp_path}"]
    assert saddle(monkeypatch, *command) == 2
    assert "1 of 2 units of work failed: out of memory" in capsys.readouterr().err
    assert len(list((tmp_path / "cells").iterdir())) == 1
    monkeypatch.setattr(work, "work_on_unit", found)
    assert saddle(monkeypatch, *command) == 0 and len(results(tmp_path)) == 2


def test_a_file_of_a_cell_that_cannot_be_read_is_marked(monkeypatch, tmp_path, capsys):
    command = [*TINY, "--regularizers=none,r1,r2", "--seeds=0", f"--outdir={tmp_path}"]
    assert saddle(monkeypatch, *command) == 0
    first, second, _ = sorted((tmp_path / "cells").iterdir())
    first.write_bytes(b"")
    second.write_bytes(b"\xff\xfe")
    assert saddle(monkeypatch, *command) == 0
    assert "2 lines cannot be read" in capsys.readouterr().out


def test_a_cell_that_another_process_has_is_left_to_it(monkeypatch, tmp_path, capsys):
    command = [*TINY, "--regularizers=none,r1", "--seeds=0", f"--outdir={tmp_path}"]
    work.prepare(tmp_path)
    cells = [points_cell(regularizer=name, gamma=gamma) for name, gamma in (("none", 0.0), ("r1", 1.0))]
    theirs = units_of(cells)[0][1]
    with (tmp_path / "claims" / f"{theirs.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert saddle(monkeypatch, *command) == 0
        assert "others work on 1 of 2 cells" in capsys.readouterr().out
        assert not (tmp_path / "regularizers.html").exists()
    assert saddle(monkeypatch, *command) == 0
    assert len(results(tmp_path)) == 2 and (tmp_path / "regularizers.html").exists()


def test_a_cell_that_diverges_is_a_result(monkeypatch, tmp_path, capsys):
    flags = ["--objectives=f:kl", "--regularizers=none", "--seeds=0", "--set=d_lr=1e38", f"--outdir={tmp_path}"]
    assert saddle(monkeypatch, *TINY, *flags) == 0
    (row,) = results(tmp_path)
    assert row["diverged"] == "samples are not finite" and row["figures"] == {}
    assert "every method diverged" in (tmp_path / "regularizers.html").read_text()


def start(outdir: Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "launch.benchmark", *flags, f"--outdir={outdir}"]
    with (outdir.parent / "log").open("ab") as log:
        return subprocess.Popen(command, env=environment(1), stdout=log, stderr=subprocess.STDOUT)


@linux
@pytest.mark.slow
def test_killed_again_and_again_it_finishes_without_a_cell_twice_or_missing(tmp_path):
    outdir = tmp_path / "out"
    flags = [*TINY, "--set=steps=40", "--regularizers=all", "--seeds=0,1"]
    chance = random.Random(0)
    first_seen: dict[str, int] = {}
    deaths = 0

    def look() -> None:
        for path in (outdir / "cells").glob("[0-9a-f]*.json"):
            json.loads(path.read_text())
            assert first_seen.setdefault(path.name, path.stat().st_mtime_ns) == path.stat().st_mtime_ns

    while deaths < KILLS:
        cells_before = len(list((outdir / "cells").glob("[0-9a-f]*.json")))
        process = start(outdir, *flags)
        # Not before it works, so that kills hit cells and not imports; then at a random moment.
        deadline = time.monotonic() + 240
        while not any((outdir / "claims").glob("*.lock")) and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(chance.uniform(0, 4))
        while len(list((outdir / "cells").glob("[0-9a-f]*.json"))) == cells_before and chance.random() < 0.9:
            time.sleep(0.3)
            if process.poll() is not None or time.monotonic() > deadline:
                break
        process.kill()
        process.wait()
        deaths += 1
        look()
    assert start(outdir, *flags, "--jobs=2").wait() == 0
    look()
    rows = results(outdir)
    wanted = len(REGULARIZERS) - 1
    assert len(rows) == len({row["cell"] for row in rows}) == 2 * wanted
    said = (tmp_path / "log").read_text()
    for row in rows:
        name = f"{row['dataset']} {row['objective']} {row['regularizer']} gamma {row['gamma']} seed {row['seed']}:"
        assert said.count(name) <= 1, name


SCORES = ["--set=score.metrics=fd,classes", "--set=score.samples=300", "--set=score.looks=2"]
TRAINING = [
    *("regularizers", "--plan=digits", "--seeds=3", "--set=preset=default", "--set=batch=16"),
    *("--set=network.widths=[8,8]", "--set=network.z_dim=8", "--set=growth.mode=none", "--set=run.tick=0.08"),
    *("--set=run.snap=1", "--set=run.threads=1", *SCORES),
]


@linux
@pytest.mark.slow
def test_a_training_cell_is_a_run_that_resumes_after_a_kill(dataset, tmp_path):  # noqa: F811
    flags = [*TRAINING, f"--datasets={dataset}", "--regularizers=r1", "--gammas=1", "--set=run.kimg=1.6"]

    def filled(name: str, kill: bool) -> dict:
        outdir = tmp_path / name / "out"
        outdir.parent.mkdir()
        if kill:
            process = start(outdir, *flags)
            deadline = time.monotonic() + 240
            while not any(outdir.glob("runs/*/00000-*/training-state-*")) and time.monotonic() < deadline:
                time.sleep(0.05)
            process.kill()
            process.wait()
            assert not (outdir / "results.jsonl").exists()
        # What was killed may still save: it keeps the claim, and others wait for it.
        while start(outdir, *flags).wait() == 0 and not (outdir / "results.jsonl").exists():
            time.sleep(0.5)
        (row,) = results(outdir)
        assert len(list(outdir.glob("runs/*/0*"))) == 1
        return row

    whole, resumed = filled("whole", kill=False), filled("killed", kill=True)
    assert resumed["cell"] == whole["cell"] and resumed["figures"] == whole["figures"]
    assert whole["images"] == 1600 and whole["steps"] == 100 and whole["picture"].startswith("iVBOR")
    assert whole["provenance"]["snapshot_sha256"] == resumed["provenance"]["snapshot_sha256"]
    assert {"fd-classifier", "mode-kl", "confidence"} <= set(whole["figures"]) and len(whole["curve"]) == 2
    assert whole["command"].startswith("saddle benchmark regularizers --plan=digits")


def test_a_training_has_one_core_unless_the_plan_gives_it_more():
    cell = Cell("training", "digits.lmdb", "nonsaturating", "none", 0.0, 0, "", {})
    assert training.config_of(cell).run.threads == 1 and "--set=run.threads=1" in training.arguments(cell, "runs")
    assert training.config_of(replace(cell, settings={"run.threads": 2})).run.threads == 2


def test_a_training_that_diverges_is_a_result(dataset, tmp_path, monkeypatch):  # noqa: F811
    """As `saddle train` leaves it: exit code 3, and the reason in exit.json."""
    settings = {"preset": "default", "growth.mode": "none", "score.samples": 300}
    cell = Cell("training", str(dataset), "nonsaturating", "none", 0.0, 0, "", settings)
    run = tmp_path / "00000-run"
    run.mkdir()
    (tmp_path / "train.log").write_text("tick 1\nsaddle train: error: out of memory\n")
    (run / "exit.json").write_text(json.dumps({"code": 3, "reason": "10 steps in a row", "images_seen": 320}))
    (run / "stats.jsonl").write_text(json.dumps({"images_seen": 320, "Timing/sec_per_tick": 1.5}) + "\n")
    monkeypatch.setattr(training, "train", lambda cell, place: 3)
    place = work.Work("abc", tmp_path, 0)
    ((_, result),) = training.run([(cell, place)])
    assert result["diverged"] == "10 steps in a row" and result["figures"] == {} and result["seconds"] == 1.5
    assert (result["steps"], result["images"]) == (10, 320)
    monkeypatch.setattr(training, "train", lambda cell, place: 1)
    with pytest.raises(UserError, match="ended with exit code 1: saddle train: error: out of memory"):
        list(training.run([(cell, place)]))


def test_training_cells_need_a_dataset_that_can_be_scored(monkeypatch, capsys, dataset, tmp_path):  # noqa: F811
    def refusal(*flags: str) -> str:
        assert saddle(monkeypatch, *TRAINING, "--regularizers=r1", f"--outdir={tmp_path / 'out'}", *flags) == 2
        return capsys.readouterr().err

    assert "nowhere.lmdb" in refusal("--datasets=nowhere.lmdb")
    assert "too few" in refusal(f"--datasets={dataset}", "--set=score.samples=20")
    assert "score.samples wants a int" in refusal(f"--datasets={dataset}", "--set=score.samples=many")
    assert "batch" in refusal(f"--datasets={dataset}", "--set=batch=7")


def test_a_rank_of_torchrun_starts_trainings_that_are_none():
    assert training.from_torchrun("RANK") and training.from_torchrun("TORCHELASTIC_RUN_ID")
    assert not training.from_torchrun("PATH") and not training.from_torchrun("OMP_NUM_THREADS")


def test_every_kind_says_what_it_can_do():
    assert "bcr" not in find_kind("points").regularizers and "bcr" in find_kind("training").regularizers
    with pytest.raises(UserError, match="did you mean points"):
        find_kind("point")
