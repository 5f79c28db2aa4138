"""Parquet files and LMDBs as sources, written here by pyarrow and lmdb, and what is refused."""

import json
import os
import sys
from pathlib import Path

import lmdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image
from source_files import as_read, check, encoded, pixels

from data.errors import DataError
from data.prepare import prepare
from data.sources import lmdbs, open_source

IMAGES = pixels(10)
BYTES = [encoded(image) for image in IMAGES]
LABELS = [i % 3 for i in range(10)]

# Parquet


def structs(values, paths=None):
    """A column as datasets.Image() is stored."""
    rows = [None if value is None else {"bytes": value, "path": None} for value in values]
    return pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


def write_parquet(path, columns, names=None, label="label", **options):
    table = pa.table(columns)
    if names is not None:
        features = {"image": {"_type": "Image"}, label: {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pyarrow.parquet.write_table(table, path, **options)
    return str(path)


@pytest.mark.parametrize("label", ["label", "fine_label", "labels"])
@pytest.mark.parametrize("rows", [1, 3, 4, 100])
def test_parquet_as_the_hub_stores_it(tmp_path, label, rows):
    columns = {"image": structs(BYTES), "coarse": LABELS[::-1], label: LABELS}
    names = ["cat", "dog", "cow", "never seen"]
    source = open_source(write_parquet(tmp_path / "x.parquet", columns, names, label, row_group_size=rows))
    assert source.classes == tuple(names) and source.name == "x.parquet" and source.ignored == {}
    check(source, IMAGES, LABELS, [f"x.parquet row {i}" for i in range(10)])
    few = open_source(str(tmp_path / "x.parquet"), 4)
    assert few.count == 4 and as_read(few.read()) == as_read(source.read(0, 4))


def test_more_rows_than_are_decoded_at_once(tmp_path):
    images = pixels(200, (2, 2))
    columns = {"image": structs([encoded(image) for image in images]), "label": list(range(200))}
    check(open_source(write_parquet(tmp_path / "x.parquet", columns, row_group_size=150)), images, range(200))


@pytest.mark.parametrize(
    ("columns", "classes", "dim", "expected"),
    [
        ({"img": pa.array(BYTES, pa.large_binary()), "label": LABELS}, ("0", "1", "2"), None, LABELS),
        ({"picture": pa.array(BYTES), "text": ["x"] * 10}, None, None, [None] * 10),
        ({"image": pa.array(BYTES), "mask": pa.array(BYTES[::-1])}, None, None, [None] * 10),
        ({"image": pa.array(BYTES), "label": [[i, 0.5] for i in range(10)]}, None, 2, [[i, 0.5] for i in range(10)]),
        ({"image": pa.array(BYTES), "label": [-1] * 10}, None, None, [None] * 10),  # secret labels
        ({"image": pa.array(BYTES), "label": pa.array(LABELS).dictionary_encode()}, ("0", "1", "2"), None, LABELS),
    ],
)
def test_other_columns(tmp_path, columns, classes, dim, expected):
    source = open_source(write_parquet(tmp_path / "x.parquet", columns))
    assert (source.classes, source.label_dim) == (classes, dim)
    check(source, IMAGES, expected)


def test_a_folder_of_shards_and_its_training_set(tmp_path):
    for shard, (start, stop) in enumerate([(0, 4), (4, 4), (4, 10)]):
        columns = {"image": structs(BYTES[start:stop]), "label": pa.array(LABELS[start:stop], pa.int64())}
        write_parquet(tmp_path / f"train-{shard:05d}-of-00003.parquet", columns, list("abc"), row_group_size=2)
    source = open_source(str(tmp_path))
    check(source, IMAGES, LABELS)
    assert source.classes == ("a", "b", "c") and source.name == tmp_path.name
    assert [item.name for item in source.read(3, 5)] == [
        "train-00000-of-00003.parquet row 3",
        "train-00002-of-00003.parquet row 0",
    ]
    write_parquet(tmp_path / "test-00000-of-00001.parquet", {"image": structs(BYTES), "label": LABELS})
    (tmp_path / "README.md").write_text("a data set")
    check(open_source(str(tmp_path)), IMAGES, LABELS)
    for path in tmp_path.glob("train*"):
        path.unlink()
    check(open_source(str(tmp_path)), IMAGES, LABELS)


def test_rows_without_an_image_are_listed(tmp_path):
    column = structs([BYTES[0], None, b"", b"text", BYTES[4][:50]])
    path = write_parquet(tmp_path / "x.parquet", {"image": column})
    whole, nothing, empty, text, cut = (item.image for item in open_source(path).read())
    assert not isinstance(whole, str) and nothing.startswith("no bytes")
    assert (empty, text) == ("empty file", "not an image") and isinstance(cut, str | Image.Image)
    path = write_parquet(tmp_path / "y.parquet", {"image": pa.array([{"bytes": None, "path": "a.png"}] * 2,
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]))})  # fmt: skip
    assert {item.image for item in open_source(path).read()} == {"no bytes, only a path or nothing"}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"a": pa.array(BYTES), "b": pa.array(BYTES)}, r"not clear: name it image; it has a, b, and 2"),
        ({"image": ["a.png"], "label": [1]}, "not clear.*0 of them hold bytes"),
        ({"image": pa.array(BYTES[:2]), "label": [0, None]}, "1 rows have no label"),
        ({"image": pa.array(BYTES[:2]), "label": ["cat", "dog"]}, "neither one integer"),
        ({"image": pa.array(BYTES[:2]), "label": [0, -2]}, "label of image 1 is -2"),
        ({"image": pa.array(BYTES[:2]), "label": [[0.5], [1.0, 2.0]]}, "different lengths"),
        ({"image": pa.array(BYTES[:2]), "label": [[0.5], [float("inf")]]}, "not finite"),
        ({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}, "no images"),
    ],
)
def test_parquet_files_that_do_not_fit(tmp_path, columns, message):
    with pytest.raises(DataError, match=message):
        open_source(write_parquet(tmp_path / "x.parquet", columns))


