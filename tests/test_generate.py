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
from gan.sampling import GAP, seed_latents, to_uint8
from launch import generate, pictures, samples
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
    images = expected(network, [0, 1, 4, 5, 6])
    assert read(out).shape == (2 * (8 + GAP + 8), 2 * (8 + GAP + 8 + GAP + 8))
    picture = read(out)[::2, ::2]
    assert np.array_equal(picture, read(out)[1::2, 1::2])
    second = 8 + GAP  # where the second row or column begins
    assert np.array_equal(picture[:8, second : second + 8], images[1, :, :, 0])
    assert np.array_equal(picture[second:, :8], images[3, :, :, 0])
    assert not picture[second:, second + 8 :].any() and not picture[8:second].any() and not picture[:, 8:second].any()
    assert [p.name for p in out.parent.iterdir()] == ["grid.png"]


def test_grid_is_square_by_default_and_large_enough_to_see(network, tmp_path):
    out = tmp_path / "grid.png"
    assert "64 images, 8 to a row" in succeed("grid", f"--network={network}", f"--output={out}")
    side = 8 * (8 + GAP) - GAP
    assert read(out).shape == (4 * side, 4 * side) and 3 * side < 256 <= 4 * side


def test_images_are_named_by_seed_and_keep_their_size(network, tmp_path):
    succeed("images", f"--network={network}", "--seeds=3,12345,3", f"--outdir={tmp_path / 'out'}")
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
        samples.load_network(path)


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
    assert np.array_equal(read(out)[8 + GAP : 16 + GAP, 2 * (8 + GAP) :], images[5])


@pytest.mark.parametrize(
    ("flags", "columns", "rows"),
    [
        (["--seeds=0-1"], 2, 1),  # fewer than the classes: no column without an image
        (["--seeds=0-3"], 2, 2),  # one row of classes and a rest: as if there were none
        (["--seeds=0-5"], 3, 2),
        (["--seeds=0-2", "--grid=8x4"], 3, 1),
        (["--seeds=0-4", "--class=bee"], 5, 1),
    ],
)
def test_a_grid_is_no_larger_than_what_is_in_it(conditional, tmp_path, flags, columns, rows):
    out = tmp_path / "grid.png"
    succeed("grid", f"--network={conditional}", f"--output={out}", "--scale=1", *flags)
    picture = read(out)
    assert picture.shape == (rows * (8 + GAP) - GAP, columns * (8 + GAP) - GAP, 3)
    cells = [
        picture[row : row + 8, column : column + 8]
        for row in range(0, len(picture), 8 + GAP)
        for column in range(0, picture.shape[1], 8 + GAP)
    ]
    assert all(cell.any() for cell in cells)


def test_seeds_fewer_than_ten_classes_make_a_grid_without_empty_cells(tmp_path):
    assert generate.arrange([0, 1, 2], None, classes=10) == (3, [0, 1, 2])
    assert generate.arrange(None, None, classes=10) == (10, list(range(60)))


@pytest.mark.parametrize("asked", ["épée", "e\u0301pe\u0301e"])
@pytest.mark.parametrize("stored", ["épée", "e\u0301pe\u0301e"])
def test_accents_of_class_names_are_the_same_composed_and_decomposed(tmp_path, monkeypatch, asked, stored):
    """macOS stores é in the name of a folder as e and an accent; a keyboard enters one letter."""
    monkeypatch.setattr("snapshots.NAMES", ("ape", stored, "1"))
    path = write_snapshot(tmp_path / "accents.safetensors", cond=True)
    succeed("images", f"--network={path}", "--seeds=7", f"--class={asked}", f"--outdir={tmp_path}")
    assert np.array_equal(read(tmp_path / "seed0007.png"), expected(path, [7], torch.tensor([1]))[0, :, :, 0])


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
def test_impossible_requests_are_refused_with_a_reason(network, arguments, message):
    with pytest.raises(UserError, match=message):
        raise saddle_generate("grid", f"--network={network}", *arguments).exception


