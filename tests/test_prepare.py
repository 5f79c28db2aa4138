"""Preparation: pixels against Pillow and numpy, bad images among good ones, sizes that are possible and not."""

import os

import numpy as np
import pytest
from PIL import Image

from data import build, build_plan
from data import prepare as module
from data.build_plan import top_level
from data.dataset import ImageDataset
from data.decoding import needed_mode
from data.encodings import ENCODINGS
from data.errors import DataError
from data.items import Item, Source
from data.prepare import prepare
from data.sizes import parse_size
from data.sources import open_source
from data.verify import verify


def noise(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(image.squeeze()) if isinstance(image, np.ndarray) else image
    image.save(path, **options)


def half_up(values):
    return np.floor(values + 0.5).astype(np.uint8)


def block_means(image, factor):
    """The mean of factor x factor blocks in float64: [H, W, C] -> [H / factor, W / factor, C]."""
    height, width, channels = image.shape
    return image.astype(np.float64).reshape(height // factor, factor, width // factor, factor, channels).mean((1, 3))


def photos(root, count=4, size=16):
    """A folder of `count` RGB images."""
    for index in range(count):
        save(root / f"{index}.png", noise(size, size, seed=index))
    return root


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


# The plan


def test_large_datasets_are_not_stored_raw_by_default(tmp_path, monkeypatch):
    photos(tmp_path / "in")
    assert prepare(str(tmp_path / "in"), tmp_path / "x").manifest.encoding == "raw"
    monkeypatch.setattr(build_plan, "RAW_LIMIT", 1000)
    assert prepare(str(tmp_path / "in"), tmp_path / "y").manifest.encoding == "webp"
    assert prepare(str(tmp_path / "in"), tmp_path / "z", encoding="raw").manifest.encoding == "raw"


def test_what_an_encoding_cannot_hold(tmp_path):
    photos(tmp_path / "in", 1)
    with pytest.raises(DataError, match="--encoding=webp holds at most 16383 pixels a side"):
        prepare(str(tmp_path / "in"), tmp_path / "x", resolution=(4, 32768), base=(1, 8192), encoding="webp")


def test_a_mode_that_the_sample_did_not_see(tmp_path, monkeypatch):
    """The last of many images is the only one with alpha: the file is the one that a full scan would have given."""
    monkeypatch.setattr(build_plan, "MODE_SAMPLE", 1)
    photos(tmp_path / "in")
    save(tmp_path / "in/y.png", noise(16, 16, 1))
    save(tmp_path / "in/z.png", noise(16, 16, 4))
    said = []
    prepare(str(tmp_path / "in"), tmp_path / "x", say=said.append)
    assert said == ["z.png needs RGBA, and the images before it fitted RGB: starting anew"]
    monkeypatch.setattr(build_plan, "MODE_SAMPLE", 256)
    prepare(str(tmp_path / "in"), tmp_path / "y")
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_the_sample_is_taken_from_all_of_a_source(tmp_path, monkeypatch):
    monkeypatch.setattr(build_plan, "MODE_SAMPLE", 4)
    for index in range(8):
        save(tmp_path / f"in/{index}.png", noise(16, 16, 4 if index in (4, 5) else 3))
    said = []
    assert prepare(str(tmp_path / "in"), tmp_path / "x", say=said.append).manifest.channels == 4
    assert said == []


def test_float_vector_labels_are_kept_past_skipped_images(tmp_path, monkeypatch):
    vectors = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)

    def read(start=0, stop=None):
        for index in range(6)[start:stop]:
            yield Item(str(index), "bad" if index == 2 else noise(4, 4, seed=index), vectors[index])

    monkeypatch.setattr(module, "open_source", lambda *args: Source("vectors", 6, None, read, label_dim=3))
    manifest = prepare("vectors", tmp_path / "x").manifest
    labels = ImageDataset(tmp_path / "x").labels
    np.testing.assert_array_equal(labels, np.delete(vectors, 2, axis=0))
    assert (labels.dtype, manifest.label_dim, manifest.classes) == (np.float32, 3, None) and verify(
        tmp_path / "x"
    ) == []


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


def test_what_is_built_inside_its_source_is_no_change_of_the_source(tmp_path):
    photos(tmp_path / "in")

    def now():
        return module.fingerprint(open_source(str(tmp_path / "in")).files)

    before = now()
    for name in ("x.lmdb.part", "x.lmdb.skipped.txt", "x.lmdb", "0"):
        (tmp_path / "in" / name).write_text("x")
        assert now() == before
    save(tmp_path / "in/0.png", noise(16, 16, seed=9))  # whose name begins as that of the dataset "0"
    assert now() != before


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


def test_opaque_alpha_widens_nothing(tmp_path):
    photos(tmp_path / "in", 3)
    opaque = np.concatenate([noise(16, 16, seed=8), np.full((16, 16, 1), 255, np.uint8)], -1)
    save(tmp_path / "in/1.5.png", opaque)
    prepare(str(tmp_path / "in"), tmp_path / "x")
    dataset = ImageDataset(tmp_path / "x")
    assert dataset.manifest.channels == 3
    np.testing.assert_array_equal(dataset.read(np.array([1]), 2)[0], opaque[..., :3])
    opaque[3, 4, 3] = 254
    save(tmp_path / "in/9.png", opaque)
    assert prepare(str(tmp_path / "in"), tmp_path / "y").manifest.channels == 4
    assert prepare(str(tmp_path / "in"), tmp_path / "z", mode="RGBA", max_images=2).manifest.channels == 4


def test_only_images_that_claim_alpha_are_decoded_to_look_for_it(tmp_path, monkeypatch):
    """The only one that is transparent lies outside of the sample, and is met when it is built."""
    for index in range(4):
        save(tmp_path / f"in/{index}.png", noise(16, 16, seed=index))
        alpha = np.full((16, 16, 1), 255, np.uint8)
        save(tmp_path / f"in/{index}a.png", np.concatenate([noise(16, 16), alpha], -1))
    save(tmp_path / "in/z.png", noise(16, 16, 4))
    looked, said = [], []
    for place in (build, build_plan):
        monkeypatch.setattr(place, "needed_mode", lambda image: looked.append(image.mode) or needed_mode(image))
    monkeypatch.setattr(build_plan, "MODE_SAMPLE", 4)
    report = prepare(str(tmp_path / "in"), tmp_path / "x", workers=1, say=said.append)
    assert report.manifest.channels == 4 and len(said) == 1 and "z.png needs RGBA" in said[0]
    assert looked.count("RGB") <= 1  # before the mode was known to be more than L
    looked.clear()
    (tmp_path / "in/z.png").unlink()
    monkeypatch.setattr(build_plan, "ALPHA_SAMPLE", 0)
    assert prepare(str(tmp_path / "in"), tmp_path / "y", workers=1).manifest.channels == 3


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
    photos(tmp_path / "in", 30, size=64)
    for source in ("digits", str(tmp_path / "in")):
        for encoding in ENCODINGS:
            path = tmp_path / f"{encoding}{len(source)}"
            report = prepare(source, path, encoding=encoding, announce=lambda *plan: plans.append(plan))
            assert 0.6 < plans[-1][1][encoding].bytes / report.bytes < 1.4


def test_a_phone_photo_with_a_second_picture_is_a_photo(tmp_path):
    frames = [Image.fromarray(noise(16, 16, seed=seed)) for seed in range(2)]
    frames[0].save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=frames[1:])
    (item,) = open_source(str(tmp_path)).read()
    assert not isinstance(item.image, str)
    assert prepare(str(tmp_path), tmp_path / "x.lmdb").manifest.count == 1


def test_the_number_of_workers(tmp_path, monkeypatch):
    """As many as are asked for, or as there are cores; macOS does not tell which of them this process may use."""
    used = []

    def build_with(workers, name):
        prepare("digits", tmp_path / name, max_images=9, workers=workers, announce=lambda *args: used.append(args[2]))

    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(99))
    build_with(32, "a")
    build_with(None, "b")
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    build_with(None, "c")
    assert used == [32, 16, 3]
