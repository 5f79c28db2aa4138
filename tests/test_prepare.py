"""Preparation: pixels against Pillow and numpy, bad images among good ones, sizes that are possible and not."""

import io
import os

import numpy as np
import pytest
from PIL import Image

from data import prepare as module
from data.dataset import ImageDataset
from data.errors import DataError
from data.images import TRANSFORMS, convert, decode, natural_mode, pyramid
from data.plan import parse_size, top_level
from data.prepare import prepare
from data.sources import open_source
from data.verify import verify


def noise(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(image.squeeze()) if isinstance(image, np.ndarray) else image
    image.save(path, **options)


def photos(root, count=4, size=16):
    """A folder of `count` RGB images."""
    for index in range(count):
        save(root / f"{index}.png", noise(size, size, seed=index))
    return root


def half_up(values):
    return np.floor(values + 0.5).astype(np.uint8)


def block_means(image, factor):
    """The mean of factor x factor blocks in float64: [H, W, C] -> [H / factor, W / factor, C]."""
    height, width, channels = image.shape
    return image.astype(np.float64).reshape(height // factor, factor, width // factor, factor, channels).mean((1, 3))


# The pyramid


def pyramid_of(top, count):
    return [level[0] for level in pyramid(top[None], count)]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(4, 4), (16, 16), (64, 32), (256, 256)])
def test_each_level_is_the_rounded_mean_of_the_top(size, channels):
    top = noise(*size, channels)
    levels = pyramid_of(top, min(size).bit_length())
    for below, level in enumerate(reversed(levels)):
        np.testing.assert_array_equal(level, half_up(block_means(top, 2**below)))
        assert level.dtype == np.uint8


def test_halves_are_rounded_up_and_only_once():
    top = np.array([[0, 1, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0]], np.uint8)[..., None]
    small, middle, _ = pyramid_of(top, 3)
    np.testing.assert_array_equal(middle[..., 0], [[1, 0], [1, 0]])
    assert small.item() == 0  # 4/16; the mean of the rounded middle would be 1/2, and round to 1


def test_color_is_weighted_by_alpha():
    top = noise(32, 32, 4)
    top[:8, :8, 3] = 0
    alpha = top[..., 3:].astype(np.float64)
    for below, level in enumerate(reversed(pyramid_of(top, 6))):
        weights, colors = block_means(alpha, 2**below), block_means(top[..., :3] * alpha, 2**below)
        if below:
            np.testing.assert_array_equal(level[..., :3], half_up(colors / np.maximum(weights, 1e-9)))
        np.testing.assert_array_equal(level[..., 3:], half_up(weights))


def test_opaque_images_have_the_pyramid_of_their_colors():
    colors = noise(64, 64)
    opaque = np.concatenate([colors, np.full((64, 64, 1), 255, np.uint8)], axis=2)
    for with_alpha, without in zip(pyramid_of(opaque, 7), pyramid_of(colors, 7), strict=True):
        np.testing.assert_array_equal(with_alpha[..., :3], without)
        assert (with_alpha[..., 3] == 255).all()


@pytest.mark.parametrize("side", [256, 1024])
def test_white_stays_white_down_to_one_pixel(side):
    for channels in (3, 4):
        levels = pyramid_of(np.full((side, side, channels), 255, np.uint8), side.bit_length())
        assert all((level == 255).all() for level in levels)


# Modes


