"""IDX, npz and CIFAR files as sources, each written here by hand, and what is refused."""

import gzip
import io
import os
import pickle
import pickletools
import struct
import tarfile
import zipfile

import numpy as np
import pytest
from source_files import check, pixels

from data import arrays
from data.cifar import unpickle
from data.errors import DataError
from data.sources import open_source

# IDX


def idx(array, code=8):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape) + array.tobytes()


def write_idx(path, array):
    path.write_bytes(gzip.compress(idx(array)) if path.suffix == ".gz" else idx(array))
    return path


GREY = pixels(7, channels=1)
DIGITS = np.array([3, 0, 9, 9, 1, 2, 3], np.uint8)


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
        ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
        ("train-images.idx3-ubyte", "train-labels.idx1-ubyte"),
        ("emnist-letters-train-images-idx3-ubyte.gz", "emnist-letters-train-labels-idx1-ubyte"),
        ("train-images-idx3-ubyte", "train-labels-idx1-ubyte.gz"),
    ],
)
def test_idx_images_and_the_labels_beside_them(tmp_path, images, labels):
    path = write_idx(tmp_path / images, GREY)
    source = open_source(str(path))
    assert source.classes is None
    check(source, GREY, [None] * 7)
    write_idx(tmp_path / labels, DIGITS)
    source = open_source(str(path))
    assert source.classes == tuple("0123456789") and source.name == images
    check(source, GREY, DIGITS.tolist(), [f"image {i}" for i in range(7)])
    assert len(list(open_source(str(path), 3).read())) == open_source(str(path), 3).count == 3


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (idx(GREY)[:-1], "shorter than its header says"),
        (idx(GREY)[:9], "truncated"),
        (idx(GREY) + b"x", "longer than its header says"),
        (idx(GREY, 0x0D), "no IDX file of bytes"),
        (idx(DIGITS), "give the file of the images"),
        (idx(pixels(2)), "images need three numbers"),
        (idx(GREY[:0]), "no images"),
        (struct.pack(">BBBB3I", 0, 0, 8, 3, 60000, 2**30, 2**30), "claims to have"),
        (struct.pack(">BBBB3I", 0, 0, 8, 3, 1000, 1000, 4000), "shorter than its header says"),
    ],
)
def test_idx_files_that_lie_are_refused(tmp_path, suffix, content, message):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    with pytest.raises(DataError, match=message):
        open_source(str(path))


def test_damaged_gz_and_labels_that_do_not_fit(tmp_path):
    path = write_idx(tmp_path / "images-idx3.gz", GREY)
    labels = tmp_path / "labels-idx1.gz"
    write_idx(labels, DIGITS[:-1])
    with pytest.raises(DataError, match=r"labels-idx1.gz has 6 labels for 7 images"):
        open_source(str(path))
    write_idx(labels, GREY)
    with pytest.raises(DataError, match="labels need one number"):
        open_source(str(path))
    labels.unlink()
    whole = bytearray(path.read_bytes())
    path.write_bytes(whole[:-9])
    with pytest.raises(DataError, match="damaged"):
        open_source(str(path))
    whole[-6] ^= 1  # the checksum
    path.write_bytes(whole)
    with pytest.raises(DataError, match="CRC check failed"):
        open_source(str(path))


def test_a_gz_bomb_is_read_no_further_than_its_header_says(tmp_path, monkeypatch):
    reads = []
    real = gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda self, size=-1: reads.append(size) or real(self, size))
    (tmp_path / "x.gz").write_bytes(gzip.compress(idx(GREY) + bytes(1 << 26)))
    with pytest.raises(DataError, match="longer"):
        open_source(str(tmp_path / "x.gz"))
    assert reads and all(0 <= size < 1 << 17 for size in reads)


# npz


def write_npz(path, compress=False, **fields):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as archive:
        for key, array in fields.items():
            header = repr({"descr": array.dtype.str, "fortran_order": False, "shape": array.shape}).encode()
            header += b" " * (-(len(header) + 11) % 64) + b"\n"
            archive.writestr(f"{key}.npy", b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + array.tobytes())
    return str(path)


