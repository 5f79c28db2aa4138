"""saddle benchmark convergence: where a curve falls below a point, and which runs are like the known ones."""

import json
import math
from dataclasses import asdict
from functools import partial

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from snapshots import NAMES, write_snapshot

from data.dataset import ImageDataset
from data.prepare import prepare
from gan.config import TrainConfig, override
from gan.errors import UserError
from gan.metrics.classifier import train_classifier
from launch.benchmark import convergence_benchmark as convergence
from launch.benchmark.convergence_benchmark import Point, crossing, find_point
from launch.settings import read_preset


def test_a_curve_crosses_between_two_snapshots():
    curve = [(10_000, 100.0), (20_000, 1.0), (30_000, 5.0)]
    assert crossing(curve, 10.0) == pytest.approx(15)  # the logarithm is halfway
    assert crossing(curve, 100.0) == 10
    assert crossing(curve, 1.0) == pytest.approx(20)
    assert math.isnan(crossing(curve, 0.5))
    assert crossing([(10_000, 0.0)], 1.0) == 10


@pytest.mark.parametrize(
    "kimg,verdict",
    [(50.0, "inside: 50.0 ± 30.0 kimg over 3 seeds"), (79.9, "inside"), (80.1, "outside"), (math.nan, "outside: not")],
)
def test_a_run_is_compared_with_known_ones(kimg, verdict):
    assert Point("digits", "", 40.0, 10_000, (40.0, 50.0, 60.0)).verdict(kimg).startswith(verdict)


def test_every_point_is_of_a_preset_and_has_several_seeds():
    for name, point in convergence.read_points().items():
        assert (convergence.POINTS.parent.parent / "presets" / f"{point.preset}.toml").exists(), name
        assert len(point.kimg) >= 3 and point.distance > 0 and len(point.dataset) == 64


def write_options(run, preset, dataset_hash, config=None):
    run.mkdir(parents=True, exist_ok=True)
    values = {"preset": preset, "images": {"dataset_hash": dataset_hash}, "config": config or {}}
    (run / "training_options.json").write_text(json.dumps(values))


def test_runs_without_a_point_are_refused(tmp_path):
    with pytest.raises(UserError, match="is not the directory of a run"):
        find_point(tmp_path, None, None)
    write_options(tmp_path, "default", "a")
    with pytest.raises(UserError, match=r"no convergence point is of preset default on the dataset .*; say what to"):
        find_point(tmp_path, None, None)
    assert find_point(tmp_path, 3.0, 500) == Point("default", "a", 3.0, 500)


def test_a_point_is_of_a_preset_on_a_dataset(tmp_path, monkeypatch):
    known = {name: Point("p", name, 5.0, 1000, (1.0, 2.0, 3.0)) for name in ("a", "b")}
    monkeypatch.setattr(convergence, "read_points", lambda: known)
    write_options(tmp_path, "p", "b")
    assert find_point(tmp_path, None, None) == known["b"]
    assert find_point(tmp_path, None, 500) == Point("p", "b", 5.0, 500)


@pytest.mark.parametrize(
    "changed, named",
    [
        ({}, []),
        ({"seed": 3, "precision.compute": "bf16", "run.snap": 1, "run.desc": "x"}, []),
        ({"regularizer.gamma": 1.0, "batch": 64}, ["batch=64", "regularizer.gamma=1.0"]),
        ({"growth.fade": 0.3}, ["growth.fade=0.3"]),  # the default, where the preset has another value
        ({"run.kimg": 200.0}, ["run.kimg=200.0"]),
    ],
)
def test_settings_that_a_run_has_beside_its_preset_are_named(tmp_path, changed, named):
    config = override(TrainConfig(), read_preset("digits") | changed)
    write_options(tmp_path, "digits", "a", asdict(config))
    assert convergence.other_settings(tmp_path, "digits", {}) == named
    assert convergence.other_settings(tmp_path, "digits", {"data.cond": True}) == sorted([*named, "data.cond=False"])


@pytest.fixture
def tiny(tmp_path):
    """150 grey images of 8x8 in three classes."""
    random = np.random.RandomState(0)
    for label, name in enumerate(sorted(NAMES)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(50):
            pixels = random.randint(0, 80, (8, 8)) + 80 * label
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "images" / name / f"{index}.png")
    prepare(str(tmp_path / "images"), tmp_path / "tiny.lmdb")
    return ImageDataset(tmp_path / "tiny.lmdb")


def test_a_run_of_another_dataset_is_refused_before_anything_is_scored(tiny, tmp_path, monkeypatch):
    content_hash = tiny.manifest.content_hash
    for name, dataset_hash in (("same", content_hash), ("other", content_hash[::-1])):
        write_options(tmp_path / name, "default", dataset_hash)
    monkeypatch.setattr(convergence, "score_run", lambda *_: pytest.fail("a run was scored"))
    command = [*(str(tmp_path / name) for name in ("same", "other")), f"--data={tiny.path}", "--distance=1"]
    with pytest.raises(UserError, match=r"other was trained on another dataset than .*tiny.lmdb; give that one$"):
        CliRunner().invoke(convergence.main, command, standalone_mode=False, catch_exceptions=False)


def test_the_command_scores_snapshots_of_the_last_stage(tiny, tmp_path, monkeypatch):
    run = tmp_path / "00000-run"
    write_options(run, "default", tiny.manifest.content_hash)
    for seen, stage, alpha in ((1000, 0, 1.0), (2000, 1, 0.5), (3000, 1, 1.0)):
        write_snapshot(run / f"network-snapshot-{seen:010d}.safetensors", stage=stage, seen=seen, alpha=alpha)
    monkeypatch.setattr("gan.metrics.classifier.train_classifier", partial(train_classifier, steps=30))

    def convergence_of(*flags):
        out = tmp_path / "rows.json"
        command = [str(run), f"--data={tiny.path}", f"--json={out}", *flags]
        result = CliRunner().invoke(convergence.main, command, standalone_mode=False)
        return result.return_value, json.loads(out.read_text())

    code, rows = convergence_of("--distance=1e9", "--samples=150")
    assert code == 0 and rows[0]["kimg"] == 3 and rows[0]["known runs"] == "no runs to compare with"
    known = Point("default", tiny.manifest.content_hash, 1e-9, 150, (1.0, 2.0, 3.0))
    monkeypatch.setattr(convergence, "read_points", lambda: {"tiny": known})
    code, rows = convergence_of()
    assert code == 1 and rows[0]["kimg"] is None and rows[0]["known runs"] == "outside: not reached"
    write_options(run, "default", tiny.manifest.content_hash, {"batch": 64})
    code, rows = convergence_of()
    assert code == 0 and rows[0]["known runs"] == "other settings than the preset: batch=64"
