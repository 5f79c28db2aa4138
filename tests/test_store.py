"""The dataset file: its format read without our code, its integrity, and every way of opening it."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import lmdb
import numpy as np
import pytest
from stores import COUNT, LEVELS, build, images

from data.dataset import ImageDataset
from data.encodings import for_key, with_crc
from data.errors import DataError
from data.store import Manifest, image_key
from data.verify import verify

ROOT = Path(__file__).parents[1]


def sealed(key, payload):
    return for_key(key, with_crc(payload))


@pytest.fixture
def path(tmp_path):
    build(tmp_path / "x.lmdb")
    return tmp_path / "x.lmdb"


def contents(path):
    with lmdb.open(str(path), subdir=False, readonly=True, lock=False) as env, env.begin() as transaction:
        return dict(transaction.cursor())


def change(path, key, value):
    """Put (or delete, if None) a record behind the back of the store."""
    with lmdb.open(str(path), subdir=False, lock=False, map_size=1 << 24) as env, env.begin(write=True) as transaction:
        transaction.delete(key) if value is None else transaction.put(key, value)


def run(script, *args):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", script, *map(str, args)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )


def test_the_format_is_the_one_documented(path):
    found, pyramids = contents(path), images()
    expected = [b"%02d/%010d" % (level, index) for level in LEVELS for index in range(COUNT)]
    assert list(found) == [*expected, b"labels", b"manifest"]
    for level in LEVELS:
        for index in range(COUNT):
            value = found[b"%02d/%010d" % (level, index)]
            assert value[:-4] == pyramids[index][level].tobytes()
            key = b"%02d/%010d" % (level, index)
            assert int.from_bytes(value[-4:], "little") == zlib.crc32(value[:-4]) ^ zlib.crc32(key)
    labels = (np.arange(COUNT) % 3).astype("<i4").tobytes()
    crc = zlib.crc32(labels) ^ zlib.crc32(b"labels")
    assert found[b"labels"] == labels + crc.to_bytes(4, "little")
    text, crc = found[b"manifest"][:-4], found[b"manifest"][-4:]
    assert zlib.crc32(text).to_bytes(4, "little") == crc
    manifest = json.loads(text)
    chain = bytes(32)
    for pyramid in pyramids:
        chain = hashlib.sha256(chain + hashlib.sha256(pyramid[-1].tobytes()).digest()).digest()
    assert manifest["content_hash"] == hashlib.sha256(chain + labels).hexdigest()
    assert (manifest["count"], manifest["base"], manifest["levels"], manifest["version"]) == (
        COUNT,
        [4, 8],
        [0, 1, 2],
        3,
    )


def test_reads_what_was_written(path):
    dataset, pyramids = ImageDataset(path), images()
    indices = np.array([3, 24, 3, 0])
    for level in LEVELS:
        read = dataset.read(indices, level, check=True)
        np.testing.assert_array_equal(read, np.stack([pyramids[index][level] for index in indices]))
        assert read.dtype == np.uint8 and read.flags.writeable
    np.testing.assert_array_equal(dataset.labels, np.arange(COUNT) % 3)
    assert dataset.labels.dtype == np.int64 and len(dataset) == COUNT
    assert dataset.manifest.size(1) == (8, 16) and dataset.manifest.resolution == (16, 32)
    assert dataset.read(np.array([], np.int64), 0).shape == (0, 4, 8, 3)
    assert verify(path) == []


def test_unlabeled(tmp_path):
    manifest = build(tmp_path / "x.lmdb", labels=False)
    assert manifest.classes is None and ImageDataset(tmp_path / "x.lmdb").labels is None
    assert verify(tmp_path / "x.lmdb") == []


def test_manifest_round_trip(path):
    manifest = ImageDataset(path).manifest
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_wrong_requests_are_refused(path):
    dataset = ImageDataset(path)
    with pytest.raises(DataError, match=r"no level 3; it holds 4x8, 8x16, 16x32"):
        dataset.read(np.array([0]), 3)
    for index in (-1, COUNT):
        with pytest.raises(IndexError):
            dataset.read(np.array([0, index]), 0)


# Damaged files


@pytest.mark.parametrize("share", [0.99, 0.5, 0.01])
def test_a_truncated_file_is_an_error_not_a_signal(path, share):
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(DataError, match=r"is truncated, |or is damaged"):
        ImageDataset(path).read(np.arange(COUNT), 2)


def test_truncation_is_told_for_what_it_is(path):
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(DataError, match=r"is truncated, .* bytes of"):
        ImageDataset(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"hello", "not a dataset"), (b"\x00" * 100_000, "not a dataset"), (None, "no dataset at")],
)
def test_what_is_no_dataset(tmp_path, content, message):
    path = tmp_path / "x.lmdb"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        ImageDataset(path)
    assert path.exists() == (content is not None)
    with pytest.raises(DataError, match="not a file"):
        ImageDataset(tmp_path)


@pytest.mark.parametrize("manifest", [b"{", b"[]", b'{"version": 1}', b'{"version": 99, "encoding": "raw"}'])
def test_a_manifest_of_another_kind(path, manifest):
    change(path, b"manifest", manifest)
    with pytest.raises(DataError, match="the manifest of") as first:
        ImageDataset(path)
    with pytest.raises(
        DataError, match="the manifest of"
    ):  # a failure whose traceback is kept must not keep the file open
        ImageDataset(path)
    assert first.tb


def test_a_flipped_bit_is_found_and_named(path):
    content, wanted = bytearray(path.read_bytes()), images()[7][1].tobytes()
    content[content.index(wanted) + 100] ^= 1
    path.write_bytes(content)
    dataset = ImageDataset(path)
    dataset.read(np.array([7]), 1)  # not asked to check
    with pytest.raises(DataError, match=r"image 7 at 8x16 in .*x\.lmdb is damaged: its checksum"):
        dataset.read(np.array([6, 7]), 1, check=True)
    problems = verify(path)
    assert len(problems) == 1 and "image 7 at 8x16" in problems[0]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (image_key(2, 5), None, "image 5 at 16x32 .* missing"),
        (image_key(2, 5), sealed(image_key(2, 5), b"short"), "image 5 at 16x32"),
        (image_key(2, 5), with_crc(bytes(16 * 32 * 3)), "image 5 at 16x32 .* its checksum"),
        (b"03/0000000000", b"stray", "79 entries|78 entries"),
        (b"labels", None, "labels .* missing"),
        (b"labels", sealed(b"labels", b"\x01\x00\x00\x00"), "1 labels for 25 images"),
        (
            b"labels",
            sealed(b"labels", np.full(COUNT, 3, "<i4").tobytes()),
            "label 3 of image 0 .* outside its 3 classes",
        ),
        (b"labels", sealed(b"labels", np.zeros(COUNT, "<i4").tobytes()), "content hash"),
        (image_key(2, 5), sealed(image_key(2, 5), bytes(16 * 32 * 3)), "content hash"),
    ],
)
def test_verify_names_what_is_wrong(path, key, value, message):
    change(path, key, value)
    with pytest.raises(AssertionError, match=message):
        assert verify(path) == []


# Processes and threads


def test_looking_at_the_manifest_does_not_keep_the_file_open(path):
    dataset = ImageDataset(path)
    assert contents(path)[b"manifest"][:-4] == dataset.manifest.to_json().encode()


def test_a_damaged_manifest_is_not_believed(path):
    """A name that a flipped bit has changed is still a name."""
    whole = bytearray(path.read_bytes())
    start = whole.index(b'"source": "') + len(b'"source": "')
    whole[start] ^= 1
    path.write_bytes(whole)
    with pytest.raises(DataError, match="checksum"):
        ImageDataset(path)


def test_opened_twice_pickled_and_shared_by_threads(path):
    one, pyramids = ImageDataset(path), images()
    one.read(np.array([0]), 0)
    link = path.parent / "link"
    link.symlink_to(path)
    datasets = [one, ImageDataset(path), ImageDataset(link), pickle.loads(pickle.dumps(one))]
    wrong = []

    def work(dataset, seed):
        for index in np.random.default_rng(seed).integers(0, COUNT, 200):
            if not np.array_equal(dataset.read(np.array([index]), 2)[0], pyramids[index][2]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(datasets[seed % 4], seed)) for seed in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("parent_reads", [False, True])
def test_worker_processes_read_what_the_parent_opened(path, method, parent_reads, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        """
import multiprocessing, sys, zlib
import lmdb, numpy as np
from data.dataset import ImageDataset
def checksum(dataset, results):
    lmdb.open(sys.argv[1], subdir=False, readonly=True, lock=False).close()  # refused if the parent's was still open
    results.put(zlib.crc32(dataset.read(np.arange(25), 2, check=True)))
