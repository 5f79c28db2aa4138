"""launch.generate on tiny snapshots: what lands on disk is read back and compared with the network's own images."""

import os
import subprocess
import sys

import ffmpeg
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from snapshots import write_snapshot

from gan.checkpoint import load_snapshot
from gan.errors import UserError
from gan.sampling import seed_latents, to_uint8
from launch import generate
from launch.video import find_ffmpeg


def expected(path, seeds, labels=None):
    """Images of seeds straight from the network: uint8 [N, H, W, C]."""
    snapshot = load_snapshot(path)
    with torch.no_grad():
        return to_uint8(snapshot.G(seed_latents(seeds, 8), snapshot.stage, snapshot.alpha, labels))


def saddle_generate(*arguments):
    return CliRunner().invoke(generate.main, [str(argument) for argument in arguments], catch_exceptions=True)


def succeed(*arguments):
    result = saddle_generate(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def read(path):
    return np.asarray(Image.open(path))


@pytest.fixture
def network(tmp_path):
    return write_snapshot(tmp_path / "network-snapshot-0000001000.safetensors")


@pytest.fixture
def conditional(tmp_path):
    return write_snapshot(tmp_path / "conditional.safetensors", cond=True, channels=3)


def test_grid_holds_the_images_of_the_seeds_in_reading_order(network, tmp_path):
    out = tmp_path / "new" / "grid.png"
    succeed("grid", f"--network={network}", "--seeds=0,1,4-6", "--grid=3x2", f"--output={out}", "--scale=2")
    picture, images = read(out), expected(network, [0, 1, 4, 5, 6])
    assert picture.shape == (32, 48)
    assert np.array_equal(picture[::2, ::2][:8, 8:16], images[1, :, :, 0])
    assert np.array_equal(picture[1::2, 1::2][8:, :8], images[3, :, :, 0])
    assert not picture[16:, 32:].any()
    assert [p.name for p in out.parent.iterdir()] == ["grid.png"]


def test_grid_is_square_by_default_and_large_enough_to_see(network, tmp_path):
    out = tmp_path / "grid.png"
    assert "64 images, 8 to a row" in succeed("grid", f"--network={network}", f"--output={out}")
    assert read(out).shape == (256, 256)


def test_images_are_named_by_seed_and_keep_their_size(network, tmp_path):
    succeed("images", f"--network={network}", "--seeds=3,12345", f"--outdir={tmp_path / 'out'}")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["seed0003.png", "seed12345.png"]
    assert np.array_equal(read(tmp_path / "out" / "seed12345.png"), expected(network, [12345])[0, :, :, 0])


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_channels_become_the_modes_of_png(tmp_path, channels, mode):
    path = write_snapshot(tmp_path / "n.safetensors", channels=channels, base=(4, 6))
    succeed("images", f"--network={path}", "--seeds=0", f"--outdir={tmp_path}")
    image = Image.open(tmp_path / "seed0000.png")
    assert (image.mode, image.size) == (mode, (12, 8))
    assert np.array_equal(np.asarray(image).reshape(8, 12, channels), expected(path, [0])[0])


def test_other_channel_counts_are_refused(tmp_path):
    path = write_snapshot(tmp_path / "n.safetensors", channels=2)
    with pytest.raises(UserError, match="2 channels"):
        generate.load(path)


def test_truncation_to_nothing_gives_one_image(network, tmp_path):
    succeed("images", f"--network={network}", "--seeds=0,1", "--trunc=0", f"--outdir={tmp_path}")
    assert np.array_equal(read(tmp_path / "seed0000.png"), read(tmp_path / "seed0001.png"))


@pytest.mark.parametrize(("name", "label"), [("bee", 1), ("0", 0), ("1", 2), ("2", 2)])
def test_class_by_name_first_then_by_index(conditional, tmp_path, name, label):
    succeed("images", f"--network={conditional}", "--seeds=7", f"--class={name}", f"--outdir={tmp_path}")
    assert np.array_equal(read(tmp_path / "seed0007.png"), expected(conditional, [7], torch.tensor([label]))[0])


def test_without_a_class_the_columns_are_the_classes(conditional, tmp_path):
    out = tmp_path / "grid.png"
    assert "63 images, 3 to a row" in succeed("grid", f"--network={conditional}", f"--output={out}", "--scale=1")
    images = expected(conditional, range(63), torch.arange(63) % 3)
    assert np.array_equal(read(out)[8:16, 16:], images[5])


@pytest.mark.parametrize("name", ["cat", "3", "-1"])
def test_unknown_classes_are_refused_with_the_known_ones(conditional, name):
    result = saddle_generate("grid", f"--network={conditional}", f"--class={name}")
    assert result.exit_code == 2
    assert "ape, bee, 1" in result.output


def test_classes_of_an_unconditional_network_are_refused(network):
    result = saddle_generate("grid", f"--network={network}", "--class=0")
    assert result.exit_code == 2
    assert "without classes" in result.output


@pytest.mark.parametrize(
    "arguments",
    [["grid", "--grid=0x2"], ["grid", "--grid=four"], ["grid", "--grid=2x2", "--seeds=0-4"], ["grid", "--trunc=-1"],
     ["video", "--seeds=0-8"], ["video", "--w-frames=0"], ["video", "--fps=0"], ["images"], ["grid", "--scale=0"], [],
     ["grid", "--output=x.jpg"], ["grid", "--output=."], ["video", "--output=x"], ["grid", "--trunc=nan"],
     ["video", "--fps=inf"], ["grid", "--grid=100000x100000"], ["grid", "--scale=100000"],
     ["video", "--grid=10000x10000", "--num-keyframes=10"]],
)  # fmt: skip
def test_wrong_options_exit_2(network, arguments):
    assert saddle_generate(*arguments, f"--network={network}").exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--seeds=a"], "'a'"), (["--seeds="], "''"), (["--output=/dev/null/x.png"], "cannot write")],
)
def test_what_cannot_be_is_said(network, arguments, message):
    with pytest.raises(UserError, match=message):
        raise saddle_generate("grid", f"--network={network}", *arguments).exception


