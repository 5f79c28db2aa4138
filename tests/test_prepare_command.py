"""`saddle prepare`, `inspect` and `verify` as a user meets them: what is printed, exit codes, one-line errors."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.dataset import ImageDataset
from launch import cli, progress

ROOT = Path(__file__).parents[1]


@pytest.fixture
def saddle(capsys, monkeypatch, tmp_path):
    """Run `saddle ARGS` in an empty folder: (exit code, output, errors)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["saddle", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capsys.readouterr()

    return call


def photos(root, names):
    for seed, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8)).save(path)


def test_the_road_from_digits(saddle):
    code, output, errors = saddle("prepare", "digits", "d.lmdb", "--resolution=16")
    assert code == 0 and errors == ""
    plan, *report = output.splitlines()
    assert plan.startswith(
        "digits -> d.lmdb: 1797 images, 10 classes, 16x16 L (center-crop), levels 4x4, 8x8, 16x16, about"
    )
    assert report[0].split() == ["stored", "1797", "of", "1797", "images"]
    code, output, _ = saddle("inspect", "d.lmdb", "--json")
    facts = json.loads(output)
    assert (facts["count"], facts["resolution"], facts["sizes"]) == (1797, [16, 16], [[4, 4], [8, 8], [16, 16]])
    assert facts["images_per_class"][0] == 178 and facts["bytes"] == os.path.getsize("d.lmdb")
    code, output, _ = saddle("inspect", "d.lmdb")
    assert code == 0 and "0: 178" in output and facts["content_hash"] in output
    code, output, errors = saddle("verify", "d.lmdb")
    assert (code, output, errors) == (0, "d.lmdb: every record is good\n", "")


def test_every_flag(saddle, tmp_path):
    photos(tmp_path / "in", ["a/0.png", "b/1.png", "b/2.png"])
    code, _, errors = saddle(
        "prepare", "in", "x.lmdb", "--resolution=16x8", "--base=4x2", "--levels=2", "--transform=pad", "--mode=RGBA",
        "--max-images=2", "--strict",
    )  # fmt: skip
    assert code == 0, errors
    manifest = ImageDataset("x.lmdb").manifest
    assert (manifest.count, manifest.channels, manifest.base) == (2, 4, (4, 2))
    assert (manifest.levels, manifest.resolution, manifest.classes) == ((1, 2), (16, 8), ("a", "b"))


def test_folder_and_zip_make_the_same_dataset(saddle, tmp_path):
    names = ["cat/1.png", "cat/2.png", "dog/1.png"]
    photos(tmp_path / "in", names)
    with zipfile.ZipFile("in.zip", "w") as archive:
        [archive.write(f"in/{name}", name) for name in names]
    assert saddle("prepare", "in", "a.lmdb")[0] == saddle("prepare", "in.zip", "b.lmdb")[0] == 0
    hashes = [ImageDataset(name).manifest.content_hash for name in ("a.lmdb", "b.lmdb")]
    assert hashes[0] == hashes[1]


def test_skipped_images_are_summed_up_and_listed(saddle, tmp_path):
    photos(tmp_path / "in", ["good.png"])
    (tmp_path / "in/notes.txt").write_text("x")
    for number in range(12):
        (tmp_path / f"in/bad{number:02d}.jpg").write_text("text")
    code, output, _ = saddle("prepare", "in", "x.lmdb")
    assert code == 0 and "stored   1 of 13 images" in output and "skipped  12: not an image" in output
    assert "bad09.jpg: not an image" in output and "bad10.jpg" not in output and "and 2 more" in output
    assert "ignored  1 files that are no images: 1 .txt" in output and "x.lmdb.skipped.txt" in output
    assert len(Path("x.lmdb.skipped.txt").read_text().splitlines()) == 12
    assert "skipped  12: not an image" in saddle("inspect", "x.lmdb")[1]