if __name__ == "__main__":
    dataset = ImageDataset(sys.argv[1])
    if sys.argv[3] == "True": dataset.read(np.arange(3), 0)
    context = multiprocessing.get_context(sys.argv[2])
    results = context.SimpleQueue()
    workers = [context.Process(target=checksum, args=(dataset, results)) for _ in range(4)]
    for worker in workers: worker.start()
    sums = {results.get() for _ in workers}
    for worker in workers: worker.join(); assert worker.exitcode == 0
    print(sums == {zlib.crc32(dataset.read(np.arange(25), 2))}, *sums)
"""
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(script), str(path), method, str(parent_reads)],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
    )
    expected = zlib.crc32(np.stack([pyramid[2] for pyramid in images()]))
    assert done.stdout.split() == ["True", str(expected)], done


def test_a_file_replaced_under_a_reader(path):
    held, late = ImageDataset(path), ImageDataset(path)
    before = held.read(np.arange(COUNT), 1)
    path.unlink()
    build(path, images()[::-1])
    np.testing.assert_array_equal(held.read(np.arange(COUNT), 1), before)  # still the file it opened
    np.testing.assert_array_equal(ImageDataset(path).read(np.arange(COUNT), 1), before[::-1])
    with pytest.raises(DataError, match="was replaced"):
        late.read(np.arange(3), 1)


def test_import_is_cheap():
    heavy = "import sys, data.loader, data.prepare; print({'torch', 'lmdb', 'PIL', 'sklearn'} & set(sys.modules))"
    assert run(heavy).stdout.strip() == "set()"
