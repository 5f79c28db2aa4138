"""Paths that are no text, and names as long as the system has them: they work, or one line says why not."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from source_files import encoded, pixels

from data.cache import cached
from data.dataset import ImageDataset
from data.errors import DataError
from data.prepare import prepare
from data.repair import repair
from data.verify import verify

ROOT = Path(__file__).parents[1]
NO_TEXT = os.fsdecode(b"d\xff\xfe.lmdb")


@pytest.fixture
def folder(tmp_path):
    """A folder whose name is no text, with a source whose name is none either."""
    folder = tmp_path / os.fsdecode(b"a\xe9b")
    source = folder / os.fsdecode(b"in\xff")
    source.mkdir(parents=True)
    for index, image in enumerate(pixels(3, (16, 16))):
        (source / f"{index}.png").write_bytes(encoded(image))
    return folder


def test_a_dataset_is_built_read_checked_copied_and_repaired(folder):
    source, path = folder / os.fsdecode(b"in\xff"), folder / NO_TEXT
    prepare(str(source), path)
    for pages in ("keep", "drop"):
        np.testing.assert_array_equal(ImageDataset(path, pages).read(np.arange(3), 2), pixels(3, (16, 16)))
    assert verify(path) == []
    copy = cached(path, folder / os.fsdecode(b"cache\xff"))
    assert copy.read_bytes() == path.read_bytes()
    content = bytearray(path.read_bytes())
    content[content.index(pixels(3, (16, 16))[1].tobytes())] ^= 1
    path.write_bytes(content)
    assert len(repair(str(source), path)) == 1 and verify(path) == []


def make_sources(folder):
    """The names of sources of all kinds whose names are no text."""
    import lmdb
    import pyarrow as arrow
    import pyarrow.parquet

    images = [encoded(image) for image in pixels(3, (16, 16))]
    arrow.parquet.write_table(arrow.table({"image": images}), folder / "x.parquet")
    np.savez(folder / "x.npz", images=pixels(3, (16, 16)))
    with lmdb.open(str(folder / "x"), subdir=False, map_size=1 << 20, lock=False) as env, env.begin(write=True) as put:
        for index, content in enumerate(images):
            put.put(b"16-%05d" % index, content)
        put.put(b"length", b"3")
    for name in ("x.parquet", "x.npz", "x"):
        os.rename(folder / name, folder / os.fsdecode(b"\xff" + name.encode()))
    return [path for path in folder.iterdir() if path.is_file()]


def test_sources_of_every_kind_that_a_library_opens(tmp_path):
    for number, path in enumerate(make_sources(tmp_path)):
        assert prepare(str(path), tmp_path / f"{number}.lmdb").manifest.count == 3, path


def saddle(folder, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "PYTHONUTF8": "1"}
    command = [sys.executable, "-m", "launch.cli", *arguments]
    return subprocess.run(command, capture_output=True, cwd=folder, env=environment, timeout=60)


def test_the_commands_show_such_names_escaped(folder):
    for arguments in (["prepare", os.fsdecode(b"in\xff"), NO_TEXT], ["inspect", NO_TEXT], ["verify", NO_TEXT]):
        done = saddle(folder, *arguments)
        assert done.returncode == 0 and not done.stderr, done
        assert b"d\\udcff\\udcfe.lmdb" in done.stdout


LONG = "x" * 254


@pytest.mark.parametrize(
    "arguments",
    [
        ("prepare", "digits", LONG),
        ("prepare", "digits", "x" * 300),
        ("prepare", "digits", "y" * 300 + "/x.lmdb"),
        ("prepare", "x" * 300, "x.lmdb"),
        ("prepare", "--repair", "digits", "x" * 300),
        ("inspect", LONG),
        ("inspect", "x" * 300),
        ("verify", "x" * 300),
        ("verify", "y" * 300 + "/x"),
        ("train", f"--data={'x' * 300}", "--outdir=runs"),
        ("generate", "grid", f"--network={'x' * 300}"),
        ("evaluate", f"--network={'y' * 300}/x", "--data=x.lmdb"),
        ("evaluate", "--divergence=kl", f"--data={'x' * 300}.npy", f"--against={'x' * 300}.npy"),
    ],
)
def test_long_names_are_one_line_and_leave_nothing(tmp_path, arguments):
    done = saddle(tmp_path, *arguments)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and not done.stdout, done
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("flag", ["--outdir", "--desc", "--preset", "--init-from", "--resume", "--cache", "--metrics"])
def test_long_values_of_the_flags_of_train_are_one_line_and_leave_nothing(tmp_path, flag):
    prepare("digits", tmp_path / "digits.lmdb", resolution=(8, 8), max_images=100)
    flags = ["--data=digits.lmdb", "--outdir=runs", "--preset=digits", "--batch=16", "--kimg=0.64"]
    done = saddle(tmp_path, "train", *flags, "--set=growth.mode=none", "--set=growth.shares=[]", f"{flag}={'x' * 300}")
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1, done
    assert os.listdir(tmp_path) == ["digits.lmdb"]


def test_a_name_too_long_for_the_list_of_skipped_images_is_built_without(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/0.png").write_bytes(encoded(pixels(1, (16, 16))[0]))
    (tmp_path / "in/1.png").write_bytes(b"")
    report = prepare(str(tmp_path / "in"), tmp_path / ("x" * 248))
    assert report.manifest.count == 1 and report.skipped_file is None


@pytest.mark.parametrize("name", ["x" * 300, LONG])
def test_a_dataset_of_a_long_name(tmp_path, name):
    with pytest.raises(DataError, match=r"cannot be opened: File name too long|no dataset at"):
        ImageDataset(tmp_path / name)