def test_what_the_user_should_know_is_in_the_report(saddle, tmp_path):
    photos(tmp_path / "in", ["cat/0.png", "dog/1.png", "cover.png"])
    image = Image.open(tmp_path / "in/cover.png")
    image.save(tmp_path / "in/cover.png", icc_profile=b"broken")
    output = saddle("prepare", "in", "x.lmdb")[1]
    assert "classes  none" in output and "note: no classes, because cover.png lies beside the folders" in output
    changed = "colors   1: color profile ignored"
    assert changed in output and changed in saddle("inspect", "x.lmdb")[1]
    (tmp_path / "in/cover.png").unlink()
    (tmp_path / "in/dog/1.png").write_bytes(b"")
    assert "note: 1 classes have no image here\n" in saddle("prepare", "in", "y.lmdb")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("prepare", "in", "x.lmdb", "--resolution=48"),
            "--resolution=48 is not 4x4 times a power of two; nearest: 32, 64",
        ),
        (("prepare", "in", "x.lmdb", "--resolution=big"), "'--resolution': 'big' is not a size"),
        (("prepare", "in", "x.lmdb", "--base=0"), "'--base': '0' is not a size"),
        (("prepare", "in", "x.lmdb", "--levels=9"), "--levels=9: from 4x4 to 32x32 there are 4"),
        (("prepare", "in", "x.lmdb", "--levels=0"), "--levels"),
        (("prepare", "in", "x.lmdb", "--transform=crop"), "'center-crop', 'stretch', 'pad'"),
        (("prepare", "in", "x.lmdb", "--resolutoin=8"), "No such option"),
        (("prepare", "in"), "Missing argument 'DEST'"),
        (("prepare", "nowhere", "x.lmdb"), "nowhere does not exist: a source is digits, "),
        (("prepare", "empty", "x.lmdb"), "no images in empty"),
        (("prepare", "bad", "x.lmdb", "--strict"), "0.jpg: not an image"),
        (("prepare", "bad", "x.lmdb"), "none of the 1 images in bad can be read; the first, 0.jpg: not an image"),
        (("prepare", "in", "empty"), "empty is a folder: name a file"),
        (("prepare", "in", "old.lmdb"), "old.lmdb exists: remove it first"),
        (("inspect", "old.lmdb"), "not a dataset"),
        (("verify", "old.lmdb"), "not a dataset"),
        (("inspect", "nowhere"), "no dataset at"),
        (("verify", "nowhere"), "no dataset at nowhere: make one with saddle prepare"),
        (("verify", "in"), "in is not a file"),
        (("verify", "in/v.npz"), "v.npz holds vectors, and this command needs a dataset of images"),
        (("inspect", "in/v.npz"), "v.npz holds vectors, and this command needs a dataset of images"),
        (
            ("prepare", "in", "old.lmdb", "--repair", "--levels=2", "--base=4x4", "--strict"),
            "leave out --base, --levels, --strict",
        ),
    ],
)
def test_one_line_says_what_is_wrong_and_nothing_is_left(saddle, tmp_path, arguments, message):
    photos(tmp_path / "in", ["0.png"])
    np.savez(tmp_path / "in/v.npz", x=np.zeros((3, 2)))
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/0.jpg").write_text("text")
    (tmp_path / "old.lmdb").write_text("old")
    code, output, errors = saddle(*arguments)
    assert code == 2 and output == "" and len(errors.splitlines()) == 1 and message in errors, errors
    assert sorted(os.listdir()) == ["bad", "empty", "in", "old.lmdb"] and Path("old.lmdb").read_text() == "old"


def test_verify_names_bad_records(saddle):
    saddle("prepare", "digits", "d.lmdb", "--max-images=40")
    content = bytearray(Path("d.lmdb").read_bytes())
    wanted = ImageDataset("d.lmdb").read(np.array([11]), 1).tobytes()
    content[content.index(wanted)] ^= 4
    Path("d.lmdb").write_bytes(content)
    code, output, errors = saddle("verify", "d.lmdb")
    assert code == 2 and output == ""
    assert "image 11 at 8x8" in errors and "d.lmdb: 1 problems" in errors