def reopened(image, format="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return Image.open(stream)


def test_16_bits_are_scaled_and_rounded():
    values = np.array([[0, 128, 129, 257, 30000, 65535]], np.uint16)
    image = reopened(Image.fromarray(values))
    assert natural_mode(image) == "L"
    np.testing.assert_array_equal(np.asarray(decode(image, "L")), np.rint(values / 257))
    big_endian = Image.open(io.BytesIO(b"P5 6 1 65535\n" + values.astype(">u2").tobytes()))
    np.testing.assert_array_equal(np.asarray(decode(big_endian, "L")), np.rint(values / 257))
    assert decode(Image.fromarray(np.array([[70_000]], np.int32)), "L") == "damaged: 32-bit pixels have no known range"


def test_cmyk_palette_and_single_bits():
    rgb = Image.fromarray(noise(16, 16))
    cmyk = reopened(rgb.convert("CMYK"), "TIFF")
    np.testing.assert_array_equal(np.asarray(decode(cmyk, "RGB")), np.asarray(rgb))
    palette = rgb.quantize(16)
    assert natural_mode(reopened(palette)) == "RGB"
    np.testing.assert_array_equal(np.asarray(decode(reopened(palette), "RGB")), np.asarray(palette.convert("RGB")))
    bits = reopened(rgb.convert("1"))
    assert natural_mode(bits) == "L"
    np.testing.assert_array_equal(np.unique(np.asarray(decode(bits, "L"))), [0, 255])


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
def test_transparency_is_seen_and_laid_onto_white_if_it_must_go(mode):
    image = Image.new(mode, (4, 4), {"RGBA": (0, 0, 0, 0), "LA": (0, 0), "P": 0, "RGB": (0, 0, 0), "L": 0}[mode])
    keys = {"P": 0, "RGB": (0, 0, 0), "L": 0}
    image = reopened(image, transparency=keys[mode]) if mode in keys else reopened(image)
    assert natural_mode(image) == "RGBA"
    assert (np.asarray(decode(image, "RGBA"))[..., 3] == 0).all()
    assert (np.asarray(convert(image, "RGB")) == 255).all() and (np.asarray(convert(image, "L")) == 255).all()


def test_half_transparent_red_on_white():
    image = Image.new("RGBA", (1, 1), (255, 0, 0, 128))
    assert convert(image, "RGB").getpixel((0, 0)) == (255, 127, 127)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16] = 255  # the top left quarter, once shown
    undo = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.transpose(1, 0, 2),
        6: lambda x: np.rot90(x),
        7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
        8: lambda x: np.rot90(x, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(undo[orientation](upright)))
    image = reopened(stored, "JPEG", exif=exif, quality=100)
    assert np.abs(np.asarray(decode(image, "RGB")).astype(int) - upright).max() < 8


# Transforms


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("size", [(8, 8), (16, 8), (64, 128)])
@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (37, 111), (500, 3)])
def test_transforms_give_the_size_asked_for(transform, size, shape):
    for channels in (1, 3, 4):
        fitted = TRANSFORMS[transform](
            Image.fromarray(noise(*shape, channels).squeeze(-1 if channels == 1 else ())), size
        )
        assert (fitted.height, fitted.width) == size


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_images_of_the_right_size_are_not_touched(transform):
    image = noise(16, 32)
    np.testing.assert_array_equal(np.asarray(TRANSFORMS[transform](Image.fromarray(image), (16, 32))), image)


def test_what_each_transform_keeps():
    image = np.zeros((8, 24, 3), np.uint8)
    image[:, :8], image[:, 8:16], image[:, 16:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    fitted = {name: np.asarray(fit(Image.fromarray(image), (8, 8))) for name, fit in TRANSFORMS.items()}
    assert (fitted["center-crop"] == (0, 255, 0)).all()
    assert fitted["stretch"][4, 0].argmax() == 0 and fitted["stretch"][4, 7].argmax() == 2
    assert (fitted["pad"][0] == 0).all() and fitted["pad"][4, 0].argmax() == 0 and fitted["pad"][4, 7].argmax() == 2
    rgba = Image.fromarray(image).convert("RGBA")
    assert TRANSFORMS["pad"](rgba, (8, 8)).getpixel((0, 0)) == (0, 0, 0, 0)


@pytest.mark.parametrize("side", [16, 24, 128])
def test_hidden_color_does_not_bleed(side):
    image = np.zeros((64, 64, 4), np.uint8)
    image[...] = (0, 255, 0, 0)  # green that nobody sees
    image[16:48, 16:48] = (255, 0, 0, 255)
    fitted = np.asarray(TRANSFORMS["center-crop"](Image.fromarray(image), (side, side)))
    for level in pyramid_of(fitted, 3):
        assert level[..., 1][level[..., 3] > 0].max() <= 1


# Sizes


@pytest.mark.parametrize(("text", "size"), [("64", (64, 64)), ("128x64", (128, 64)), ("4X8", (4, 8)), ("1", (1, 1))])
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "64x", "0", "-4", "4x4x4", "1e3", "4.0", "²"])
def test_sizes_that_are_none(text):
    with pytest.raises(DataError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("base", "resolution", "message"),
    [
        ((4, 4), (48, 48), r"--resolution=48 is not 4x4 times a power of two; nearest: 32, 64$"),
        ((4, 4), (3, 3), r"nearest: 4, 8$"),
        ((4, 4), (64, 32), r"--resolution=64x32 is not 4x4 .* nearest: 32x32, 64x64$"),
        ((4, 8), (64, 64), r"nearest: 32x64, 64x128$"),
        ((4, 4), (1 << 20, 1 << 20), "at most"),
    ],
)
def test_impossible_resolutions(base, resolution, message):
    with pytest.raises(DataError, match=message):
        top_level(base, resolution)


