"""CIFAR pickles as sources, as Python 2 and 3 write them, and pickles that are refused."""

import io
import pickle
import pickletools
import struct
import tarfile

import numpy as np
import pytest
from source_files import Evil, check, pixels

from data.errors import DataError
from data.sources import open_source
from data.sources.cifar import unpickle


def batch(images, labels, key="labels", protocol=2):
    """A batch as Python 3 pickles it."""
    data = np.moveaxis(images, 3, 1).reshape(len(images), -1)
    return pickle.dumps({"batch_label": "x", key: labels, "data": data, "filenames": ["f.png"]}, protocol)


def python2_batch(images, labels):
    """A batch as Python 2 pickled those that are distributed: byte strings everywhere, opcode by opcode."""

    def text(value):
        return b"U" + bytes([len(value)]) + value

    data = np.moveaxis(images, 3, 1).reshape(len(images), -1)
    shape = b"J" + struct.pack("<i", data.shape[0]) + b"J" + struct.pack("<i", data.shape[1]) + b"\x86"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85" + text(b"b") + b"\x87R"
    dtype = (
        b"cnumpy\ndtype\n"
        + text(b"u1")
        + b"K\0K\1\x87R(K\3"
        + text(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
    )
    state = b"(K\1" + shape + dtype + b"\x89T" + struct.pack("<i", data.nbytes) + data.tobytes() + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\2}(" + text(b"data") + array + state + text(b"labels") + numbers + b"u."


NAMES = ["air plane", "bird", "cat"]
PHOTOS = [pixels(4, (32, 32), seed=i) for i in range(12)]


def test_the_pickle_written_by_hand_is_what_it_means():
    fields = pickle.loads(python2_batch(PHOTOS[0], [0, 1, 2, 1]), encoding="bytes")
    np.testing.assert_array_equal(fields[b"data"].reshape(4, 3, 32, 32), np.moveaxis(PHOTOS[0], 3, 1))
    assert fields[b"labels"] == [0, 1, 2, 1]
    pickletools.dis(python2_batch(PHOTOS[0], [0]), out=io.StringIO())


def write_cifar10(folder, write=batch, meta=True):
    """Batches 1 to 11 and a test batch."""
    folder.mkdir()
    for number in range(11):
        (folder / f"data_batch_{number + 1}").write_bytes(write(PHOTOS[number], [0, 1, 2, number % 3]))
    (folder / "test_batch").write_bytes(write(PHOTOS[11], [2, 2, 2, 2]))
    if meta:
        (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": NAMES, "num_vis": 3072}, 2))
    return folder


@pytest.mark.parametrize("write", [batch, python2_batch])
@pytest.mark.parametrize("suffix", [None, "tar", "tar.gz"])
def test_the_training_set_of_cifar_10(tmp_path, write, suffix):
    path = folder = write_cifar10(tmp_path / "cifar-10-batches-py", write)
    if suffix:
        path = tmp_path / f"x.{suffix}"
        with tarfile.open(path, "w:gz" if suffix == "tar.gz" else "w") as archive:
            archive.add(folder, folder.name)
    source = open_source(str(path))
    assert source.classes == tuple(NAMES) and source.name == path.name
    labels = [label for number in range(11) for label in (0, 1, 2, number % 3)]
    check(source, np.concatenate(PHOTOS[:11]), labels, [f"image {i}" for i in range(44)])
    assert open_source(str(path), 5).count == 5


def test_one_batch_and_missing_names(tmp_path):
    folder = write_cifar10(tmp_path / "x")
    source = open_source(str(folder / "test_batch"))
    assert source.classes == tuple(NAMES)
    check(source, PHOTOS[11], [2] * 4)
    (folder / "batches.meta").unlink()
    source = open_source(str(folder / "data_batch_2"))
    assert source.classes == ("0", "1", "2")
    check(source, PHOTOS[1], [0, 1, 2, 1])


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_cifar_100_gives_fine_labels(tmp_path, protocol):
    (tmp_path / "train").write_bytes(batch(PHOTOS[0], [99, 0, 1, 2], "fine_labels", protocol))
    (tmp_path / "test").write_bytes(batch(PHOTOS[1], [0, 0, 0, 0], "fine_labels", protocol))
    names = [f"fine {i}" for i in range(100)]
    (tmp_path / "meta").write_bytes(pickle.dumps({"coarse_label_names": ["x"], "fine_label_names": names}, protocol))
    source = open_source(str(tmp_path))
    assert source.classes == tuple(names)
    check(source, PHOTOS[0], [99, 0, 1, 2])


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, protocol):
    sentinel = tmp_path / "sentinel"
    evil = Evil(sentinel)
    for fields in (evil, {"data": evil}, {evil: 1}, {"data": PHOTOS[0], "labels": [evil]}):
        (tmp_path / "data_batch_1").write_bytes(pickle.dumps(fields, protocol))
        for path in (tmp_path, tmp_path / "data_batch_1"):
            with pytest.raises(DataError, match=r"refused.*asks for"):
                open_source(str(path))
    (tmp_path / "data_batch_1").write_bytes(batch(PHOTOS[0], [0, 0, 0, 0]))
    (tmp_path / "batches.meta").write_bytes(pickle.dumps({"label_names": evil}, protocol))
    with pytest.raises(DataError, match=r"batches.meta.*refused.*asks for"):
        open_source(str(tmp_path))
    assert not sentinel.exists()


@pytest.mark.parametrize(
    "payload",
    [
        b"cos\nsystem\n(S'touch sentinel'\ntR.",
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"cnumpy.core.multiarray\nfromfile\n(S'x'\ntR.",
        b"cnumpy\ndtype.__class__\n.",
        b"\x8c\x05numpy\x8c\x10dtype.__init__.x\x93.",
        b"(S'x'\ni__main__\nEvil\n.",
        b"Pid\n.",
        b"\x82\1.",
        b"cnumpy\ndtype\n(S'O8'\ntR.",
        b"r\xff\xff\xff\xff.",  # a memo of four billion
        b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"(" * 100_000 + b".",
        b"]" + b"(" * 3 + b".",
        b"N.",
        b"",
    ],
)
def test_pickles_of_an_attacker(payload):
    with pytest.raises(DataError, match="refused"):
        unpickle("x", b"\x80\4" + payload)


@pytest.mark.parametrize("put", [b"r\0\0\0\2", b"p33554432\n"])
def test_a_pickle_that_numbers_its_objects_at_will_is_not_given_the_memory(put):
    """Python's own unpickler would make room for so many."""
    with pytest.raises(DataError, match="object 33554432 of 2"):
        unpickle("x", b"\x80\2N" + put + b".")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"labels": [0]}, "no array of images"),
        ({"data": [1, 2], "labels": [0]}, "no array of images"),
        ({"data": np.zeros((1, 3072), np.float32), "labels": [0]}, "array of type 'f4'"),
        ({"data": np.zeros((1, 3000), np.uint8), "labels": [0]}, "square image"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}, "1 labels for 2 images"),
        ({"data": np.zeros((1, 3072), np.uint8)}, "no list of integers"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": [-1]}, "no list of integers"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": ["a"]}, "no list of integers"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": [3]}, "label of image 0 is 3, outside of 0 to 2"),
        ({"data": np.zeros((0, 3072), np.uint8), "labels": []}, "no array of images|refused"),
    ],
)
def test_batches_that_are_none(tmp_path, fields, message):
    (tmp_path / "batches.meta").write_bytes(pickle.dumps({"label_names": NAMES}, 2))
    (tmp_path / "test_batch").write_bytes(pickle.dumps(fields, 2))
    with pytest.raises(DataError, match=message):
        open_source(str(tmp_path / "test_batch"))


