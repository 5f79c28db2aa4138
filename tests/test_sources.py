"""Sources: what they yield, in which order, with which labels; hostile folders and archives."""

import io
import os
import struct
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from data import sources
from data.errors import DataError
from data.sources import label_by_folder, open_source, stacked_choice


def png(color="red", size=(8, 8)):
    stream = io.BytesIO()
    Image.new("RGB", size, color).save(stream, "PNG")
    return stream.getvalue()


def make_folder(root, names, content=None):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png() if content is None else content)
    return str(root)


def make_zip(path, names):
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(zipfile.ZipInfo(name), png())
    return str(path)


def summary(source):
    """[(name, label, reason or None)] of a source, read twice."""
    first, second = (
        [(item.name, item.label, item.image if isinstance(item.image, str) else None) for item in source.read()]
        for _ in range(2)
    )
    assert first == second and len(first) == source.count
    return first


def test_digits_are_the_scans_of_scikit_learn():
    source, digits = open_source("digits"), load_digits()
    items = list(source.read())
    assert len(items) == source.count == 1797 and source.classes == tuple("0123456789")
    np.testing.assert_array_equal([item.label for item in items], digits.target)
    pixels = np.stack([item.image for item in items])
    assert pixels.dtype == np.uint8 and pixels.max() == 255
    np.testing.assert_array_equal(pixels, np.floor(digits.images * 255 / 16 + 0.5))
    assert open_source("digits", 5).count == len(list(open_source("digits", 5).read())) == 5


def test_stacked_digits_are_three_digits_chosen_by_the_index_alone():
    digits = load_digits()
    items = list(open_source("stacked-digits", 300).read())
    assert len(items) == 300 and open_source("stacked-digits").count == 50_000
    for index, item in enumerate(items):
        chosen = stacked_choice(index, 1797)
        np.testing.assert_array_equal(
            item.image, np.stack([np.floor(digits.images[c] * 255 / 16 + 0.5) for c in chosen], -1)
        )
        assert f"{item.label:03d}" == "".join(str(digits.target[c]) for c in chosen)
    assert open_source("stacked-digits").classes[42] == "042"
    assert [stacked_choice(index, 1797) for index in (0, 1, 49_999)] == [
        [503, 1538, 1791],
        [924, 1683, 761],
        [209, 1477, 488],
    ]
    choices = np.array([stacked_choice(index, 10) for index in range(2000)])
    assert len(np.unique(choices, axis=0)) > 800  # of 1000; 1000 * (1 - exp(-2)) = 865 expected


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match="pip install scikit-learn"):
        open_source("digits")


@pytest.mark.parametrize(
    ("names", "classes", "labels"),
    [
        (["b/1.png", "a/1.png", "a/0.png"], ("a", "b"), [0, 0, 1]),
        (["a/x/0.png", "a/y/0.png", "b/0.png"], ("a", "b"), [0, 0, 1]),
        (["10/0.png", "9/0.png", "2/0.png"], ("2", "9", "10"), [2, 0, 1]),  # classes as numbers, images by name
        (["a/0.png", "0.png"], None, [None, None]),
        (["0.png", "1.png"], None, [None, None]),
        (["train/a/0.png", "train/b/0.png"], ("a", "b"), [0, 1]),
        (["set/train/a/0.png", "set/train/b/0.png"], ("a", "b"), [0, 1]),
        (["only/0.png", "only/1.png"], None, [None, None]),
        (["train/a/0.png", "train/0.png"], None, [None, None]),
    ],
)
def test_folders_are_classes_in_a_folder_as_in_a_zip(tmp_path, names, classes, labels):
    noise = [".hidden.png", "__MACOSX/a/0.png", "a/.DS_Store", "notes.txt"]
    folder = open_source(make_folder(tmp_path / "folder", names + noise))
    archive = open_source(make_zip(tmp_path / "x.zip", names + noise))
    for source in (folder, archive):
        assert source.classes == classes and source.ignored == 1
        assert summary(source) == [(name, label, None) for name, label in zip(sorted(names), labels, strict=True)]
    assert (folder.name, archive.name) == ("folder", "x.zip")


def test_max_images_takes_the_first(tmp_path):
    source = open_source(make_folder(tmp_path, ["a/0.png", "b/0.png", "c/0.png"]), max_images=2)
    assert source.count == 2 and source.classes == ("a", "b", "c")
    assert summary(source) == [("a/0.png", 0, None), ("b/0.png", 1, None)]


def test_labels_of_nothing():
    assert label_by_folder([]) == (None, [])


@pytest.mark.parametrize("names", [[], ["readme.txt", "sub/data.csv"]])
def test_no_images(tmp_path, names):
    for source in (make_folder(tmp_path / "f", ["x.txt", *names]), make_zip(tmp_path / "x.zip", names)):
        with pytest.raises(DataError, match=r"no images in .*other files"):
            open_source(source)


def test_what_is_no_source(tmp_path):
    (tmp_path / "x.zip").write_bytes(png())
    with pytest.raises(DataError, match=r"neither a folder nor a whole zip.*digits or stacked-digits"):
        open_source(str(tmp_path / "x.zip"))
    with pytest.raises(DataError, match="does not exist"):
        open_source(str(tmp_path / "nowhere"))
    whole = make_zip(tmp_path / "y.zip", ["a.png"])
    os.truncate(whole, os.path.getsize(whole) - 10)
    with pytest.raises(DataError, match="whole zip"):
        open_source(whole)