def test_repair_from_the_same_source(saddle):
    saddle("prepare", "digits", "d.lmdb", "--max-images=40")
    assert saddle("prepare", "--repair", "digits", "d.lmdb")[:2] == (0, "d.lmdb: every record is good\n")
    wanted = ImageDataset("d.lmdb").read(np.array([11]), 1).tobytes()  # also in pages that LMDB has left behind
    Path("d.lmdb").write_bytes(Path("d.lmdb").read_bytes().replace(wanted, bytes([wanted[0] ^ 4]) + wanted[1:]))
    assert "--repair SOURCE d.lmdb" in saddle("verify", "d.lmdb")[2]
    code, output, _ = saddle("prepare", "--repair", "digits", "d.lmdb")
    assert code == 0 and output.startswith("repaired image ") and "1 problems repaired" in output
    assert saddle("verify", "d.lmdb")[0] == 0
    assert saddle("prepare", "--repair", "stacked-digits", "d.lmdb")[0] == 0  # which nobody needed
    assert saddle("prepare", "--repair", "digits", "nowhere")[0] == 2


def test_the_plan_shows_what_each_encoding_would_take(saddle):
    plan = saddle("prepare", "digits", "d.lmdb", "--encoding=jpeg", "--workers=2")[1].splitlines()[0]
    assert " MB jpeg (lossy) in " in plan and all(f"{name} " in plan for name in ("raw", "webp", "png"))
    assert "(jpeg, lossy)" in saddle("inspect", "d.lmdb")[1]
    assert json.loads(saddle("inspect", "d.lmdb", "--json")[1])["lossy"] is True


@pytest.mark.parametrize(
    ("count", "batch", "remedy"),
    [(1, 32, "add images, to 4 or more"), (3, 4, "add images, to 4 or more"), (5, 8, "add images or lower --batch")],
)
def test_too_few_images_to_train_on_have_the_remedy_that_works(saddle, tmp_path, count, batch, remedy):
    photos(tmp_path / "in", [f"{index}.png" for index in range(count)])
    assert saddle("prepare", "in", "x.lmdb")[0] == 0
    code, output, errors = saddle("train", "--data=x.lmdb", "--outdir=o", f"--batch={batch}", "-n")
    assert code == 2 and output == "" and errors.strip().endswith(f"fewer than one batch of {batch}; {remedy}")
    if "lower" in remedy:
        assert saddle("train", "--data=x.lmdb", "--outdir=o", "--batch=4", "-n")[0] == 0


def test_a_full_disk_is_one_line(tmp_path):
    script = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)); from launch.cli import main; main()"
    )
    command = [sys.executable, "-c", script, "prepare", "digits", "x.lmdb"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=60)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "disk full" in done.stderr, done
    assert os.listdir(tmp_path) == []


def test_progress_in_a_log_is_a_line_now_and_then(capsys, monkeypatch):
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    assert list(progress.track(range(6), 6, "build")) == list(range(6))
    assert capsys.readouterr().err.splitlines() == [
        "build: 3 of 6, about 12 s left",
        "build: 6 of 6, about 0 s left",
    ]


@pytest.mark.parametrize("command", ["prepare", "inspect", "verify"])
def test_commands_run_as_modules_from_any_folder(command, tmp_path):
    (tmp_path / "data").mkdir()  # a user's own folder of that name
    (tmp_path / "data/__init__.py").write_text("raise SystemExit('shadowed')")
    done = subprocess.run(
        [sys.executable, "-m", f"launch.{command}", "nowhere", *(["x"] if command == "prepare" else [])],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"},
        timeout=60,
    )
    assert done.returncode == 2 and done.stderr.startswith(f"saddle {command}: error: "), done
    assert len(done.stderr.splitlines()) == 1
