"""launch.demo with untrained snapshots in place of a training: what it makes, twice, and what it does on failure."""

import json
from functools import partial

import ffmpeg
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from snapshots import write_snapshot

from data.errors import DataError
from data.prepare import prepare
from gan.errors import UserError
from gan.metrics.classifier import train_classifier
from gan.sampling import GAP
from launch import demo, likelihood_estimates
from launch.samples import spread
from launch.video import find_ffmpeg


def pretend_to_train_a_vae(data, outdir, preset, cond, seed, gpus):
    """Leave what a run of a VAE of 8 pixels leaves."""
    assert preset == "vae-digits"
    write_snapshot(outdir / "00000-run" / "network-snapshot-0000003000.safetensors", seen=3000, model="vae")
    (outdir / "00000-run" / "exit.json").write_text("{}")
    return 0


def pretend_to_train(data, outdir, preset, cond, seed, gpus):
    """Leave what a run of 4, then 8 pixels leaves."""
    for seen, stage in ((1000, 0), (2000, 1), (3000, 1)):
        path = outdir / "00000-run" / f"network-snapshot-{seen:010d}.safetensors"
        write_snapshot(path, stage=stage, seen=seen, cond=cond)
    (outdir / "00000-run" / "exit.json").write_text("{}")
    return 0


def saddle_demo(outdir, *flags):
    result = CliRunner().invoke(demo.main, [f"--outdir={outdir}", "--gpus=1", *flags], standalone_mode=False)
    if result.exception:
        raise result.exception
    return result


def test_demo_makes_pictures_video_and_figures_and_can_be_repeated(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(demo, "RESOLUTION", 8)
    monkeypatch.setattr(demo, "WALK_FRAMES", 10)
    monkeypatch.setattr(demo, "SAMPLES", 500)
    monkeypatch.setattr(demo, "train", pretend_to_train)
    monkeypatch.setattr("gan.metrics.classifier.train_classifier", partial(train_classifier, steps=60))
    out = tmp_path / "demo"
    saddle_demo(out)
    printed = saddle_demo(out).output
    summary = json.loads((out / "summary.json").read_text())
    assert summary["frechet_distance"] > summary["floors"]["blurred reals"]["frechet_distance"]
    assert summary["mode_kl"] >= 0
    assert summary["provenance"]["samples"] == summary["samples"]
    assert summary["images_seen"] == 3000
    assert set(summary["seconds"]) == {"prepare", "train", "grid", "video", "progress", "score"}
    cell = 8 + GAP
    scale = demo.CELL // 8
    ten_cells = (10 * cell - GAP) * scale
    assert np.asarray(Image.open(summary["paths"]["grid"])).shape == (ten_cells, ten_cells)
    strip = np.asarray(Image.open(summary["paths"]["progress"]))
    assert strip.shape == (ten_cells, (3 * cell - GAP) * scale)
    output = ffmpeg.input(summary["paths"]["video"]).output("pipe:", format="rawvideo", pix_fmt="gray")
    raw, _ = output.global_args("-loglevel", "error").run(cmd=find_ffmpeg(), capture_stdout=True, capture_stderr=True)
    width, height = ((n * cell - GAP) * scale for n in (demo.WALK_COLUMNS, demo.WALK_ROWS))
    assert len(raw) == demo.WALK_KEYFRAMES * 10 * width * height
    assert "half of the reals" in printed
    assert all(path in printed for name, path in summary["paths"].items() if name in ("grid", "video", "progress"))


def test_the_demo_of_a_vae_also_shows_what_it_makes_of_real_images(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(demo, "RESOLUTION", 8)
    monkeypatch.setattr(demo, "WALK_FRAMES", 2)
    monkeypatch.setattr(demo, "SAMPLES", 500)
    monkeypatch.setattr(likelihood_estimates, "QUICK_IMAGES", 30)
    monkeypatch.setattr(demo, "train", pretend_to_train_a_vae)
    monkeypatch.setattr("gan.metrics.classifier.train_classifier", partial(train_classifier, steps=30))
    printed = saddle_demo(tmp_path, "--model=vae").output
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["bits_per_number"] == pytest.approx(-summary["log_likelihood"] / 64 / np.log(2))
    width = (10 * (8 + GAP) - GAP) * (demo.CELL // 8)
    for name, rows in (("reconstructions", demo.RECONSTRUCTIONS // 5), ("interpolations", demo.PAIRS)):
        picture = np.asarray(Image.open(summary["paths"][name]))
        assert picture.shape == ((rows * (8 + GAP) - GAP) * (demo.CELL // 8), width)
        assert summary["paths"][name] in printed


def test_a_preset_that_does_not_exist_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(UserError, match="--preset=nope is unknown"):
        saddle_demo(tmp_path / "demo", "--preset=nope")
    assert not (tmp_path / "demo").exists()


def test_a_training_that_fails_gives_its_exit_code_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "prepare_digits", lambda path: None)
    monkeypatch.setattr(demo, "train", lambda *arguments: 75)
    assert saddle_demo(tmp_path / "demo").return_value == 75
    assert not (tmp_path / "demo").exists()


def test_photos_of_the_users_own_are_trained_on_with_their_classes(tmp_path, monkeypatch):
    asked = []
    for name in ("ape", "bee"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for shade in range(40):
            Image.new("RGB", (8, 8), (6 * shade, 0, 0)).save(tmp_path / "photos" / name / f"{shade}.png")
    data = tmp_path / "photos.lmdb"
    prepare(str(tmp_path / "photos"), data)
    monkeypatch.setattr(demo, "SAMPLES", 500)
    monkeypatch.setattr(demo, "train", lambda *arguments: asked.append(arguments) or 75)
    assert saddle_demo(tmp_path / "demo", f"--data={data}").return_value == 75
    ((path, _, preset, cond, _, _),) = asked
    assert (path, preset, cond) == (data, "photos", True)
    with pytest.raises(DataError, match="no-such"):
        saddle_demo(tmp_path / "demo", "--data=no-such.lmdb")
    assert not (tmp_path / "demo").exists()


def test_progress_strip_has_a_row_per_latent_and_a_column_per_snapshot(tmp_path):
    for seen, stage in ((1, 0), (2, 1)):
        write_snapshot(tmp_path / f"network-snapshot-{seen}.safetensors", stage=stage)
    strip = demo.progress_strip(tmp_path)
    cell = 8 + GAP
    assert strip.shape == (10 * cell - GAP, 2 * cell - GAP, 1)
    early = strip[:8, :8, 0]
    assert np.array_equal(early, early[::2, ::2].repeat(2, 0).repeat(2, 1))


def test_spread_keeps_first_and_last():
    assert spread(range(21), 5) == [0, 5, 10, 15, 20]
    assert spread(range(3), 10) == [0, 1, 2]
    assert spread([7], 10) == [7]
    assert spread(range(3), 1) == spread(range(3), 0) == [2]