# Hostile folders


def test_links_and_pipes(tmp_path):
    root = tmp_path / "root"
    make_folder(root, ["a/0.png", "z/0.png"])
    make_folder(tmp_path / "elsewhere", ["1.png"])
    (root / "a/loop").symlink_to(root)
    (root / "self").symlink_to("self")
    (root / "b").symlink_to(tmp_path / "elsewhere")
    make_folder(root, [".hidden/2.png"])
    (root / "c").symlink_to(root / ".hidden")  # a visible name of a hidden folder shows it
    (root / "a_again").symlink_to(root / "z")
    (root / "z/broken.png").symlink_to("nothing")
    os.mkfifo(root / "z/pipe.png")
    read = {name: reason for name, _, reason in summary(open_source(str(root)))}
    assert read.pop("a/0.png") is read.pop("z/0.png") is read.pop("b/1.png") is read.pop("c/2.png") is None
    assert "broken link" in read.pop("z/broken.png") and "not a regular file" in read.pop("z/pipe.png")
    assert set(read) == {"a/loop/", "a_again/"} and all("another name" in reason for reason in read.values())


def test_names_of_all_kinds(tmp_path):
    names = ["ünï 猫.png", "new\nline.png", os.fsdecode(b"\xff\xfe.png"), "UPPER.PNG", "-rf.png"]
    shown = [name for name, _, reason in summary(open_source(make_folder(tmp_path, names))) if reason is None]
    assert sorted(shown) == sorted(["ünï 猫.png", r"new\nline.png", r"\udcff\udcfe.png", "UPPER.PNG", "-rf.png"])
    assert "".join(shown).encode()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"hello, I am a text", "not an image"),
        (b"<html><img></html>", "not an image"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),  # a format outside the list
    ],
)
def test_files_that_are_no_images(tmp_path, content, reason):
    assert summary(open_source(make_folder(tmp_path, ["x.jpg"], content))) == [("x.jpg", None, reason)]


def bomb_png(side):
    """A tiny PNG file whose header claims side x side pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zipfile.crc32(header))
    return png()[:8] + chunk + png()[33:]


@pytest.mark.parametrize("side", [10_000, 20_000, 60_000])
def test_decompression_bombs(tmp_path, side):
    ((_, _, reason),) = summary(open_source(make_folder(tmp_path, ["bomb.png"], bomb_png(side))))
    assert "more than 89478485 pixels" in reason


@pytest.mark.parametrize(("format", "suffix"), [("GIF", "gif"), ("WEBP", "webp"), ("PNG", "png"), ("TIFF", "tif")])
def test_several_frames(tmp_path, format, suffix):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / f"x.{suffix}", format, save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / f"one.{suffix}", format)
    assert [reason for _, _, reason in summary(open_source(str(tmp_path)))] == [None, "more than one frame"]


# Hostile archives


def test_unsafe_names_are_refused_and_nothing_is_written(tmp_path):
    unsafe = ["/absolute.png", "../up.png", "a/../../up.png", "..\\up.png", "C:\\x.png"]
    archive = make_zip(tmp_path / "x.zip", ["good.png", *unsafe])
    read = summary(open_source(archive))
    assert {name for name, _, reason in read if reason == "unsafe name in the archive"} == set(unsafe)
    assert [name for name, _, reason in read if reason is None] == ["good.png"]
    assert os.listdir(tmp_path) == ["x.zip"]


def test_duplicate_names_are_two_images(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a.png", png("red"))
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a.png", png("blue"))
    colors = [item.image.convert("RGB").getpixel((0, 0)) for item in open_source(str(tmp_path / "x.zip")).read()]
    assert colors == [(255, 0, 0), (0, 0, 255)]


def test_encrypted_oversized_and_damaged_members(tmp_path, monkeypatch):
    path = tmp_path / "x.zip"
    make_zip(path, ["damaged.png", "encrypted.png", "good.png", "unknown.png"])
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("huge.png", bytes(1 << 20))
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\x01\x02")
    for name in ("damaged", "encrypted", "good", "unknown"):
        content[entry + 8] |= name == "encrypted"  # bit 0 of the flags
        content[entry + 10] = 77 if name == "unknown" else content[entry + 10]  # the compression method
        entry = content.index(b"PK\x01\x02", entry + 4)
    content[content.index(b"IDAT")] ^= 1  # in the first member
    path.write_bytes(content)
    monkeypatch.setattr(sources, "MAX_MEMBER", 1 << 19)
    read = {name: reason for name, _, reason in summary(open_source(str(path)))}
    assert read["good.png"] is None and read["encrypted.png"] == "encrypted"
    assert "unpacks to more than" in read["huge.png"]
    assert read["damaged.png"].startswith("cannot be opened: Bad CRC-32")
    assert read["unknown.png"].startswith("cannot be opened")


def test_a_zip_with_a_damaged_directory_is_refused(tmp_path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", b"not looked at")
    whole = bytearray(path.read_bytes())
    whole[whole.index(b"PK\1\2") + 2] ^= 8
    path.write_bytes(whole)
    with pytest.raises(DataError, match="damaged zip"):
        open_source(str(path))


def test_an_empty_name_is_no_source():
    """An unset shell variable must not mean the current folder."""
    with pytest.raises(DataError, match="does not exist"):
        open_source("")
