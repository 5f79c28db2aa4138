"""IDX and npz files as sources, written here by hand, and what is refused."""

import gzip
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
from source_files import Evil, check, pixels

from data import streams
from data.dataset import ImageDataset
from data.errors import DataError
from data.prepare import prepare
from data.sources import arrays, open_source

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


def test_alpha_of_an_array_is_stored_or_laid_onto_white(tmp_path):
    images = pixels(3, (4, 4), 4)
    source = write_npz(tmp_path / "x.npz", images=images)
    stored = prepare(source, tmp_path / "x.lmdb").manifest
    assert stored.channels == 4
    np.testing.assert_array_equal(ImageDataset(tmp_path / "x.lmdb").read(np.arange(3), 0), images)
    prepare(source, tmp_path / "y.lmdb", mode="RGB")
    color, alpha = images[..., :3].astype(float), images[..., 3:] / 255
    onto_white = ImageDataset(tmp_path / "y.lmdb").read(np.arange(3), 0)
    np.testing.assert_allclose(onto_white, color * alpha + 255 * (1 - alpha), atol=1)


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
    monkeypatch.setattr(streams, "MAX_ARRAY", 1 << 16)
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
