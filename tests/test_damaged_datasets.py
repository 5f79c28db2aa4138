"""Datasets that a stranger made, a disk damaged or somebody changed while they were read: one line, and no signal."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import lmdb
import numpy as np
import pytest
from forked import forked
from stores import COUNT, LEVELS, build, images

from data import verify as verifying
from data.cache import cached
from data.dataset import ImageDataset
from data.encodings import for_key, with_crc, without_crc
from data.errors import DataError
from data.sources import open_source
from data.store import Manifest, image_key, open_reader
from data.verify import verify

PAGE = 4096
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture
def path(tmp_path) -> Path:
    build(tmp_path / "x.lmdb")
    return tmp_path / "x.lmdb"


def records(path: Path) -> dict[bytes, bytes]:
    with lmdb.open(str(path), subdir=False, readonly=True, lock=False) as env, env.begin() as transaction:
        return dict(transaction.cursor())


def put(path: Path, changes: dict[bytes, bytes]) -> None:
    with lmdb.open(str(path), subdir=False, lock=False, map_size=1 << 26) as env, env.begin(write=True) as transaction:
        for key, value in changes.items():
            transaction.put(key, value)


def put_manifest(path: Path, **changes) -> None:
    fields = json.loads(without_crc(records(path)[b"manifest"])) | changes
    put(path, {b"manifest": with_crc(json.dumps(fields).encode())})


def test_a_right_record_in_the_wrong_place_is_found(path):
    found = records(path)
    put(path, {image_key(2, 3): found[image_key(2, 4)], image_key(2, 4): found[image_key(2, 3)]})
    dataset = ImageDataset(path)
    dataset.read(np.array([3]), 2)
    for index in (3, 4):
        with pytest.raises(DataError, match=f"image {index} at 16x32 .* checksum"):
            dataset.read(np.array([index]), 2, check=True)
    assert len(verify(path)) == 2


def test_datasets_of_the_version_before_are_read_verified_and_repaired_in_their_own_format(path):
    older = {key: with_crc(value[:-4]) for key, value in records(path).items()}
    put(path, older)
    put_manifest(path, version=2)
    assert verify(path) == []
    dataset = ImageDataset(path)
    wanted = np.stack([pyramid[2] for pyramid in images()])
    np.testing.assert_array_equal(dataset.read(np.arange(COUNT), 2, check=True), wanted)
    np.testing.assert_array_equal(dataset.labels, np.arange(COUNT) % 3)


def overwrite(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5000] ^= 1
    with path.open("r+b") as file:
        file.write(content)


@pytest.mark.parametrize("change", [overwrite, lambda path: os.truncate(path, path.stat().st_size // 2)])
def test_a_file_that_is_written_to_while_it_is_read_stops_the_reader(path, change):
    dataset = ImageDataset(path)
    dataset.read(np.arange(3), 2)
    assert dataset.labels is not None
    os.utime(path, ns=(0, 0))  # so that the time differs whatever the clock's resolution
    with pytest.raises(DataError, match="changed while in use"):
        dataset.read(np.arange(3), 2)
    dataset = ImageDataset(path)
    dataset.read(np.arange(3), 2)
    change(path)
    with pytest.raises(DataError, match="changed while in use"):
        dataset.read(np.arange(3), 2)


@pytest.mark.parametrize(
    "change",
    [
        {"content_hash": "/tmp/evil"},
        {"content_hash": "../" * 20 + "a" * 4},
        {"content_hash": "A" * 64},
        {"content_hash": "0" * 63},
        {"content_hash": None},
        {"count": 10**8},
        {"count": 10**30},
        {"count": 0},
        {"count": -1},
        {"count": True},
        {"count": "25"},
        {"count": COUNT - 1},
        {"channels": 0},
        {"channels": 2},
        {"channels": [3]},
        {"base": [4]},
        {"base": [0, 8]},
        {"base": [1 << 60, 8]},
        {"base": 4},
        {"base": None},
        {"levels": []},
        {"levels": [0, 2]},
        {"levels": [40]},
        {"levels": None},
        {"levels": [True]},
        {"encoding": "gif"},
        {"encoding": []},
        {"lossy": 1},
        {"transform": 3},
        {"classes": [1, 2]},
        {"classes": "abc"},
        {"classes": [["a"]]},
        {"label_dim": 0},
        {"label_dim": "3"},
        {"label_dim": 1 << 23},
        {"source": None},
        {"skipped": []},
        {"skipped": {"a": "b"}},
        {"skipped_positions": [None]},
        {"skipped_positions": [COUNT + 1]},
        {"skipped_positions": [2, 1]},
        {"skipped_positions": [1, 1]},
        {"color_changes": [1]},
        {"lmdb": 3},
        {"version": 4},
        {"version": "3"},
        {"version": [3]},
        {"more": 1},
    ],
)
def test_a_manifest_with_wrong_values_is_one_line(path, tmp_path, change):
    put_manifest(path, **change)
    for use in (ImageDataset, lambda path: ImageDataset(cached(path, tmp_path / "cache"))):
        with pytest.raises(DataError) as error:
            use(path)
        assert "x.lmdb" in str(error.value) or ".lmdb is damaged, 77 entries" in str(error.value)
        assert "\n" not in str(error.value)
    assert set(tmp_path.iterdir()) - {tmp_path / "cache"} == {path}


@pytest.mark.parametrize(
    "text", ["[]", "null", "1", DEEP, '{"version": 3, "a": ' + DEEP + "}", "", "{", '{"version": 3}']
)
def test_a_manifest_that_is_no_object_is_one_line(path, text):
    put(path, {b"manifest": with_crc(text.encode())})
    for use in (ImageDataset, verify):
        with pytest.raises(DataError, match="manifest"):
            use(path)


def test_text_of_a_stranger_can_be_printed(path):
    evil = "a\x1b]0;x\x07\u202e"
    put_manifest(
        path, classes=[evil, "b", "c"], source=evil, skipped={evil: 1}, color_changes={evil: 2}, transform=evil
    )
    manifest = ImageDataset(path).manifest
    texts = [*manifest.classes, manifest.source, *manifest.skipped, *manifest.color_changes]
    assert all(text.isprintable() for text in texts) and manifest.classes[0] == r"a\x1b]0;x\x07\u202e"
    assert Manifest.from_json(manifest.to_json()) == manifest


@pytest.mark.parametrize("label", [3, -1, 1 << 30])
def test_a_label_outside_of_the_classes_is_one_line(path, label):
    labels = np.full(COUNT, label, "<i4").tobytes()
    put(path, {b"labels": for_key(b"labels", with_crc(labels))})
    with pytest.raises(DataError, match=f"label {label} of image 0 .* outside its 3 classes"):
        _ = ImageDataset(path).labels


def outcome(path: Path) -> str:
    """Read all of a dataset as training does; "right", or the line that refuses it."""
    try:
        dataset = ImageDataset(path)
        same = [np.array_equal(dataset.read(np.arange(COUNT), k, check=True), [p[k] for p in images()]) for k in LEVELS]
        return "right" if all(same) and np.array_equal(dataset.labels, np.arange(COUNT) % 3) else "wrong"
    except DataError as error:
        return str(error)


def from_source(path: Path) -> str:
    """The same as a source of `saddle prepare`."""
    try:
        for item in open_source(str(path)).read():
            _ = item.image
        return "right"
    except DataError as error:
        return str(error)


@pytest.mark.parametrize("read", [outcome, from_source])
def test_each_page_that_became_noise_is_one_line_or_not_used(path, read):
    """In the process that reads: LMDB trusts its inner pages, and dies of wrong ones."""
    whole = path.read_bytes()
    for page in range(len(whole) // PAGE):
        for noise in (np.random.default_rng(page).bytes(PAGE), bytes(PAGE)):
            path.write_bytes(whole[: PAGE * page] + noise + whole[PAGE * (page + 1) :])
            line = forked(lambda: read(path))
            assert line == "right" or (str(path) in line and "\n" not in line), (page, line)


def test_a_value_that_ends_beyond_the_file_is_one_line(path):
    content = path.read_bytes()
    place = 0
    while (place := content.find(image_key(2, 3), place + 1)) > 0:
        # 8 to 4 bytes before a key LMDB keeps the size of its value: 2 GB now, beyond the end of the file
        content = content[: place - 6] + b"\xff\x7f" + content[place - 4 :]
    path.write_bytes(content)
    for read in (outcome, from_source):
        assert f"{path} is damaged" in forked(lambda read=read: read(path))


def test_verify_keeps_the_first_problems_only(path, monkeypatch):
    monkeypatch.setattr(verifying, "MOST_BAD", 5)
    put(path, {image_key(2, index): with_crc(b"") for index in range(COUNT)})
    problems = verify(path)
    assert 5 <= len(problems) <= COUNT + 1 and "has more bad records" in problems[-1]


WAITING = """
import os, sys, time
from data.verify import verify

def progress(items, total, label):
    print(os.getpid(), flush=True)  # of the child, in which records are read
    time.sleep(600)
    return items

verify(sys.argv[1], progress)
"""


def test_the_child_of_verify_ends_with_its_parent(path):
    command = [sys.executable, "-c", WAITING, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        child = int(process.stdout.readline())
        assert child != process.pid
        process.send_signal(signal.SIGKILL)
    end = time.monotonic() + 60
    while alive(child):
        assert time.monotonic() < end, "it is still there"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_what_looked_sound_is_not_looked_through_again(path, monkeypatch):
    open_reader(path)
    monkeypatch.setattr("data.store.in_child", None)
    ImageDataset(path)


def test_verify_brings_back_nothing_but_problems_from_its_child(path, monkeypatch):
    """Digests of all images would be gigabytes in a pipe."""
    came = []
    monkeypatch.setattr(verifying, "in_child", lambda work, if_killed: came.append(work()) or came[-1])
    assert verify(path) == [] and came == [[]]
