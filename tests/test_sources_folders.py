"""Folders and zips as sources: which items, in which order, with which labels; hostile folders and archives."""

import json
import os
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
from PIL import Image
from source_files import check, encoded, make_folder, make_zip, pixels, png

from data.errors import DataError
from data.labels import label_by_folder, no_labels
from data.sources import folders, open_source


def summary(source):
    """[(name, label, reason or None)] of a source, read twice."""
    first, second = (
        [(item.name, item.label, item.image if isinstance(item.image, str) else None) for item in source.read()]
        for _ in range(2)
    )
    assert first == second and len(first) == source.count
    return first


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
        assert source.classes == classes and source.ignored == {".txt": 1}
        assert summary(source) == [(name, label, None) for name, label in zip(sorted(names), labels, strict=True)]
    assert (folder.name, archive.name) == ("folder", "x.zip")


def test_max_images_takes_the_first(tmp_path):
    source = open_source(make_folder(tmp_path, ["a/0.png", "b/0.png", "c/0.png"]), max_images=2)
    assert source.count == 2 and source.classes == ("a", "b", "c")
    assert summary(source) == [("a/0.png", 0, None), ("b/0.png", 1, None)]


def test_labels_of_nothing():
    assert label_by_folder([]) == no_labels(0)


@pytest.mark.parametrize(
    ("names", "found"),
    [([], "no files"), (["readme.txt", "b.txt", "sub/photo.HEIC", "LICENSE"], "2 .txt, 1 .heic, 1 without suffix")],
)
def test_no_images(tmp_path, names, found):
    make_zip(tmp_path / "x.zip", names)
    (tmp_path / "f").mkdir()
    for source in (make_folder(tmp_path / "f", names), str(tmp_path / "x.zip")):
        with pytest.raises(DataError, match=f"no images in .* or below: found {found}"):
            open_source(source)


# dataset.json

NAMES = ["00001/b.png", "00000/a.png", "00001/a.png", "ünï.png"]  # by name: 1 2 0 3
IMAGES = pixels(4)


def write_labeled(path, kind, labels, names=NAMES):
    """A folder or zip of IMAGES with a dataset.json: the text given, or the labels by file name."""
    text = labels if isinstance(labels, str) else json.dumps({"labels": labels})
    files = {name: encoded(image) for name, image in zip(names, IMAGES, strict=True)} | {"dataset.json": text.encode()}
    path = path / f"labeled.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    else:
        for name, content in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
    return str(path)


BY_NAME = sorted(range(4), key=NAMES.__getitem__)


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize(
    ("labels", "classes", "dim"),
    [
        ([3, 0, 1, 0], ("0", "1", "2", "3"), None),
        ([[0.25, 1], [-1e-3, 2], [3, 4], [5, 6.5]], None, 2),
        ([None] * 4, None, None),
    ],
)
def test_dataset_json_wins_over_folders(tmp_path, kind, labels, classes, dim):
    path = write_labeled(tmp_path, kind, list(zip(NAMES, labels, strict=True)))
    source = open_source(path)
    assert (source.classes, source.label_dim, source.ignored) == (classes, dim, {})
    expected = [labels[i] if dim is None else np.array(labels[i], np.float32) for i in BY_NAME]
    check(source, IMAGES[BY_NAME], expected, sorted(NAMES))
    assert all(item.label.dtype == np.float32 for item in source.read() if dim)
    assert open_source(path, 1).classes == classes


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_dataset_json_without_labels(tmp_path, kind):
    check(open_source(write_labeled(tmp_path, kind, '{"labels": null}')), IMAGES[BY_NAME], [None] * 4)


