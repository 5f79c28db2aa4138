"""A node's own copy of a dataset: made once, trusted while nothing has changed, replaced when it is damaged."""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data import cache
from data.cache import cache_path, cached
from data.dataset import ImageDataset
from data.errors import DataError
from data.prepare import prepare
from data.verify import verify

ROOT = Path(__file__).parents[1]


@pytest.fixture
def source(tmp_path):
    prepare("digits", tmp_path / "d.lmdb", max_images=50)
    return tmp_path / "d.lmdb"


@pytest.fixture
def copy(source, tmp_path):
    return cached(source, tmp_path / "new" / "cache")


def again(source, copy):
    """Ask once more. -> was it copied?"""
    said = []
    assert cached(source, copy.parent, announce=said.append) == copy
    assert copy.read_bytes() == source.read_bytes()
    return bool(said)


def test_a_copy_is_equal_named_by_content_and_made_once(source, copy):
    assert copy.read_bytes() == source.read_bytes() and verify(copy) == []
    assert copy.name.startswith(ImageDataset(source).manifest.content_hash[:16])
    assert not again(source, copy)
    assert sorted(p.suffix for p in copy.parent.iterdir()) == [".json", ".lmdb", ".lock"]


def test_another_dataset_and_another_pyramid_have_copies_of_their_own(source, copy, tmp_path):
    prepare("digits", tmp_path / "fewer.lmdb", max_images=49)
    prepare("digits", tmp_path / "flat.lmdb", max_images=50, levels=1)
    assert ImageDataset(tmp_path / "flat.lmdb").manifest.content_hash == ImageDataset(source).manifest.content_hash
    paths = {cached(tmp_path / name, copy.parent) for name in ("fewer.lmdb", "flat.lmdb")}
    assert len(paths | {copy}) == 3 and not again(source, copy)


def flip(copy):
    content = bytearray(copy.read_bytes())
    content[len(content) // 2] ^= 1
    copy.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        flip,
        lambda copy: os.truncate(copy, 5000),
        lambda copy: copy.write_bytes(b""),
        lambda copy: copy.unlink(),
        lambda copy: copy.with_suffix(".json").unlink(),
        lambda copy: copy.with_suffix(".json").write_text("{"),
        lambda copy: copy.with_suffix(".json").write_text("[]"),
    ],
)
def test_a_damaged_copy_is_replaced(source, copy, damage):
    damage(copy)
    assert again(source, copy) and not again(source, copy)


def test_an_open_reader_keeps_the_copy_that_another_process_replaces(source, copy):
    dataset = ImageDataset(copy)
    before = dataset.read(np.arange(50), 1)
    os.utime(copy, (0, 0))
    copy.with_suffix(".json").unlink()
    assert again(source, copy)
    np.testing.assert_array_equal(dataset.read(np.arange(50), 1), before)


def test_a_copy_of_another_time_is_read_again_and_kept(source, copy, monkeypatch):
    os.utime(copy, (0, 0))
    inode = copy.stat().st_ino
    assert not again(source, copy) and copy.stat().st_ino == inode
    monkeypatch.setattr(cache, "_crc", None)  # and then it is known
    assert not again(source, copy)


def test_the_unfinished_copy_of_a_killed_process_is_not_used(source, copy):
    copy.rename(copy.with_suffix(".part"))
    flip(copy.with_suffix(".part"))
    assert again(source, copy) and not copy.with_suffix(".part").exists()


def test_processes_wait_for_one_copy(source, tmp_path):
    script = "import sys; from data.cache import cached; cached(*sys.argv[1:3], announce=print)"
    command = [sys.executable, "-c", script, str(source), str(tmp_path / "cache")]
    processes = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    said = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert "".join(said).count("copying") == 1


def test_waiting_has_a_limit(source, copy):
    with copy.with_suffix(".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(DataError, match=r"held for 0\.1 s by another process"):
            cached(source, copy.parent, wait=0.1)


def test_a_process_that_dies_while_it_copies_does_not_block_others(source, tmp_path):
    """Its lock goes with it, and what it left unfinished is made anew."""
    script = (
        "import os, sys; from data import cache\n"
        "cache._make = lambda source, copy, identity: (copy.with_suffix('.part').write_text('half'), os._exit(3))\n"
        "cache.cached(*sys.argv[1:3])"
    )
    command = [sys.executable, "-c", script, str(source), str(tmp_path / "cache")]
    assert subprocess.run(command, cwd=ROOT, timeout=60).returncode == 3
    copy = cached(source, tmp_path / "cache", wait=5)
    assert copy.read_bytes() == source.read_bytes() and not copy.with_suffix(".part").exists()


def test_too_little_room_for_a_copy_is_refused(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(DataError, match="make room"):
        cached(source, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.part")) + list((tmp_path / "cache").glob("*.lmdb"))


def test_a_copy_that_reads_back_differently_is_refused(source, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_crc", lambda path: 1)
    with pytest.raises(DataError, match="does not give back"):
        cached(source, tmp_path)
    assert not cache_path(source, tmp_path).exists() and not list(tmp_path.glob("*.part"))


def test_where_nothing_can_be_written(source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot keep a copy"):
        cached(source, tmp_path / "file" / "cache")
    with pytest.raises(DataError, match="no dataset at"):
        cached(tmp_path / "none.lmdb", tmp_path)


def test_a_dataset_that_is_replaced_while_it_is_copied_is_refused(source, tmp_path):
    """The copy would be one dataset under the name of another, for good."""
    prepare("digits", tmp_path / "other.lmdb", max_images=49)
    with pytest.raises(DataError, match=r"d\.lmdb was replaced while it was copied: start again"):
        cached(source, tmp_path / "cache", announce=lambda line: os.replace(tmp_path / "other.lmdb", source))
    assert not [file for file in (tmp_path / "cache").iterdir() if file.suffix != ".lock"]
    assert cached(source, tmp_path / "cache").read_bytes() == source.read_bytes()