def test_a_directory_stands_for_its_newest_snapshot(tmp_path):
    out = tmp_path / "out"
    old = write_snapshot(out / "00000-a" / "network-snapshot-0000009000.safetensors")
    new = write_snapshot(out / "00001-b" / "network-snapshot-0000002000.safetensors", seed=1)
    write_snapshot(out / "00001-b" / "network-snapshot-0000001000.safetensors")
    os.utime(old, (1, 1))
    assert generate.find_snapshot(out) == generate.find_snapshot(tmp_path) == new
    assert generate.find_snapshot(out / "00001-b") == new
    assert generate.find_snapshot(out / "00000-a") == old == generate.find_snapshot(old)
    (out / "empty").mkdir()
    with pytest.raises(UserError, match="train first"):
        generate.find_snapshot(out / "empty")


def test_video_is_a_loop_of_the_asked_length_and_size(network, tmp_path):
    out = tmp_path / "walk.mp4"
    printed = succeed(
        "video", f"--network={network}", "--seeds=0-5", "--grid=3x1", "--w-frames=20", f"--output={out}", "--scale=10"
    )
    assert "40 frames of 240x80 at 30 per second, 1.3 s" in printed
    output = ffmpeg.input(str(out)).output("pipe:", format="rawvideo", pix_fmt="gray")
    raw, _ = output.global_args("-loglevel", "error").run(cmd=find_ffmpeg(), capture_stdout=True, capture_stderr=True)
    frames = np.frombuffer(raw, np.uint8).reshape(-1, 80, 240).astype(float)
    assert len(frames) == 40
    cells = expected(network, range(6))[..., 0].repeat(10, 1).repeat(10, 2).astype(float)
    for frame, keyframe in ((0, 0), (20, 1)):  # seeds 0, 1 are keyframes of the first cell, 2, 3 of the second, ...
        wanted = np.concatenate(list(cells[keyframe::2]), 1)
        assert np.abs(frames[frame] - wanted).mean() < 6
    steps = np.abs(frames - np.roll(frames, 1, 0)).mean((1, 2))
    assert steps[0] < 2 * steps[1:].max()


def test_walk_frames_do_not_depend_on_how_many_are_made_at_once(conditional, monkeypatch):
    snapshot = load_snapshot(conditional)
    cells = generate.keyframe_seeds(list(range(4)), 2, None)
    whole = np.stack(list(generate.walk(snapshot, cells, None, 0.7, 2, 5)))
    monkeypatch.setattr("gan.sampling.batch_size", lambda G, stage: 1)
    single = np.stack(list(generate.walk(snapshot, cells, None, 0.7, 2, 5)))
    assert whole.shape == (10, 8, 16, 3)
    assert np.abs(whole.astype(int) - single).max() <= 1


def test_keyframe_seeds_are_dealt_in_order_and_repeat_to_fill():
    assert generate.keyframe_seeds([5, 6, 7, 8], 2, None) == [[5, 6], [7, 8]]
    assert generate.keyframe_seeds([5, 6, 7], 2, 2) == [[5, 6], [7, 5]]


def test_transparency_is_laid_over_white():
    picture = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 51]]], np.uint8)
    assert generate.opaque(picture).tolist() == [[[10, 20, 30], [255, 255, 255], [204, 204, 204]]]
    assert generate.opaque(np.array([[[9]]], np.uint8)).tolist() == [[[9, 9, 9]]]


def test_errors_are_one_line_and_exit_2(tmp_path):
    command = [sys.executable, "-m", "launch.generate", "grid", f"--network={tmp_path / 'missing'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("saddle generate: error: no snapshot")
    assert done.stderr.count("\n") == 1