PAIRS = [[name, 0] for name in NAMES]


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (PAIRS[1:], "no label for 00001/b.png, and for 0 other"),
        ([*PAIRS, ["x.png", 0]], "label for 'x.png'"),
        ([*PAIRS, PAIRS[0]], "names a file twice"),
        ([*PAIRS[:3], ["ünï.png", None]], "label of ünï.png is missing, that of 00000/a.png an integer"),
        ([*PAIRS[:3], ["ünï.png", [1.0]]], "label of ünï.png is a vector of 1"),
        ([[name, [0.5] * (1 + (name == "ünï.png"))] for name in NAMES], "ünï.png is a vector of 2, that of .* of 1"),
        ([*PAIRS[:3], ["ünï.png", -1]], "label of ünï.png is -1"),
        ([*PAIRS[:3], ["ünï.png", 10**30]], "label of ünï.png is .* outside of 0 to"),
        ([*PAIRS[:3], ["ünï.png", True]], "label of ünï.png is True"),
        ([*PAIRS[:3], ["ünï.png", 0.5]], "label of ünï.png is 0.5"),
        ([*PAIRS[:3], ["ünï.png", "cat"]], "label of ünï.png is 'cat'"),
        ([[name, []] for name in NAMES], r"label of 00000/a.png is \[\]"),
        ([[name, ["x"]] for name in NAMES], r"label of 00000/a.png is \['x'\]"),
        ([[name, [1, float("nan")]] for name in NAMES], "label of 00000/a.png is not finite"),
        ([[name, [1, 1e39]] for name in NAMES], "label of 00000/a.png is not finite"),
        ([[name, [10**400]] for name in NAMES], "not finite"),
        ("{", "not of the form"),
        ("[]", "not of the form"),
        ("{}", "not of the form"),
        ('{"labels": 3}', "not of the form"),
        ('{"labels": {"a.png": 3}}', "not of the form"),
        ('{"labels": [["a.png"]]}', "not of the form"),
        ('{"labels": [[["a.png"], 3]]}', "not of the form"),
        ("[" * 100_000, "not of the form"),
    ],
)
def test_a_dataset_json_that_does_not_fit(tmp_path, kind, labels, message):
    with pytest.raises(DataError, match=f"dataset.json in .*labeled.{kind}.*{message}"):
        open_source(write_labeled(tmp_path, kind, labels))


def test_refused_files_need_no_label(tmp_path):
    names = ["a.png", "../b.png", "c.png", "d/e.png"]
    pairs = [["a.png", 2], ["c.png", 1], ["d/e.png", 0]]
    source = open_source(write_labeled(tmp_path, "zip", pairs, names))
    assert [(item.name, item.label) for item in source.read()] == [
        ("../b.png", None),
        ("a.png", 2),
        ("c.png", 1),
        ("d/e.png", 0),
    ]


def test_a_labels_file_that_is_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "MAX_MEMBER", 20)
    for kind in ("folder", "zip"):
        with pytest.raises(DataError, match=r"dataset.json .*more than"):
            open_source(write_labeled(tmp_path, kind, PAIRS))


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
    (root / "z_again").symlink_to(root / "a")
    (root / "z/broken.png").symlink_to("nothing")
    os.mkfifo(root / "z/pipe.png")
    read = {name: reason for name, _, reason in summary(open_source(str(root)))}
    assert read.pop("a/0.png") is read.pop("z/0.png") is read.pop("b/1.png") is read.pop("c/2.png") is None
    assert "broken link" in read.pop("z/broken.png") and "not a regular file" in read.pop("z/pipe.png")
    assert set(read) == {"a/loop/", "a_again/", "z_again/"} and all(
        "another name" in reason for reason in read.values()
    )


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
    refused = [name for name, _, reason in read if reason == "unsafe name in the archive"]
    assert refused == sorted(["/absolute.png", "../up.png", "a/../../up.png", "../up.png", "C:/x.png"])
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
    monkeypatch.setattr(folders, "MAX_MEMBER", 1 << 19)
    read = {name: reason for name, _, reason in summary(open_source(str(path)))}
    assert read["good.png"] is None and read["encrypted.png"] == "encrypted"
    assert "unpacks to more than" in read["huge.png"]
    assert read["damaged.png"].startswith("cannot be opened: Bad CRC-32")
    assert read["unknown.png"] == "packed by another method than deflate"


def test_a_member_that_lies_about_its_size_is_not_unpacked_further(tmp_path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.png", bytes(64 << 20))
    content = bytearray(path.read_bytes())
    for start in (content.index(b"PK\1\2") + 24, content.index(b"PK\3\4") + 22):
        content[start : start + 4] = struct.pack("<I", 1000)
    path.write_bytes(content)
    (item,) = open_source(str(path)).read()
    assert item.image.startswith("cannot be opened: Bad CRC-32")
    tracemalloc.start()
    list(open_source(str(path)).read())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 << 20


def test_a_zip_with_a_damaged_directory_is_refused(tmp_path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", b"not looked at")
    whole = bytearray(path.read_bytes())
    whole[whole.index(b"PK\1\2") + 2] ^= 8
    path.write_bytes(whole)
    with pytest.raises(DataError, match="damaged zip"):
        open_source(str(path))
