"""launch.evaluate on a tiny dataset and untrained networks: the table, its JSON, and what it refuses."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors import safe_open
from snapshots import write_snapshot
from test_features import saved

from data.dataset import ImageDataset
from data.prepare import prepare
from gan.checkpoint import load_snapshot
from gan.errors import UserError
from gan.metrics.classifier import shrink, train_classifier
from gan.metrics.intervals import Estimate
from gan.metrics.provenance import Provenance
from gan.metrics.score import METRICS, Score
from launch import cli, evaluate, samples, scores
from launch.ranks import environment


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """150 grey images of 8x8 in three classes that differ in brightness."""
    return grey_images(tmp_path_factory, 50)


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """The same with 450 images, enough for every metric."""
    return grey_images(tmp_path_factory, 150)


def grey_images(tmp_path_factory, count):
    """A dataset with so many images of each class."""
    folder = tmp_path_factory.mktemp("source")
    random = np.random.RandomState(0)
    for label, name in enumerate(("1", "ape", "bee")):
        (folder / name).mkdir()
        for index in range(count):
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
    floors = ["all reals", "half of the reals", "blurred reals", "10 reals per class, repeated"]
    names = [str(path) for path in (*paths, early)] + floors
    assert [row["name"] for row in report["rows"]] == names
    assert [row["network"] for row in report["rows"]] == [*names[:3], *[None] * 4]
    assert [row["samples"] for row in report["rows"]] == [200, 200, 200, 150, 75, 150, 200]
    distances = {
        row["name"]: row["figures"]["fd-classifier"]["value"]
        for row in report["rows"]
        if "fd-classifier" in row["figures"]
    }
    assert "all reals" not in distances
    assert min(distances[name] for name in names[:3]) > distances["half of the reals"]
    assert all(name in result.output for name in names)
    assert report["classifier"]["classes"] == 3
    row = report["rows"][0]
    assert set(row["figures"]) == {
        *(f"{name}-classifier" for name in ("fd", "kid", "precision", "recall", "density", "coverage")),
        *("mode-kl", "mode-kl-by-chance", "confidence", "coherence", "spread"),
    }
    assert all(e["low"] <= e["value"] <= e["high"] for e in row["figures"].values())
    assert row["dataset_hash"] == ImageDataset(dataset).manifest.content_hash
    assert (row["reals"], row["seed"], row["size"]) == (150, 0, [8, 8])
    assert row["features"]["name"] == "classifier" and len(row["features"]["sha256"]) == 64
    of = {row["name"]: Provenance.from_json(row) for row in report["rows"]}
    sums = [json.loads(safe_open(path, "pt").metadata()["saddle"])["sha256"] for path in (*paths, early)]
    assert [of[name].snapshot_sha256 for name in names] == [*sums, *[None] * 4]
    assert (of[names[0]].samples, of["half of the reals"].samples, of["half of the reals"].reals) == (200, 75, 75)
    assert of[names[0]].versions["torch"] == torch.__version__ and of[names[0]].key() == of[names[1]].key()


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    """80 grey images of 8x8 without labels."""
    folder = tmp_path_factory.mktemp("flat")
    random = np.random.RandomState(0)
    for index in range(80):
        Image.fromarray(random.randint(0, 256, (8, 8)).astype(np.uint8)).save(folder / f"{index:02d}.png")
    path = tmp_path_factory.mktemp("data") / "flat.lmdb"
    prepare(str(folder), path)
    return path


class Means(torch.nn.Module):
    """The mean and the deviation of each channel."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pixels = images.float().flatten(2)
        return torch.cat([pixels.mean(2), pixels.std(2)], 1)


@pytest.fixture(scope="module")
def means(tmp_path_factory):
    """--features of a file of the user's own, with 6 features."""
    return saved(Means(), tmp_path_factory.mktemp("features") / "means.pt")


