"""Encodings: lossless ones give every pixel back, the lossy one is what it says, damaged bytes are an error."""

import hashlib
import io

import numpy as np
import pytest
from PIL import Image
from stores import build, images

from data.dataset import ImageDataset
from data.encodings import ENCODINGS, encode_image
from data.errors import DataError
from data.prepare import prepare
from data.verify import verify

LOSSLESS = [name for name, row in ENCODINGS.items() if row.lossless]


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("shape", [(1, 1), (4, 8), (64, 32)])
@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless(name, shape, channels):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, channels), np.uint8)
    opaque, hidden = pixels.copy(), pixels.copy()
    opaque[..., -1], hidden[..., -1] = 255, 0  # encoders like to drop such alpha, or the color below it
    for image in (pixels, opaque, hidden, np.zeros_like(pixels)):
        decoded = ENCODINGS[name].decode(memoryview(ENCODINGS[name].encode(image)), image.shape)
        np.testing.assert_array_equal(decoded, image)
        assert decoded.dtype == np.uint8


@pytest.mark.parametrize(("name", "format"), [("webp", "WEBP"), ("png", "PNG"), ("jpeg", "JPEG")])
def test_the_bytes_are_an_ordinary_file_of_the_format(name, format):
    payload = ENCODINGS[name].encode(images(1)[0][2])
    with Image.open(io.BytesIO(payload)) as image:
        assert image.format == format and image.size == (32, 16)


def test_jpeg_is_near_and_its_color_not_subsampled():
    payload = ENCODINGS["jpeg"].encode(images(1)[0][2])
    with Image.open(io.BytesIO(payload)) as image:
        assert {layer[1:3] for layer in image.layer} == {(1, 1)}
    ramp = np.add.outer(np.arange(32), np.arange(64))[..., None].astype(np.uint8)
    decoded = ENCODINGS["jpeg"].decode(memoryview(ENCODINGS["jpeg"].encode(ramp)), ramp.shape)
    assert np.abs(decoded.astype(int) - ramp).max() <= 2


@pytest.mark.parametrize("name", ENCODINGS)
def test_damaged_bytes_are_an_error(name):
    pixels = images(1)[0][2]
    payload = ENCODINGS[name].encode(pixels)
    for bad in (payload[:-40], payload[:10], b"", ENCODINGS[name].encode(images(1)[0][1])):
        with pytest.raises(ValueError):
            ENCODINGS[name].decode(memoryview(bad), pixels.shape)


@pytest.mark.parametrize("name", ENCODINGS)
def test_datasets_of_every_encoding(tmp_path, name):
    manifest = build(tmp_path / "x.lmdb", encoding=name)
    read = ImageDataset(tmp_path / "x.lmdb").read(np.arange(25), 2, check=True)
    assert verify(tmp_path / "x.lmdb") == []
    if name != "jpeg":
        np.testing.assert_array_equal(read, [pyramid[2] for pyramid in images()])
    chain = bytes(32)
    for image in read:  # what is stored is what was hashed
        chain = hashlib.sha256(chain + hashlib.sha256(image.tobytes()).digest()).digest()
    labels = (np.arange(25) % 3).astype("<i4").tobytes()
    assert manifest.content_hash == hashlib.sha256(chain + labels).hexdigest()


def test_the_hash_does_not_depend_on_a_lossless_encoding(tmp_path):
    hashes = {
        prepare("digits", tmp_path / name, max_images=20, encoding=name).manifest.content_hash for name in LOSSLESS
    }
    assert len(hashes) == 1
    lossy = prepare("digits", tmp_path / "jpeg", max_images=20, encoding="jpeg").manifest
    assert lossy.lossy and lossy.content_hash not in hashes and verify(tmp_path / "jpeg") == []


def test_encode_image_checks_what_it_stores():
    values, digest = encode_image(images(1)[0], "jpeg")
    decoded = ENCODINGS["jpeg"].decode(memoryview(values[-1])[:-4], (16, 32, 3))
    assert digest == hashlib.sha256(decoded.tobytes()).digest()


def test_jpeg_holds_no_transparency(tmp_path):
    Image.new("RGBA", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="cannot hold transparency"):
        prepare(str(tmp_path), tmp_path / "x.lmdb", encoding="jpeg")
    assert prepare(str(tmp_path), tmp_path / "x.lmdb", encoding="jpeg", mode="RGB").manifest.lossy