def test_labels_outside_of_the_named_classes_and_shards_that_differ(tmp_path):
    def write(name, labels, names):
        columns = {"image": structs(BYTES)} | ({} if labels is None else {"label": labels})
        write_parquet(tmp_path / name, columns, names)

    write("a.parquet", LABELS, ["cat", "dog"])
    with pytest.raises(DataError, match="label of image 2 is 2, outside of 0 to 1"):
        open_source(str(tmp_path))
    write("a.parquet", LABELS, None)
    for labels, names in ((None, None), (LABELS, list("abc"))):
        write("b.parquet", labels, names)
        with pytest.raises(DataError, match=r"b.parquet has other columns or class names than .*a.parquet"):
            open_source(str(tmp_path))
    write("b.parquet", [[0.5]] * 10, None)
    with pytest.raises(DataError, match="of another kind"):
        open_source(str(tmp_path))


def test_a_damaged_parquet_file(tmp_path):
    path = tmp_path / "x.parquet"
    write_parquet(path, {"image": structs(BYTES), "label": LABELS}, row_group_size=5, use_dictionary=False)
    whole = path.read_bytes()
    for length in (4, 50, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match="damaged parquet") as raised:
            open_source(str(path))
        assert "\n" not in str(raised.value)
    # Damage inside of the first row group, in a file that opens.
    path.write_bytes(whole[:4] + bytes(40) + whole[44:])
    images = [item.image for item in open_source(str(path)).read()]
    assert [isinstance(image, str) for image in images] == [True] * 5 + [False] * 5
    assert images[0].startswith("cannot be opened") and "\n" not in images[0]
    check(open_source(str(path)), [*images[:5], *IMAGES[5:]], LABELS)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "x.parquet", {"image": structs(BYTES)})
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match="pip install pyarrow"):
        open_source(path)


# LMDBs of others


def write_lmdb(path, sizes=(8,), length=b"10", subdir=True, values=BYTES, extra=()):
    with lmdb.open(str(path), subdir=subdir, map_size=1 << 24) as environment, environment.begin(write=True) as txn:
        for size in sizes:
            for index, value in enumerate(values):
                txn.put(f"{size}-{index:05d}".encode(), value if size == max(sizes) else b"a smaller one")
        if length is not None:
            txn.put(b"length", length)
        for key, value in extra:
            txn.put(key, value)
    return str(path)


@pytest.mark.parametrize("subdir", [True, False])
@pytest.mark.parametrize("sizes", [(8,), (16, 32), (8, 16, 128), (64, 128, 1024)])
def test_the_largest_images_of_an_lmdb(tmp_path, subdir, sizes, monkeypatch):
    path = write_lmdb(tmp_path / "x", sizes, subdir=subdir, extra=[(b"notes", b"x"), (b"10-x", b"y")])
    source = open_source(path)
    assert source.classes is None and source.name == "x"
    names = [f"{max(sizes)}-{i:05d}" for i in range(10)]
    check(source, IMAGES, [None] * 10, names)
    monkeypatch.setattr(lmdbs, "BATCH_BYTES", 1)
    check(source, IMAGES, [None] * 10, names)
    monkeypatch.setattr(lmdbs, "BATCH_IMAGES", 3)
    check(open_source(path, 7), IMAGES[:7], [None] * 7)
    if subdir:
        check(open_source(os.path.join(path, "data.mdb")), IMAGES, [None] * 10)