def test_unlabeled_data_are_scored_by_features_of_a_file(flat, means, tmp_path):
    network = write_snapshot(tmp_path / "grey.safetensors")
    command = [f"--network={network}", f"--data={flat}", f"--features={means}", f"--json={tmp_path / 'rows.json'}"]
    result = saddle_evaluate(*command, "--samples=50", "--metrics=pr,fd")
    assert result.exit_code == 0, (result.output, result.exception)
    report = json.loads((tmp_path / "rows.json").read_text())
    assert report["classifier"] is None
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows)[2:] == ["half of the reals", "blurred reals", "10 reals, repeated"]
    assert list(rows[str(network)]["figures"]) == ["precision-means", "recall-means", "fd-means"]
    assert rows["10 reals, repeated"]["figures"]["recall-means"]["value"] < 0.3
    assert rows["half of the reals"]["samples"] == 40
    assert rows[str(network)]["features"]["sha256"] == means[-64:]


@pytest.mark.parametrize("most", [12, 14])
def test_the_few_repeated_reals_are_some_of_which_views_are_made(flat, means, tmp_path, monkeypatch, most):
    """Views of 12 and of 14 images are made of none and of one of the first ten reals."""
    for name in ("swd", "ms-ssim"):
        view = replace(METRICS[name].view, most=most)
        assert (view.chosen(80) < 10).sum() == (0 if most == 12 else 1)
        monkeypatch.setitem(METRICS, name, replace(METRICS[name], view=view))
    network = write_snapshot(tmp_path / "grey.safetensors")
    command = [f"--network={network}", f"--data={flat}", f"--features={means}", f"--json={tmp_path / 'rows.json'}"]
    result = saddle_evaluate(*command, "--samples=60", "--metrics=swd,ms-ssim,diversity")
    assert result.exit_code == 0, (result.output, result.exception)
    text = (tmp_path / "rows.json").read_text()
    rows = {row["name"]: row for row in json.loads(text, parse_constant=pytest.fail)["rows"]}
    few = rows["10 reals, repeated"]["figures"]
    assert few["swd"]["low"] < few["swd"]["value"] < few["swd"]["high"]
    of_reals = rows["reals"]["figures"]["ms-ssim"]["value"]
    assert of_reals + 0.03 < few["ms-ssim"]["value"] < of_reals + 0.3  # about a tenth are pairs of equal images


def test_data_networks_and_features_that_do_not_fit_are_refused_in_one_line(flat, dataset, means, tmp_path):
    grey = write_snapshot(tmp_path / "grey.safetensors")
    color = write_snapshot(tmp_path / "color.safetensors", channels=3)
    other = write_snapshot(tmp_path / "other.safetensors", cond=True)
    wrong_hash = means[:-64] + "0" * 64
    for network, data, flags, message in (
        (grey, flat, [], "has no labels"),
        (grey, flat, ["--features=classifier"], "has no labels.*or give run.features=lite0"),
        (grey, flat, [f"--features={means}", "--metrics=classes"], "run.metrics=classes needs a classifier"),
        (grey, dataset, [f"--features={means}", "--metrics=fd,classes"], "run.metrics=classes needs a classifier"),
        (grey, dataset, ["--metrics=fid"], "run.metrics=fid is unknown; did you mean fd"),
        (grey, dataset, ["--samples=64"], "64 samples are too few for fd, which needs 65"),
        (grey, flat, [f"--features={means}", "--samples=5"], "5 samples are too few for fd, which needs 7"),
        (grey, flat, [f"--features={means}", "--samples=5", "--metrics=dc"], "too few for dc, which needs 6"),
        (grey, flat, [f"--features={wrong_hash}"], "is another file"),
        (grey, flat, ["--features=inception"], "features are lite0, or PATH:SHA256"),
        (grey, dataset, ["--features=channels"], "features=channels are of stacked images.*prepare stacked-digits"),
        (grey, flat, ["--features=channels"], "has no labels"),
        (grey, flat, [f"--features={means}", "--metrics=modes"], "run.metrics=modes needs a classifier"),
        (grey, flat, [f"--features={means}", "--metrics=is"], "run.metrics=is needs features with classes"),
        (grey, flat, [f"--features={means}", "--metrics=ms-ssim", "--samples=3"], "for ms-ssim, which needs 4"),
        (color, dataset, [], "with 3 channels"),
        (other, dataset, [], "other classes"),
    ):
        with pytest.raises(UserError, match=message) as refused:
            raise saddle_evaluate(f"--network={network}", f"--data={data}", *flags).exception
        assert "\n" not in str(refused.value)