VECTORS = np.random.default_rng(1).normal(size=(7, 3))


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("keys", arrays.NPZ_KEYS)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_npz(tmp_path, compress, keys, channels):
    images = pixels(7, channels=channels)
    kinds = [(None, [None] * 7), (DIGITS, DIGITS.tolist()), (DIGITS[:, None].astype(np.int64), DIGITS.tolist())]
    kinds += [(VECTORS, VECTORS.astype(np.float32).tolist())]
    for labels, expected in kinds:
        fields = {keys[0]: images} | ({} if labels is None else {keys[1]: labels}) | {"other": DIGITS}
        source = open_source(write_npz(tmp_path / "x.npz", compress, **fields))
        assert source.classes == (tuple("0123456789") if expected[0] == 3 else None)
        assert source.label_dim == (3 if labels is VECTORS else None)
        check(source, images, expected)


def test_npz_as_numpy_writes_it_whatever_its_name_and_order(tmp_path):
    images = pixels(3)
    np.savez(tmp_path / "x.npz", np.asfortranarray(images), np.array([0, 1, 2]))
    os.rename(tmp_path / "x.npz", tmp_path / "x.dat")
    check(open_source(str(tmp_path / "x.dat")), images, [0, 1, 2])
    write_npz(tmp_path / "y.npz", images=images[..., :1])
    check(open_source(str(tmp_path / "y.npz")), images[..., 0], [None] * 3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"images": pixels(2).astype(np.float32)}, "type float32: images are uint8"),
        ({"images": np.moveaxis(pixels(2), 3, 1).copy()}, r"channels first: save numpy.moveaxis\(images, 1, 3\)"),
        ({"images": pixels(2, channels=5)}, r"\[N, H, W, C\]"),
        ({"images": DIGITS}, r"\[N, H, W\]"),
        ({"images": GREY[:0]}, "no images"),
        ({"images": GREY, "labels": DIGITS[1:]}, "has 6 labels for 7 images"),
        ({"images": GREY, "labels": -DIGITS.astype(int)}, "label of image 0 is -3"),
        ({"images": GREY, "labels": DIGITS.astype(int) << 40}, "outside of 0 to"),
        ({"images": GREY, "labels": DIGITS.astype(float)}, "neither one integer"),
        ({"images": GREY, "labels": VECTORS * np.inf}, "label of image 0 is not finite"),
        ({"images": GREY, "labels": VECTORS * 1e300}, "label of image 0 is not finite"),
        ({"images": GREY, "labels": DIGITS.astype(str)}, "neither one integer"),
        ({"pictures": GREY}, r"has arrays pictures; images are called images, x, train_images"),
    ],
)
def test_arrays_that_are_no_images_or_labels(tmp_path, fields, message):
    with pytest.raises(DataError, match=message):
        open_source(write_npz(tmp_path / "x.npz", **fields))


class Evil:
    """A pickle of it creates a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_object_arrays_and_code_in_an_npz_are_refused(tmp_path):
    sentinel = tmp_path / "sentinel"
    np.savez(tmp_path / "x.npz", images=np.array([Evil(sentinel)], dtype=object))
    with pytest.raises(DataError, match="Object arrays cannot be loaded"):
        open_source(str(tmp_path / "x.npz"))
    np.savez(tmp_path / "x.npz", images=GREY, labels=np.array([Evil(sentinel)] * 7, dtype=object))
    with pytest.raises(DataError, match="Object arrays cannot be loaded"):
        open_source(str(tmp_path / "x.npz"))
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("images.npy", pickle.dumps(Evil(sentinel)))
    with pytest.raises(DataError):
        open_source(str(tmp_path / "x.npz"))
    assert not sentinel.exists()


def test_npz_bombs_and_damage(tmp_path, monkeypatch):
    path = tmp_path / "x.npz"
    write_npz(path, True, images=np.zeros((64, 64, 64), np.uint8))
    whole = path.read_bytes()
    for length in (40, len(whole) // 2, len(whole) - 5):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match="refused or damaged"):
            open_source(str(path))
    path.write_bytes(whole)
    monkeypatch.setattr(arrays, "MAX_ARRAY", 1 << 16)
    with pytest.raises(DataError, match="65536 are the limit"):
        open_source(str(path))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("images.npy", b"")
    with pytest.raises(DataError, match="another method"):
        open_source(str(path))
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000, 1000000, 1000000), }\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header)
    with pytest.raises(DataError, match="refused or damaged"):
        open_source(str(path))


# CIFAR


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
