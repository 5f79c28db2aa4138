"""Color profiles against the closed form of their curves and matrices, in float64; broken ones; how many there were."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from data import colors, store_writer
from data.dataset import ImageDataset
from data.decoding import decode
from data.prepare import prepare

# Red, green and blue as XYZ under D50, in columns.
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
ADOBE = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
D50 = (0.9642, 1.0, 0.8249)
ADOBE_GAMMA = 563 / 256
SRGB_CURVE = "sRGB"


def fixed(value):
    """s15Fixed16."""
    return struct.pack(">i", round(value * 65536))


def curve(gamma):
    if gamma == SRGB_CURVE:  # a parametric one
        numbers = [2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045]
        return b"para" + bytes(4) + struct.pack(">HH", 3, 0) + b"".join(map(fixed, numbers))
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)


def xyz(values):
    return b"XYZ " + bytes(4) + b"".join(map(fixed, values))


def text(words):
    """desc of version 2."""
    ascii = words.encode() + b"\0"
    return b"desc" + bytes(4) + struct.pack(">I", len(ascii)) + ascii + bytes(4 + 4 + 2 + 1 + 67 + 3)


def icc(space, connection, version, tags):
    """The bytes of an ICC profile with these tags."""
    tags = {b"desc": text("a test"), b"cprt": b"text" + bytes(4) + b"none\0" + bytes(3), b"wtpt": xyz(D50)} | tags
    start = 128 + 4 + 12 * len(tags)
    table = struct.pack(">I", len(tags))
    body = b""
    for tag, content in tags.items():
        content += bytes(-len(content) % 4)
        table += tag + struct.pack(">II", start + len(body), len(content))
        body += content
    kind = b"prtr" if space == b"CMYK" else b"mntr"
    head = struct.pack(">III4s4s4s", start + len(body), 0, version, kind, space, connection)
    head += bytes(12) + b"acsp" + bytes(28) + b"".join(map(fixed, D50))
    return head.ljust(128, b"\0") + table + body


def profile(matrix=None, gamma=ADOBE_GAMMA, space=b"RGB "):
    """A profile with one curve, and a matrix if it is not grey."""
    if matrix is None:
        tags = {b"kTRC": curve(gamma)}
    else:
        tags = {channel + b"XYZ": xyz(matrix[:, place]) for place, channel in enumerate([b"r", b"g", b"b"])}
        tags |= {channel + b"TRC": curve(gamma) for channel in (b"r", b"g", b"b")}
    return icc(space, b"XYZ ", 0x04200000 if gamma == SRGB_CURVE else 0x02400000, tags)


def ink_profile(lightness):
    """A profile of CMYK in which the 16 combinations of full inks are greys of such lightness (L* in 0..255)."""
    same = bytes(range(256))
    corners = b"".join(bytes([value, 128, 128]) for value in lightness)
    identity = b"".join(map(fixed, np.eye(3).ravel()))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + identity + same * 4 + corners + same * 3
    return icc(b"CMYK", b"Lab ", 0x02400000, {b"A2B0": table})


def linear(values, gamma):
    if gamma == SRGB_CURVE:
        return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    return values**gamma


def srgb(light):
    light = np.clip(light, 0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def expected(pixels, matrix, gamma):
    """[..., 3] in 0..255 as sRGB, not rounded."""
    light = linear(pixels / 255, gamma)
    return srgb(light @ matrix.T @ np.linalg.inv(SRGB).T)


def cube():
    """uint8 [1, 4096, 3] of colors from all over the cube."""
    steps = np.arange(0, 256, 17, dtype=np.uint8)
    return np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3)


def reopened(image, format="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return Image.open(stream)


SPACES = {"Adobe RGB": (ADOBE, ADOBE_GAMMA), "Display P3": (P3, SRGB_CURVE)}


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("space", SPACES)
def test_colors_become_srgb_as_the_matrix_and_the_curve_say(space, format):
    matrix, gamma = SPACES[space]
    options = {"lossless": True} if format == "WEBP" else {}
    pixels = cube().reshape(64, 64, 3)
    image = reopened(Image.fromarray(pixels), format, icc_profile=profile(matrix, gamma), **options)
    decoded = np.asarray(decode(image, "RGB")).astype(float)
    assert np.abs(decoded - expected(pixels, matrix, gamma)).max() <= 2
    assert np.abs(decoded - pixels).max() > 20  # it matters


def test_alpha_stays_and_hidden_color_is_converted_before_it_is_laid_onto_white():
    pixels = np.concatenate([cube(), np.full((1, 4096, 1), 255, np.uint8)], -1)
    pixels[:, ::3, 3] = 0
    image = reopened(Image.fromarray(pixels), icc_profile=profile(ADOBE))
    decoded = np.asarray(decode(image, "RGBA"))
    np.testing.assert_array_equal(decoded[..., 3], pixels[..., 3])
    assert np.abs(decoded[..., :3] - expected(pixels[..., :3], ADOBE, ADOBE_GAMMA)).max() <= 2
    on_white = np.asarray(decode(reopened(Image.fromarray(pixels), icc_profile=profile(ADOBE)), "RGB"))
    assert (on_white[:, ::3] == 255).all()
    assert np.abs(on_white[:, 1::3] - expected(pixels[:, 1::3, :3], ADOBE, ADOBE_GAMMA)).max() <= 2


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
@pytest.mark.parametrize("matrix", [None, ADOBE])  # grey pixels may have a profile of either kind
def test_greys_follow_their_curve(mode, matrix):
    ramp = np.arange(256, dtype=np.uint8)[None]
    stored = {
        "L": Image.fromarray(ramp),
        "LA": Image.merge("LA", (Image.fromarray(ramp), Image.new("L", (256, 1), 255))),
        "I;16": Image.fromarray(ramp.astype(np.uint16) * 257),
    }[mode]
    icc = profile(matrix, 1.8, b"GRAY" if matrix is None else b"RGB ")
    decoded = np.asarray(decode(reopened(stored, icc_profile=icc), "L")).astype(float)
    assert np.abs(decoded - srgb(linear(ramp / 255, 1.8))).max() <= 2


def test_inks_follow_their_table():
    lightness = np.arange(255, -1, -17)
    inks = np.array([[255 * (corner >> 3 - ink & 1) for ink in range(4)] for corner in range(16)], np.uint8)
    image = reopened(Image.frombytes("CMYK", (16, 1), inks.tobytes()), "TIFF", icc_profile=ink_profile(lightness))
    assert colors.color_change(image) == colors.CONVERTED
    decoded = np.asarray(decode(image, "RGB"))[0].astype(float)
    root = (lightness / 2.55 + 16) / 116
    light = np.where(root > 6 / 29, root**3, 3 * (6 / 29) ** 2 * (root - 4 / 29))
    assert np.abs(decoded - srgb(light)[:, None]).max() <= 2


def test_an_srgb_profile_changes_nothing_whoever_made_it():
    pixels = cube()
    for content in (
        profile(SRGB, SRGB_CURVE),
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
    ):
        image = reopened(Image.fromarray(pixels), icc_profile=content)
        assert colors.color_change(image) is None
        np.testing.assert_array_equal(np.asarray(decode(image, "RGB")), pixels)


BROKEN = {
    "noise": b"\1\2\3\4" * 100,
    "cut": profile(ADOBE)[:200],
    "grey for color": profile(None, 1.8, b"GRAY"),
    "of no space": profile(ADOBE, space=b"Luv "),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_profile_is_ignored(kind):
    image = reopened(Image.fromarray(cube()), icc_profile=BROKEN[kind])
    assert colors.color_change(image) == colors.IGNORED
    np.testing.assert_array_equal(np.asarray(decode(image, "RGB")), cube())


def album(root):
    """Two images with another profile, one with that of sRGB, two with a broken one, one without."""
    root.mkdir()
    profiles = [
        profile(ADOBE),
        profile(SRGB, SRGB_CURVE),
        BROKEN["cut"],
        profile(P3, SRGB_CURVE),
        None,
        BROKEN["noise"],
    ]
    for index, icc in enumerate(profiles):
        Image.fromarray(cube().reshape(64, 64, 3)).save(root / f"{index}.png", **({"icc_profile": icc} if icc else {}))
    whole = (root / "0.png").read_bytes()
    (root / "6.png").write_bytes(whole[: len(whole) // 2])  # is skipped
    return str(root)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_report_counts_them(tmp_path, workers, monkeypatch):
    monkeypatch.setattr("data.build.CHUNK_IMAGES", 1)
    report = prepare(album(tmp_path / "in"), tmp_path / "x.lmdb", workers=workers)
    assert report.manifest.color_changes == {colors.CONVERTED: 2, colors.IGNORED: 2}
    dataset = ImageDataset(tmp_path / "x.lmdb")
    assert dataset.manifest == report.manifest and len(dataset) == 6
    first = dataset.read(np.array([0]), dataset.manifest.levels[-1])[0]
    assert np.abs(first - expected(cube().reshape(64, 64, 3), ADOBE, ADOBE_GAMMA)).max() <= 2


def test_the_count_goes_on_after_an_interruption(tmp_path, monkeypatch):
    monkeypatch.setattr("data.build.CHUNK_IMAGES", 1)
    monkeypatch.setattr(store_writer, "BATCH_BYTES", 1)
    source = album(tmp_path / "in")

    def stopping(items, total, label):
        for index, item in enumerate(items):
            if index == 3:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        prepare(source, tmp_path / "x.lmdb", workers=1, progress=stopping)
    said = []
    report = prepare(source, tmp_path / "x.lmdb", workers=1, say=said.append)
    assert "going on with" in said[0]
    assert report.manifest.color_changes == {colors.CONVERTED: 2, colors.IGNORED: 2}