def in_processes(command: list[str]) -> str:
    """What a command in processes of its own prints."""
    here = environment(1)
    here["PYTHONPATH"] += f"{os.pathsep}{Path(__file__).parent}"
    done = subprocess.run([sys.executable, "-m", *command], env=here, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_metrics_and_their_alarms_by_the_command(larger, tmp_path, monkeypatch):
    """An untrained network, which makes one class: collapse is named, in the output and in the file."""
    monkeypatch.setattr("gan.metrics.classifier.train_classifier", partial(train_classifier, steps=60))
    network = write_snapshot(tmp_path / "0.safetensors")
    command = [f"--network={network}", f"--data={larger}", "--samples=400", f"--json={tmp_path / 'rows.json'}"]
    result = saddle_evaluate(*command, "--metrics=all")
    assert result.exit_code == 0, (result.output, result.exception)
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    assert list(rows)[1] == "reals" and rows["reals"]["samples"] == 400  # of 450, as many as samples
    named = [line.removeprefix(f"alarm: {network}: ") for line in result.output.splitlines() if "alarm" in line]
    assert named == rows[str(network)]["alarms"] and all(line.startswith("collapse: ") for line in named)
    assert any(line.startswith("collapse: recall-classifier") for line in named) and rows["reals"]["alarms"] == []
    figures = {name: row["figures"] for name, row in rows.items()}
    assert figures["10 reals per class, repeated"]["pixel-copies"]["value"] == 1
    assert figures["half of the reals"]["swd"]["value"] < figures[str(network)]["swd"]["value"]
    assert figures["reals"]["is-classifier"]["value"] > 2 > figures[str(network)]["is-classifier"]["value"]
    assert figures["reals"]["modes"]["value"] == 3 and "swd" not in figures["reals"]
    assert all(f["low"] <= f["value"] <= f["high"] for row in figures.values() for f in row.values())


@pytest.mark.slow
def test_scores_are_equal_for_any_number_of_ranks(larger, means, tmp_path, monkeypatch):
    """Odd numbers of samples, in two batches. A classifier is trained on rank 0 and sent to the others."""
    monkeypatch.setattr("gan.metrics.classifier.train_classifier", partial(train_classifier, steps=60))
    monkeypatch.setattr("snapshots.NAMES", ("1", "ape", "bee"))
    network = write_snapshot(tmp_path / "a.safetensors", cond=True)
    out = tmp_path / "rows.json"
    flags = [f"--network={network}", f"--data={larger}", f"--json={out}", "--samples=301", "--metrics=all"]

    def report() -> dict:
        rows = json.loads(out.read_text())
        out.unlink()
        return rows

    assert saddle_evaluate(*flags).exit_code == 0
    alone = report()
    assert {"as-asked", "swd", "ms-ssim-in-classes", "pixel-copies"} <= set(alone["rows"][0]["figures"])
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    said = in_processes([*torchrun, "-m", "evaluate_worker", *flags])
    assert report() == alone and said.count("wrote") == 1

    flags.append(f"--features={means}")
    assert saddle_evaluate(*flags).exit_code == 0
    alone = report()
    said = in_processes(["launch.evaluate", *flags, "--gpus=4"])
    assert report() == alone and said.count("wrote") == 1


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


@pytest.mark.parametrize("flags", [[], ["--divergence=js", "--features=classifier"]])
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
    assert samples.check_match(tmp_path, snapshot, dataset) == 1


def test_samples_of_an_early_stage_are_enlarged_before_they_are_shrunk_as_the_reals_are(tmp_path):
    """24x40 reals are seen at 24x32; a network that stands at 12x20 must be seen so too."""
    snapshot = load_snapshot(write_snapshot(tmp_path / "x.safetensors", base=(6, 10), stage=1))
    source = samples.network_source(snapshot, None, 2, 3, 0)
    assert source.read(slice(3)).shape == (3, *source.shape) == (3, 24, 40, 1)
    assert shrink(source.read(slice(2))).shape == (2, 24, 32, 1)


def test_a_snapshot_in_mid_fade_is_not_scored(dataset, tmp_path):
    path = write_snapshot(tmp_path / "fading.safetensors", alpha=0.4)
    result = saddle_evaluate(f"--network={path}", f"--data={dataset}")
    assert isinstance(result.exception, UserError) and "alpha 0.40" in str(result.exception)


def test_the_tables_have_lines_of_intervals_and_no_empty_columns_or_rows():
    row = Score(100, {"kid-lite0": Estimate(0.0025, 0.002, 0.003), "fd-lite0": Estimate(1.5, 1.25, 2.25)})
    other = Score(50, {"fd-lite0": Estimate(1.0, 1.0, 1.0), "spread": Estimate(0.5, 0.5, 0.5)})
    features, others = scores.score_table({"a": row, "longer": other}).split("\n\n")
    lines = features.splitlines()
    assert lines[0].split() == ["samples", "fd-lite0", "kid-lite0"]
    assert lines[1].split() == ["a", "100", "1.50", "0.0025"]
    assert lines[2].split() == ["±", "0.50", "0.0005"]
    assert lines[3].split() == ["longer", "50", "1.00", "-"]
    assert [line.split() for line in others.splitlines()] == [["samples", "spread"], ["longer", "50", "0.500"], ["±"]]


def test_every_metric_has_a_column():
    shown = {*scores.OTHERS, *(name.removesuffix("-") for name in scores.OF_FEATURES)}
    assert {row.best for row in METRICS.values()} <= shown


def test_the_help_names_the_metrics_that_are_computed_where_none_are_named():
    shown = " ".join(saddle_evaluate("--help").output.split())
    assert ",".join(name for name, metric in METRICS.items() if metric.usual) in shown
    assert "or all for all that apply" in shown


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--likelihood="], "--likelihood is empty; write for example --likelihood=elbo,iwae"),
        (["--likelihood=elbo", "--samples=1"], "needs two images or more"),
        (["--likelihood=elbo", "--metrics=fd"], "--metrics does nothing with --likelihood"),
        (["--likelihood=elbo", "--codes"], "--likelihood and --codes are different evaluations"),
        (["--metrics=fd", "--against=x"], "--against is the second set of --divergence"),
    ],
)
def test_evaluations_that_do_not_go_together_are_refused_in_one_line(dataset, tmp_path, flags, message):
    path = write_snapshot(tmp_path / "vae.safetensors", model="vae")
    result = saddle_evaluate(f"--data={dataset}", f"--network={path}", *flags)
    assert result.exit_code and message in str(result.exception) and "\n" not in str(result.exception)


def test_likelihoods_of_other_pixels_are_not_put_in_one_table(dataset, tmp_path):
    kinds = {"levels": {}, "black": {"vae.likelihood": "bernoulli", "vae.binarize": True}, "levels too": {}}
    paths = [write_snapshot(tmp_path / f"{name}.safetensors", model="vae", more=more) for name, more in kinds.items()]
    flags = [f"--data={dataset}", "--samples=20", "--likelihood=elbo"]
    result = saddle_evaluate(*flags, f"--network={paths[0]}", f"--network={paths[2]}")
    assert result.exit_code == 0, (result.output, result.exception)
    result = saddle_evaluate(*flags, *(f"--network={path}" for path in paths[:2]))
    assert result.exit_code and re.search("differ in features .pixels.* and black and white", str(result.exception))