def test_names_of_classes_that_are_none(tmp_path):
    write_cifar10(tmp_path / "x")
    for names in ("cat", [1, 2, 3], None):
        (tmp_path / "x/batches.meta").write_bytes(pickle.dumps({"label_names": names}, 2))
        with pytest.raises(DataError, match="no list of names"):
            open_source(str(tmp_path / "x"))


def test_batches_of_two_sizes(tmp_path):
    write_cifar10(tmp_path / "x")
    (tmp_path / "x/data_batch_3").write_bytes(batch(pixels(2, (8, 8)), [0, 0]))
    with pytest.raises(DataError, match="different sizes"):
        open_source(str(tmp_path / "x"))


def test_a_truncated_batch(tmp_path):
    whole = batch(PHOTOS[0], [0, 1, 2, 0])
    for length in (2, 100, len(whole) - 1):
        (tmp_path / "test_batch").write_bytes(whole[:length])
        with pytest.raises(DataError, match="refused"):
            open_source(str(tmp_path / "test_batch"))


def test_an_archive_of_cifar_that_lacks_the_training_set(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "test_batch").write_bytes(batch(PHOTOS[0], [0, 0, 0, 0]))
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(folder, folder.name)
    with pytest.raises(DataError, match="no training batch"):
        open_source(str(tmp_path / "x.tar"))