def test_bad_records_are_listed(tmp_path):
    path = write_lmdb(tmp_path / "x", values=[b"", b"text", BYTES[2]], length=b"3")
    empty, text, whole = (item.image for item in open_source(path).read())
    assert (empty, text) == ("empty file", "not an image") and not isinstance(whole, str)
    with lmdb.open(path, map_size=1 << 24) as environment, environment.begin(write=True) as txn:
        txn.delete(b"8-00001")
    assert [item.image for item in open_source(path).read()][1] == "missing record"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": None}, "neither the keys of saddle prepare, nor length"),
        ({"length": b"ten"}, "length is no number"),
        ({"length": b"-1"}, "length is no number"),
        ({"length": b"0"}, "says that it has 0 images"),
        ({"length": b"9"}, "says that it has 9 images"),
        ({"length": b"99999999999"}, "says that it has 99999999999 images"),
        ({"values": []}, "no images under keys such as"),
    ],
)
def test_lmdbs_of_another_kind(tmp_path, options, message):
    with pytest.raises(DataError, match=message):
        open_source(write_lmdb(tmp_path / "x", **options))


def test_a_truncated_or_garbage_lmdb_is_an_error_and_no_signal(tmp_path):
    path = write_lmdb(tmp_path / "x", values=BYTES * 20, length=b"200", subdir=False)
    whole = Path(path).read_bytes()
    for length in (20, 4096, 8192, len(whole) // 2):
        Path(path).write_bytes(whole[:length])
        with pytest.raises(DataError):
            open_source(path)
    Path(path).write_bytes(whole[:24] + b"\xa5" * (len(whole) - 24))
    with pytest.raises(DataError):
        open_source(path)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "data.mdb").write_bytes(b"")
    with pytest.raises(DataError, match="empty"):
        open_source(str(folder))
    (folder / "data.mdb").write_bytes(b"x" * 9000)
    with pytest.raises(DataError, match="not a dataset"):
        open_source(str(folder))


# Our own


@pytest.mark.parametrize("channels", [1, 3])
def test_a_dataset_of_ours(tmp_path, channels):
    images = pixels(6, (8, 8), channels)
    np.savez(tmp_path / "x.npz", images, np.array([0, 1, 2, 0, 1, 3]))
    first = prepare(str(tmp_path / "x.npz"), tmp_path / "x.lmdb").manifest
    source = open_source(str(tmp_path / "x.lmdb"))
    assert source.classes == ("0", "1", "2", "3") and source.name == "x.lmdb"
    check(source, images, [0, 1, 2, 0, 1, 3])
    assert open_source(str(tmp_path / "x.lmdb"), 2).count == 2
    again = prepare(str(tmp_path / "x.lmdb"), tmp_path / "y.lmdb").manifest
    assert again.content_hash == first.content_hash


def test_damaged_records_of_ours_are_listed(tmp_path):
    images = pixels(6, (64, 64))
    np.savez(tmp_path / "x.npz", images)
    path = tmp_path / "x.lmdb"
    prepare(str(tmp_path / "x.npz"), path, levels=1)
    content = bytearray(path.read_bytes())
    content[content.index(images[2].tobytes()[100:200])] ^= 1
    path.write_bytes(content)
    read = [item.image for item in open_source(str(path)).read()]
    assert [isinstance(image, str) for image in read] == [i == 2 for i in range(6)]
    assert "checksum" in read[2]
    os.truncate(path, len(content) // 2)
    with pytest.raises(DataError, match="truncated"):
        open_source(str(path))


def test_an_unfinished_dataset_of_ours_is_called_so(tmp_path):
    with lmdb.open(str(tmp_path / "x.lmdb"), subdir=False) as environment, environment.begin(write=True) as txn:
        txn.put(b"02/0000000000", b"pixels")
    with pytest.raises(DataError, match="unfinished"):
        open_source(str(tmp_path / "x.lmdb"))


def test_parquet_with_a_name_that_is_no_text_or_twice_there(tmp_path):
    path = tmp_path / "x.parquet"
    write_parquet(path, {"image": structs(BYTES), "label": LABELS})
    path.write_bytes(path.read_bytes().replace(b"image", b"im\xffge"))
    with pytest.raises(DataError, match="is a damaged parquet file"):
        open_source(str(path))
    columns = [pa.array(BYTES), pa.array(LABELS), pa.array(LABELS)]
    pyarrow.parquet.write_table(pa.Table.from_arrays(columns, ["image", "label", "label"]), path)
    with pytest.raises(DataError, match=r"x.parquet is a damaged parquet file .*2 times"):
        open_source(str(path))