@pytest.mark.parametrize(("base", "resolution", "level"), [((4, 4), (4, 4), 0), ((3, 5), (96, 160), 5)])
def test_possible_resolutions(base, resolution, level):
    assert top_level(base, resolution) == level


def test_the_default_resolution_fits_the_first_image(tmp_path):
    save(tmp_path / "in/a.png", noise(50, 70))
    save(tmp_path / "in/b.png", noise(500, 700))
    assert prepare(str(tmp_path / "in"), tmp_path / "x").manifest.resolution == (32, 32)
    assert prepare(str(tmp_path / "in"), tmp_path / "y", base=(3, 6)).manifest.resolution == (24, 48)
    with pytest.raises(DataError, match=r"the first image, a.png, is 50x70, smaller than the base 64x64"):
        prepare(str(tmp_path / "in"), tmp_path / "z", base=(64, 64))


def test_the_default_resolution_sees_exif_and_passes_over_bad_images(tmp_path):
    save(tmp_path / "in/a.png", noise(500, 500))
    os.truncate(tmp_path / "in/a.png", 1000)
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "in/b.jpg", Image.fromarray(noise(32, 64)), exif=exif)
    assert prepare(str(tmp_path / "in"), tmp_path / "x", base=(8, 4)).manifest.resolution == (64, 32)


def test_levels_keeps_the_largest(tmp_path):
    photos(tmp_path / "in")
    manifest = prepare(str(tmp_path / "in"), tmp_path / "x", levels=2).manifest
    assert manifest.levels == (1, 2) and manifest.size(1) == (8, 8)
    assert verify(tmp_path / "x") == []
    for levels in (0, 4):
        with pytest.raises(DataError, match=r"from 4x4 to 16x16 there are 3"):
            prepare(str(tmp_path / "in"), tmp_path / "y", levels=levels)


# Whole datasets


def test_pixels_labels_and_order_of_a_folder(tmp_path):
    for folder, seed in (("10", 0), ("9", 1)):
        for index in range(3):
            save(tmp_path / "in" / folder / f"{index}.png", noise(16, 16, seed=10 * seed + index))
    prepare(str(tmp_path / "in"), tmp_path / "x.lmdb")
    dataset = ImageDataset(tmp_path / "x.lmdb")
    expected = [noise(16, 16, seed=seed) for seed in (0, 1, 2, 10, 11, 12)]
    np.testing.assert_array_equal(dataset.read(np.arange(6), 2, check=True), expected)
    np.testing.assert_array_equal(dataset.read(np.arange(6), 0), [half_up(block_means(image, 4)) for image in expected])
    assert dataset.labels.tolist() == [1, 1, 1, 0, 0, 0] and dataset.manifest.classes == ("9", "10")


def test_the_same_source_gives_the_same_file(tmp_path):
    photos(tmp_path / "in")
    first, second = (prepare(str(tmp_path / "in"), tmp_path / name) for name in ("x", "y"))
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()
    assert first.manifest == second.manifest


@pytest.mark.parametrize(
    ("added", "mode", "channels"),
    [(None, "auto", 3), (1, "auto", 3), (4, "auto", 4), (4, "RGB", 3), (4, "L", 1), (None, "RGBA", 4)],
)
def test_the_mode_holds_every_image_unless_forced(tmp_path, added, mode, channels):
    photos(tmp_path / "in")
    if added:
        save(tmp_path / "in/z.png", noise(16, 16, added))
    prepare(str(tmp_path / "in"), tmp_path / "x", mode=mode)
    dataset = ImageDataset(tmp_path / "x")
    assert dataset.manifest.channels == channels and dataset.read(np.array([0]), 2).shape == (1, 16, 16, channels)
    if channels == 4:
        assert (dataset.read(np.arange(4), 0)[..., 3] == 255).all()


