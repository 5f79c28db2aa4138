"""Repair: bad records come back from the source as they were, and from no other source."""

import os
from dataclasses import replace

import lmdb
import numpy as np
import pytest
from PIL import Image
from stores import finish

from data import repair as repairing
from data.dataset import ImageDataset
from data.encodings import encode_image, for_key, with_crc
from data.errors import DataError
from data.prepare import prepare
from data.repair import repair
from data.sources import open_source
from data.store import image_key
from data.store_writer import StoreWriter
from data.verify import verify

PAGE = 4096  # bytes


def contents(path):
    with lmdb.open(str(path), subdir=False, readonly=True, lock=False) as env, env.begin() as transaction:
        return dict(transaction.cursor())


def change(path, records):
    """Put (or delete, if None) records behind the back of the store."""
    with lmdb.open(str(path), subdir=False, lock=False, map_size=1 << 26) as env, env.begin(write=True) as transaction:
        for key, value in records.items():
            transaction.delete(key) if value is None else transaction.put(key, value)


@pytest.fixture
def source(tmp_path):
    root = tmp_path / "in"
    for index in range(12):
        folder = root / "ab"[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02d}.png")
    (root / "a/02.png").write_bytes(b"")  # so that stored index and place in the source differ
    (root / "b/05.png").write_text("text")
    return str(root)


@pytest.mark.parametrize("encoding", ["raw", "webp", "jpeg"])
def test_bad_records_come_back(source, tmp_path, encoding):
    path = tmp_path / "x.lmdb"
    prepare(source, path, encoding=encoding)
    before = contents(path)
    flipped = bytearray(before[image_key(2, 3)])
    flipped[10] ^= 1
    change(path, {image_key(2, 3): bytes(flipped), image_key(0, 7): None, b"labels": with_crc(b"short")})
    assert len(verify(path)) >= 3
    problems = repair(source, path)
    assert "image 3 at 16x16" in " ".join(problems) and "image 7 at 4x4" in " ".join(problems)
    assert contents(path) == before and verify(path) == [] and repair(source, path) == []
    assert ImageDataset(path).manifest.skipped_positions == (1, 8)


@pytest.mark.parametrize("key", [image_key(2, 4), image_key(1, 4), b"labels"])
def test_another_source_is_refused_and_nothing_changed(source, tmp_path, key):
    path = tmp_path / "x.lmdb"
    prepare(source, path)
    value = bytearray(contents(path)[key])
    value[0] ^= 1
    change(path, {key: bytes(value)})
    damaged = path.read_bytes()
    if key == b"labels":
        os.rename(f"{source}/b/01.png", f"{source}/a/zz.png")
    else:
        Image.new("RGB", (16, 16), "red").save(f"{source}/a/10.png")  # stored as image 4
    with pytest.raises(DataError, match="is not what the dataset was made of"):
        repair(source, path)
    os.remove(f"{source}/a/10.png")
    with pytest.raises(DataError, match="11 images of 12"):
        repair(source, path)
    assert path.read_bytes() == damaged


def test_what_is_no_bad_record_is_not_repaired(source, tmp_path):
    path = tmp_path / "x.lmdb"
    prepare(source, path)
    whole = path.read_bytes()
    change(path, {b"stray": b"x"})
    with pytest.raises(DataError, match="more than bad records"):
        repair(source, path)
    change(path, {image_key(2, 3): b"bad"})
    with pytest.raises(DataError, match="none of a dataset"):
        repair(source, path)
    path.write_bytes(whole)
    change(
        path, {image_key(2, 3): for_key(image_key(2, 3), with_crc(bytes(16 * 16 * 3)))}
    )  # a good record of other pixels
    with pytest.raises(DataError, match=r"the content hash .*more than bad records"):
        repair(source, path)


def test_each_page_that_became_noise_is_one_error_and_no_signal(source, tmp_path):
    """Whatever it held: of what LMDB knows about the file, of the tree of keys, or of records."""
    path = tmp_path / "x.lmdb"
    prepare(source, path)
    whole = path.read_bytes()
    pages = len(whole) // PAGE
    assert pages > 5
    for page in range(pages):
        noise = np.random.default_rng(page).bytes(PAGE)
        path.write_bytes(whole[: PAGE * page] + noise + whole[PAGE * (page + 1) :])
        with pytest.raises(DataError) as error:
            verify(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value), page


def test_zeros_where_records_lie_are_a_bad_record_each(source, tmp_path):
    """What a page says of itself is whole, so LMDB finds the records, and only their checksums are wrong."""
    path = tmp_path / "x.lmdb"
    prepare(source, path)
    before = contents(path)
    content = path.read_bytes()
    for index in (0, 6):
        value = before[image_key(2, index)]
        content = content.replace(value, bytes(64) + value[64:])
    path.write_bytes(content)
    problems = verify(path)
    assert len(problems) == 2 and "image 0 at 16x16" in problems[0] and "image 6 at 16x16" in problems[1]


def test_a_page_that_kills_its_reader_is_one_error(source, tmp_path):
    path, key = tmp_path / "x.lmdb", image_key(3, 3)
    prepare(source, path, resolution=(32, 32))  # large enough for pages of their own
    content = path.read_bytes()
    place = 0
    while (place := content.find(key, place + 1)) > 0:
        # 8 to 4 bytes before a key LMDB keeps the size of its value: 2 GB now, beyond the end of the file
        content = content[: place - 6] + b"\xff\x7f" + content[place - 4 :]
    path.write_bytes(content)
    for command in (verify, lambda path: repair(source, path)):
        with pytest.raises(DataError, match="damaged in its inner pages: build it anew"):
            command(path)


def test_a_page_that_lmdb_refuses_is_one_error(source, tmp_path):
    path, key = tmp_path / "x.lmdb", image_key(1, 3)
    prepare(source, path)
    content = path.read_bytes()
    place = 0
    while (place := content.find(key, place + 1)) > 0:
        content = content[: place - 6] + b"\xff\x7f" + content[place - 4 :]
    path.write_bytes(content)
    with pytest.raises(DataError, match="MDB_CORRUPTED"):
        repair(source, path)


def test_labels_are_read_in_one_pass(tmp_path, monkeypatch):
    """A source may decode many items to give one: image by image that would be quadratic."""
    opened = open_source("digits", 40)
    reads = []

    def read(start=0, stop=None):
        reads.append((start, stop))
        return opened.read(start, stop)

    path = tmp_path / "x.lmdb"
    prepare("digits", path, max_images=40)
    before = contents(path)
    change(path, {b"labels": with_crc(b"short")})
    monkeypatch.setattr(repairing, "open_source", lambda *args, **options: replace(opened, read=read))
    assert len(repair("digits", path)) == 1 and contents(path) == before
    assert reads == [(0, None)]


def test_records_of_all_pages_may_be_bad(tmp_path):
    pixels = np.zeros((16, 16, 1), np.uint8)
    values, digest = encode_image([pixels], "raw")
    path, count = tmp_path / "x.lmdb", 100_000
    with StoreWriter(path, "test", "L") as writer:
        for _ in range(0, count, 10_000):
            writer.add(10_000, (0,), [values] * 10_000, [digest] * 10_000, [None] * 10_000)
        finish(writer, channels=1, base=(16, 16), levels=(0,))
    keys = [image_key(0, index) for index in range(0, count, 14)]
    repairing._replace(path, {key: for_key(key, values[0]) for key in keys}, count + 1)