def test_a_directory_stands_for_its_newest_snapshot(tmp_path):
    out = tmp_path / "out"
    old = write_snapshot(out / "00000-a" / "network-snapshot-0000009000.safetensors")
    new = write_snapshot(out / "00001-b" / "network-snapshot-0000002000.safetensors", seed=1)
    write_snapshot(out / "00001-b" / "network-snapshot-0000001000.safetensors")
    os.utime(old, (1, 1))
    assert samples.find_snapshot(out) == samples.find_snapshot(tmp_path) == new
    assert samples.find_snapshot(out / "00001-b") == new
    assert samples.find_snapshot(out / "00000-a") == old == samples.find_snapshot(old)
    (out / "empty").mkdir()
    with pytest.raises(UserError, match="train first"):
        samples.find_snapshot(out / "empty")


def test_video_is_a_loop_of_the_asked_length_and_size(network, tmp_path):
    out = tmp_path / "walk.mp4"
    printed = succeed(
        "video", f"--network={network}", "--seeds=0-5", "--grid=3x1", "--w-frames=20", f"--output={out}", "--scale=10"
    )
    width, step = 3 * 80 + 2 * 10 * GAP, 80 + 10 * GAP
    assert f"40 frames of {width}x80 at 30 per second, 1.3 s" in printed
    output = ffmpeg.input(str(out)).output("pipe:", format="rawvideo", pix_fmt="gray")
    raw, _ = output.global_args("-loglevel", "error").run(cmd=find_ffmpeg(), capture_stdout=True, capture_stderr=True)
    frames = np.frombuffer(raw, np.uint8).reshape(-1, 80, width).astype(float)
    assert len(frames) == 40
    cells = expected(network, range(6))[..., 0].repeat(10, 1).repeat(10, 2).astype(float)
    for frame, keyframe in ((0, 0), (20, 1)):  # seeds 0, 1 are keyframes of the first cell, 2, 3 of the second, ...
        for column, wanted in enumerate(cells[keyframe::2]):
            assert np.abs(frames[frame, :, column * step : column * step + 80] - wanted).mean() < 6
    steps = np.abs(frames - np.roll(frames, 1, 0)).mean((1, 2))
    assert steps[0] < 2 * steps[1:].max()


def test_walk_frames_do_not_depend_on_how_many_are_made_at_once(conditional, monkeypatch):
    snapshot = load_snapshot(conditional)
    cells = pictures.keyframe_seeds(list(range(4)), 2, None)
    whole = np.stack(list(pictures.walk(snapshot, cells, None, 0.7, 2, 5)))
    monkeypatch.setattr("gan.sampling.batch_size", lambda G, stage: 1)
    single = np.stack(list(pictures.walk(snapshot, cells, None, 0.7, 2, 5)))
    assert whole.shape == (10, 8, 16 + GAP, 3)
    assert np.abs(whole.astype(int) - single).max() <= 1


def test_keyframe_seeds_are_dealt_in_order_and_repeat_to_fill():
    assert pictures.keyframe_seeds([5, 6, 7, 8], 2, None) == [[5, 6], [7, 8]]
    assert pictures.keyframe_seeds([5, 6, 7], 2, 2) == [[5, 6], [7, 5]]


def test_transparency_is_laid_over_white():
    picture = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 51]]], np.uint8)
    assert pictures.opaque(picture).tolist() == [[[10, 20, 30], [255, 255, 255], [204, 204, 204]]]
    assert pictures.opaque(np.array([[[9]]], np.uint8)).tolist() == [[[9, 9, 9]]]


def test_errors_are_one_line_and_exit_2(tmp_path):
    command = [sys.executable, "-m", "launch.generate", "grid", f"--network={tmp_path / 'missing'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("saddle generate: error: no snapshot")
    assert done.stderr.count("\n") == 1