def bad_images(root):
    """Ten bad images; name -> a part of the reason."""
    save(root / "jpeg.jpg", noise(64, 64))
    whole = (root / "jpeg.jpg").read_bytes()
    (root / "jpeg.jpg").write_bytes(whole[: len(whole) // 2])
    save(root / "cut.png", noise(64, 64))
    whole = (root / "cut.png").read_bytes()
    (root / "cut.png").write_bytes(whole[: len(whole) // 2])
    (root / "empty.jpg").write_bytes(b"")
    (root / "text.jpg").write_text("not a picture")
    (root / "page.png").write_text("<!doctype html>")
    save(root / "float.tif", Image.fromarray(np.ones((8, 8), np.float32)))
    frames = [Image.new("L", (8, 8), shade) for shade in (0, 9)]
    frames[0].save(root / "moving.gif", save_all=True, append_images=frames[1:])
    (root / "link.png").symlink_to("nowhere")
    return {
        "jpeg.jpg": "truncated",
        "cut.png": "truncated",
        "empty.jpg": "empty file",
        "text.jpg": "not an image",
        "page.png": "not an image",
        "float.tif": "floating-point",
        "moving.gif": "more than one frame",
        "link.png": "broken link",
    }


def test_bad_images_among_good_ones_are_skipped_and_listed(tmp_path):
    photos(tmp_path / "in")
    reasons = bad_images(tmp_path / "in")
    report = prepare(str(tmp_path / "in"), tmp_path / "x")
    assert report.found == 12 and report.manifest.count == 4 and len(report.skipped) == 8
    assert {name for _, name, _ in report.skipped} == set(reasons)
    assert all(reasons[name] in reason for _, name, reason in report.skipped)
    assert sum(report.manifest.skipped.values()) == 8 and report.manifest.skipped["not an image"] == 2
    assert report.skipped_file == tmp_path / "x.skipped.txt"
    lines = report.skipped_file.read_text().splitlines()
    assert [tuple(line.split("\t")) for line in lines] == [one[1:] for one in report.skipped]
    expected = [noise(16, 16, seed=seed) for seed in range(4)]
    np.testing.assert_array_equal(ImageDataset(tmp_path / "x").read(np.arange(4), 2), expected)
    assert verify(tmp_path / "x") == []


def test_labels_follow_their_images_past_skipped_ones(tmp_path):
    for folder in "abc":
        photos(tmp_path / "in" / folder, 2)
    (tmp_path / "in/a/0.png").write_bytes(b"")
    (tmp_path / "in/b/0.png").write_bytes(b"")
    prepare(str(tmp_path / "in"), tmp_path / "x")
    assert ImageDataset(tmp_path / "x").labels.tolist() == [0, 1, 2, 2]


@pytest.mark.parametrize("name", ["text.jpg", "cut.png"])  # found by the scan, and only by decoding
def test_strict_refuses_and_leaves_nothing(tmp_path, name):
    photos(tmp_path / "in")
    for other in set(bad_images(tmp_path / "in")) - {name}:
        (tmp_path / "in" / other).unlink()
    with pytest.raises(DataError, match=rf"{name}: .*without --strict"):
        prepare(str(tmp_path / "in"), tmp_path / "out/x", strict=True)
    assert os.listdir(tmp_path) == ["in"]


def test_nothing_but_bad_images(tmp_path):
    (tmp_path / "in").mkdir()
    bad_images(tmp_path / "in")
    with pytest.raises(DataError, match=r"none of the 8 images in in can be read; the first, cut.png: .*truncated"):
        prepare(str(tmp_path / "in"), tmp_path / "x", resolution=(8, 8))
    for name in ("jpeg.jpg", "cut.png", "float.tif"):
        (tmp_path / "in" / name).unlink()
    with pytest.raises(DataError, match=r"none of the 5 images in in can be read"):
        prepare(str(tmp_path / "in"), tmp_path / "x")
    assert os.listdir(tmp_path) == ["in"]


def test_a_stale_list_of_skipped_images_goes(tmp_path):
    photos(tmp_path / "in")
    (tmp_path / "x.skipped.txt").write_text("old")
    assert prepare(str(tmp_path / "in"), tmp_path / "x").skipped_file is None
    assert sorted(os.listdir(tmp_path)) == ["in", "x"]


def test_one_tiny_image_is_a_dataset(tmp_path):
    save(tmp_path / "in/a.png", np.full((1, 1, 3), 7, np.uint8))
    prepare(str(tmp_path / "in"), tmp_path / "x", resolution=(8, 8))
    assert (ImageDataset(tmp_path / "x").read(np.array([0]), 1) == 7).all()


def test_too_little_room_is_told_before_the_build(tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(DataError, match=r"needs about .* MB and .* free"):
        prepare("digits", tmp_path / "x")
    assert os.listdir(tmp_path) == []


def test_the_estimate_is_near_the_truth(tmp_path):
    plans = []
    report = prepare("digits", tmp_path / "x", resolution=(16, 16), announce=lambda *plan: plans.append(plan))
    assert 0.7 < plans[0][1]["raw"].bytes / report.bytes < 1.4


def test_a_phone_photo_with_a_second_picture_is_a_photo(tmp_path):
    frames = [Image.fromarray(noise(16, 16, seed=seed)) for seed in range(2)]
    frames[0].save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=frames[1:])
    (item,) = open_source(str(tmp_path)).read()
    assert not isinstance(item.image, str)
    assert prepare(str(tmp_path), tmp_path / "x.lmdb").manifest.count == 1
