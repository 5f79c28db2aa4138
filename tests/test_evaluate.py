"""launch.evaluate on a tiny dataset and untrained networks: the table, its JSON, and what it refuses."""

import json
from functools import partial

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from snapshots import write_snapshot

from data.dataset import ImageDataset
from data.prepare import prepare
from gan.checkpoint import load_snapshot
from gan.errors import UserError
from gan.metrics.classifier import train_classifier
from gan.metrics.score import Score
from launch import cli, evaluate, samples, scores


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """60 grey images of 8x8 in three classes that differ in brightness."""
    folder = tmp_path_factory.mktemp("source")
    random = np.random.RandomState(0)
    for label, name in enumerate(("1", "ape", "bee")):
        (folder / name).mkdir()
        for index in range(20):
            pixels = random.randint(0, 80, (8, 8)) + 80 * label
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{index}.png")
    path = tmp_path_factory.mktemp("data") / "tiny.lmdb"
    prepare(str(folder), path)
    return path


def saddle_evaluate(*arguments):
    return CliRunner().invoke(evaluate.main, [str(argument) for argument in arguments])


def test_table_and_json_hold_a_row_per_network_beside_the_floors(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("gan.metrics.classifier.train_classifier", partial(train_classifier, steps=60))
    paths = [write_snapshot(tmp_path / f"{seed}.safetensors", seed=seed) for seed in (0, 1)]
    early = write_snapshot(tmp_path / "early.safetensors", stage=0)
    networks = [f"--network={path}" for path in (*paths, early)]
    out = tmp_path / "scores.json"
    result = saddle_evaluate(*networks, f"--data={dataset}", "--samples=200", f"--json={out}")
    assert result.exit_code == 0, (result.output, result.exception)
    report = json.loads(out.read_text())
    names = [str(path) for path in (*paths, early)] + ["all reals", "half of the reals", "blurred reals"]
    assert [row["name"] for row in report["rows"]] == names
    assert [row["network"] for row in report["rows"]] == [*names[:3], None, None, None]
    assert [row["samples"] for row in report["rows"]] == [200, 200, 200, 60, 30, 60]
    assert report["rows"][3]["frechet_distance"] == 0
    assert min(row["frechet_distance"] for row in report["rows"][:3]) > report["rows"][4]["frechet_distance"]
    assert all(name in result.output for name in names)
    assert report["classifier"]["classes"] == 3


def test_unlabeled_data_and_strange_networks_are_refused(dataset, tmp_path):
    folder = tmp_path / "flat"
    folder.mkdir()
    for index in range(12):
        Image.fromarray(np.full((8, 8), 20 * index, np.uint8)).save(folder / f"{index}.png")
    prepare(str(folder), tmp_path / "flat.lmdb")
    grey = write_snapshot(tmp_path / "grey.safetensors")
    color = write_snapshot(tmp_path / "color.safetensors", channels=3)
    other = write_snapshot(tmp_path / "other.safetensors", cond=True)
    for network, data, message in (
        (grey, tmp_path / "flat.lmdb", "has no labels"),
        (color, dataset, "with 3 channels"),
        (other, dataset, "other classes"),
    ):
        with pytest.raises(UserError, match=message):
            raise saddle_evaluate(f"--network={network}", f"--data={data}").exception


@pytest.fixture(scope="module")
def vector_labels(tmp_path_factory):
    """The dataset of 60 grey images, with three numbers for a label as StyleGAN's dataset.json may hold."""
    folder = tmp_path_factory.mktemp("vectors")
    labels = []
    for index in range(60):
        Image.fromarray(np.full((8, 8), 4 * index, np.uint8)).save(folder / f"{index:02d}.png")
        labels.append([f"{index:02d}.png", [0.1 * index, 1.5, -2.0]])
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    path = tmp_path_factory.mktemp("data") / "vectors.lmdb"
    prepare(str(folder), path)
    return path


@pytest.mark.parametrize("flags", [[], ["--divergence=js", "--features=1"]])
def test_labels_that_are_vectors_are_refused_in_one_line(vector_labels, tmp_path, flags, monkeypatch, capsys):
    network = write_snapshot(tmp_path / "a.safetensors")
    command = ["saddle", "evaluate", f"--network={network}", f"--data={vector_labels}", "--samples=100", *flags]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    output, error = capsys.readouterr()
    assert ended.value.code == 2 and not output
    assert "has vectors of 3 numbers for labels" in error and "folder per class" in error and error.count("\n") == 1


def test_class_names_are_the_same_composed_and_decomposed(tmp_path, monkeypatch):
    """A network trained on data prepared on macOS, scored on the same folders prepared elsewhere."""
    for name, label in (("bee", 1), ("é", 2)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(2):
            Image.fromarray(np.full((8, 8), 90 * label + index, np.uint8)).save(
                tmp_path / "images" / name / f"{index}.png"
            )
    prepare(str(tmp_path / "images"), tmp_path / "images.lmdb")
    monkeypatch.setattr("snapshots.NAMES", ("bee", "e\u0301"))
    snapshot = load_snapshot(write_snapshot(tmp_path / "x.safetensors", cond=True))
    dataset = ImageDataset(tmp_path / "images.lmdb")
    assert evaluate.check_match(tmp_path, snapshot, dataset) == 1


def test_samples_of_an_early_stage_are_enlarged_before_they_are_shrunk_as_the_reals_are(tmp_path):
    """24x40 reals are seen at 24x32; a network that stands at 12x20 must be seen so too."""
    snapshot = load_snapshot(write_snapshot(tmp_path / "x.safetensors", base=(6, 10), stage=1))
    (batch,) = samples.sample_batches(snapshot, None, 2, 3, 0)
    assert batch.shape == (3, 24, 32, 1)


def test_a_snapshot_in_mid_fade_is_not_scored(dataset, tmp_path):
    path = write_snapshot(tmp_path / "fading.safetensors", alpha=0.4)
    result = saddle_evaluate(f"--network={path}", f"--data={dataset}")
    assert isinstance(result.exception, UserError) and "alpha 0.40" in str(result.exception)


def test_table_drops_columns_that_are_empty_in_all_rows():
    row = Score(100, 1.5, 0.25, 0.045, 0.9, None)
    lines = scores.score_table({"a": row, "longer": row}).splitlines()
    assert "as asked" not in lines[0]
    assert lines[1].split() == ["a", "100", "1.50", "0.2500", "0.0450", "0.900"]
    assert len({len(line) for line in lines}) == 1
