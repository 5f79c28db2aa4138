"""saddle benchmark convergence: where a curve falls below a point, and which runs are like the known ones."""

import json
import math
from functools import partial

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from snapshots import NAMES, write_snapshot

from data.prepare import prepare
from gan.errors import UserError
from gan.metrics.classifier import train_classifier
from launch.benchmark import convergence_benchmark as convergence
from launch.benchmark.convergence_benchmark import Point, crossing, find_point


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


def write_options(run, **values):
    run.mkdir(parents=True, exist_ok=True)
    (run / "training_options.json").write_text(json.dumps(values))


def test_runs_without_a_point_are_refused(tmp_path):
    with pytest.raises(UserError, match="is not the directory of a run"):
        find_point(tmp_path, None, None)
    write_options(tmp_path, preset="default", images={"dataset_hash": "a"})
    with pytest.raises(UserError, match=r"no convergence point is of preset default on the dataset .*; say what to"):
        find_point(tmp_path, None, None)
    assert find_point(tmp_path, 3.0, 500) == Point("default", "a", 3.0, 500)


def test_a_point_is_of_a_preset_on_a_dataset(tmp_path, monkeypatch):
    known = {name: Point("p", name, 5.0, 1000, (1.0, 2.0, 3.0)) for name in ("a", "b")}
    monkeypatch.setattr(convergence, "read_points", lambda: known)
    write_options(tmp_path, preset="p", images={"dataset_hash": "b"})
    assert find_point(tmp_path, None, None) == known["b"]
    assert find_point(tmp_path, None, 500) == Point("p", "b", 5.0, 500)


def test_the_command_scores_snapshots_of_the_last_stage(tmp_path, monkeypatch):
    random = np.random.RandomState(0)
    for label, name in enumerate(sorted(NAMES)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(50):
            pixels = random.randint(0, 80, (8, 8)) + 80 * label
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "images" / name / f"{index}.png")
    prepare(str(tmp_path / "images"), tmp_path / "tiny.lmdb")
    run = tmp_path / "00000-run"
    write_options(run, preset="default", images={"dataset_hash": ""})
    for seen, stage, alpha in ((1000, 0, 1.0), (2000, 1, 0.5), (3000, 1, 1.0)):
        write_snapshot(run / f"network-snapshot-{seen:010d}.safetensors", stage=stage, seen=seen, alpha=alpha)
    monkeypatch.setattr("gan.metrics.classifier.train_classifier", partial(train_classifier, steps=30))

    def convergence_of(distance):
        out = tmp_path / "rows.json"
        flags = [f"--data={tmp_path / 'tiny.lmdb'}", f"--distance={distance}", "--samples=150", f"--json={out}"]
        result = CliRunner().invoke(convergence.main, [str(run), *flags], standalone_mode=False)
        return result.return_value, json.loads(out.read_text())

    code, rows = convergence_of(1e9)
    assert code == 0 and rows[0]["kimg"] == 3 and rows[0]["known runs"] == "no runs to compare with"
    code, rows = convergence_of(1e-9)
    assert code == 1 and rows[0]["kimg"] is None
