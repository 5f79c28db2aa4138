"""Names of files and classes as other systems write them, and files that lie where one would not look."""

import io
import json
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from source_files import check, encoded, pixels

from data.dataset import ImageDataset
from data.errors import DataError
from data.prepare import prepare
from data.sources import open_source

IMAGES = pixels(4)
KINDS = ("folder", "zip", "tar", "tar.gz")


def write(root, kind, files):
    """A source of a kind with files of these names, bytes or images by name; its path."""
    path = root / f"x.{kind}"
    contents = {name: content if isinstance(content, bytes) else encoded(content) for name, content in files.items()}
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in contents.items():
                member = zipfile.ZipInfo("x")
                member.filename = name  # as it is: the constructor would tidy it on Windows
                archive.writestr(member, content)
    elif kind == "folder":
        for name, content in contents.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
    else:
        with tarfile.open(path, "w:gz" if kind == "tar.gz" else "w") as archive:
            for name, content in contents.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return str(path)


def by_name(source):
    return {item.name: item.label for item in source.read()}


# As Windows writes names


@pytest.mark.parametrize("kind", KINDS)
def test_backslashes_part_folders(tmp_path, kind):
    names = ["pets\\cat\\0.png", "pets\\cat\\1.png", "pets\\dog\\0.png", "pets\\dog\\1.png"]
    source = open_source(write(tmp_path, kind, dict(zip(names, IMAGES, strict=True))))
    assert source.classes == ("cat", "dog")
    check(source, IMAGES, [0, 0, 1, 1], [name.replace("\\", "/") for name in names])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key", ["a\\{}.png", "./a/{}.png", ".\\a\\{}.png", "a/./{}.png", "a/{}.png"])
@pytest.mark.parametrize("name", ["a/{}.png", "./a/{}.png", "a\\{}.png"])
def test_keys_of_a_labels_file_are_names_however_they_are_written(tmp_path, kind, key, name):
    files = {name.format(index): image for index, image in enumerate(IMAGES)}
    labels = json.dumps({"labels": [[key.format(index), 3 - index] for index in range(4)]})
    source = open_source(write(tmp_path, kind, {**files, "dataset.json": labels.encode()}))
    check(source, IMAGES, [3, 2, 1, 0], [f"a/{index}.png" for index in range(4)])


def test_folders_of_windows_are_no_files(tmp_path):
    files = {"pets\\": b"", "pets\\cat\\": b"", "pets\\cat\\0.png": IMAGES[0], "__MACOSX\\cat\\0.png": b"x"}
    source = open_source(write(tmp_path, "zip", files))
    assert source.ignored == {} and list(by_name(source)) == ["pets/cat/0.png"]


def test_two_spellings_of_one_name_in_a_labels_file_are_one_name_twice(tmp_path):
    labels = json.dumps({"labels": [["a/0.png", 1], ["a\\0.png", 2]]})
    with pytest.raises(DataError, match="names a file twice"):
        open_source(write(tmp_path, "zip", {"a/0.png": IMAGES[0], "dataset.json": labels.encode()}))


# As macOS writes names

DECOMPOSED, COMPOSED = "cafe\u0301", "caf\u00e9"


@pytest.mark.parametrize("kind", KINDS)
def test_decomposed_names_are_composed(tmp_path, kind):
    files = {f"{DECOMPOSED}/0.png": IMAGES[0], f"{COMPOSED}/1.png": IMAGES[1], "tea/2.png": IMAGES[2]}
    path = write(tmp_path, kind, files)
    source = open_source(path)
    assert source.classes == (COMPOSED, "tea")
    check(source, IMAGES[:3], [0, 0, 1], [f"{COMPOSED}/0.png", f"{COMPOSED}/1.png", "tea/2.png"])
    prepare(path, tmp_path / "d.lmdb")
    assert ImageDataset(tmp_path / "d.lmdb").manifest.classes == (COMPOSED, "tea")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "key"), [(DECOMPOSED, COMPOSED), (COMPOSED, DECOMPOSED), (DECOMPOSED, DECOMPOSED)])
def test_a_labels_file_finds_composed_and_decomposed_names(tmp_path, kind, name, key):
    labels = json.dumps({"labels": [[f"{key}.png", 5]]})
    source = open_source(write(tmp_path, kind, {f"{name}.png": IMAGES[0], "dataset.json": labels.encode()}))
    assert by_name(source) == {f"{COMPOSED}.png": 5}


def test_class_names_in_a_file_are_composed(tmp_path):
    pyarrow = pytest.importorskip("pyarrow.parquet")
    import pyarrow as arrow

    table = arrow.table({"image": [encoded(image) for image in IMAGES], "label": [0, 1, 0, 1]})
    features = {"info": {"features": {"label": {"names": [DECOMPOSED, "tea"]}}}}
    pyarrow.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), tmp_path / "x.parquet")
    assert open_source(str(tmp_path / "x.parquet")).classes == (COMPOSED, "tea")


def test_a_dataset_of_before_shows_composed_class_names(tmp_path):
    """A manifest that an earlier version wrote."""
    from data.store import Manifest

    prepare("digits", tmp_path / "d.lmdb", max_images=10)
    text = ImageDataset(tmp_path / "d.lmdb").manifest.to_json().replace('"3"', json.dumps(DECOMPOSED))
    assert Manifest.from_json(text).classes[3] == COMPOSED


def test_a_zip_of_macos_does_not_say_that_its_names_are_utf_8(tmp_path):
    """Finder leaves the flag out. Python would read code page 437, as it is right for names from DOS."""
    path = Path(write(tmp_path, "zip", {f"{DECOMPOSED}/0.png": IMAGES[0], "tea/1.png": IMAGES[1]}))
    content = bytearray(path.read_bytes())
    for magic, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        flags = content.index(magic) + place
        content[flags + 1] &= ~8
    path.write_bytes(content)
    check(open_source(str(path)), IMAGES[:2], [0, 1], [f"{COMPOSED}/0.png", "tea/1.png"])
    assert open_source(str(path)).classes == (COMPOSED, "tea")
    dos = content.replace(DECOMPOSED.encode(), b"caf\x82  ")
    path.write_bytes(dos)
    assert open_source(str(path)).classes == ("caf\u00e9  ", "tea")


# An outer folder around everything


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outer", ["pets/", "a/b/"])
def test_a_labels_file_in_the_only_folder_is_read(tmp_path, kind, outer):
    files = {f"{outer}{name}": image for name, image in zip(("0.png", "1.png", "z/2.png"), IMAGES[:3], strict=True)}
    labels = json.dumps({"labels": [["0.png", 2], ["1.png", 1], ["z/2.png", 0]]})
    source = open_source(write(tmp_path, kind, {**files, f"{outer}dataset.json": labels.encode(), "README": b"x"}))
    check(source, IMAGES[:3], [2, 1, 0], list(files))
    assert list(source.ignored) == ["without suffix"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_labels_file_that_is_not_used_is_named(tmp_path, kind):
    labels = json.dumps({"labels": [["0.png", 2]]}).encode()
    files = {"train/0.png": IMAGES[0], "train/dataset.json": labels, "test/0.png": IMAGES[1]}
    source = open_source(write(tmp_path, kind, files))
    assert source.classes == ("test", "train")
    assert any("train/dataset.json is not used" in note for note in source.notes)


@pytest.mark.parametrize("kind", KINDS)
def test_a_labels_file_at_the_root_wins_over_deeper_ones(tmp_path, kind):
    files = {
        "a/0.png": IMAGES[0],
        "a/dataset.json": json.dumps({"labels": [["0.png", 1]]}).encode(),
        "dataset.json": json.dumps({"labels": [["a/0.png", 2]]}).encode(),
    }
    assert by_name(open_source(write(tmp_path, kind, files))) == {"a/0.png": 2}


# Images beside the folders of classes


@pytest.mark.parametrize("kind", KINDS)
def test_a_stray_image_beside_the_folders_is_named(tmp_path, kind):
    files = {"set/cat/0.png": IMAGES[0], "set/dog/0.png": IMAGES[1], "set/cover.png": IMAGES[2]}
    source = open_source(write(tmp_path, kind, files))
    (note,) = source.notes
    assert source.classes is None and "set/cover.png lies beside the folders (cat, dog)" in note
    assert prepare(str(tmp_path / f"x.{kind}"), tmp_path / "d.lmdb").notes == (note,)


@pytest.mark.parametrize("names", [["0.png", "1.png"], ["only/0.png", "only/1.png"], ["a/0.png", "b/0.png"]])
def test_where_nothing_is_amiss_there_is_no_note(tmp_path, names):
    assert open_source(write(tmp_path, "folder", dict(zip(names, IMAGES[:2], strict=True)))).notes == ()


# Names in capitals


def test_suffixes_in_capitals_in_shards(tmp_path):
    """webdataset lowers them."""
    files = {}
    for index, image in enumerate(IMAGES):
        files |= {f"s/{index:03d}.PNG": image, f"s/{index:03d}.CLS": b"%d" % (index % 2)}
    check(open_source(write(tmp_path, "tar", files)), IMAGES, [0, 1, 0, 1])
    described = {"0.JPG": IMAGES[0], "0.JSON": b'{"label": 1}', "1.JPG": IMAGES[1], "1.Json": b'{"label": 0}'}
    assert list(by_name(open_source(write(tmp_path, "tar.gz", described))).values()) == [1, 0]


@pytest.mark.parametrize("name", ["S-0.TAR", "s-0.Tar.GZ"])
def test_a_folder_of_shards_in_capitals(tmp_path, name):
    os.rename(
        write(tmp_path, "tar.gz" if "GZ" in name else "tar", {"0.png": IMAGES[0], "0.cls": b"4"}), tmp_path / name
    )
    assert by_name(open_source(str(tmp_path))) == {"0.png": 4}


# Suffixes

SUFFIXES = [".jfif", ".jpe", ".tga", ".avif", ".pgm", ".pbm", ".dib", ".ico", ".jp2", ".pcx", ".sgi", ".qoi", ".apng"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_suffix_that_pillow_decodes_is_an_image(tmp_path, suffix):
    Image.init()
    format = Image.registered_extensions().get(suffix)
    if format not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {suffix}")
    image = Image.new("L" if suffix in (".pgm", ".pbm") else "RGB", (16, 16), "red")
    image.save(tmp_path / f"a{suffix.upper()}", format)
    (item,) = open_source(str(tmp_path)).read()
    assert not isinstance(item.image, str) and item.image.size == (16, 16)
    assert prepare(str(tmp_path), tmp_path / "x.lmdb").manifest.count == 1


@pytest.mark.parametrize("format", ["AVIF", "JPEG2000", "TGA", "PCX"])
def test_the_content_counts_and_not_the_suffix(tmp_path, format):
    Image.fromarray(IMAGES[0]).save(tmp_path / "a.jpg", format)
    (item,) = open_source(str(tmp_path)).read()
    assert not isinstance(item.image, str) and item.image.format == format


def test_what_is_ignored_is_counted_by_suffix(tmp_path):
    names = ["a.heic", "b.HEIC", "c.txt", "LICENSE", "d.eps", "e.mpg", "f.pdf", "g.h5", "h.wmf"]
    files = {"0.png": IMAGES[0]} | dict.fromkeys(names, b"x")
    source = open_source(write(tmp_path, "folder", files))
    assert source.count == 1 and source.ignored == {
        ".heic": 2, ".txt": 1, "without suffix": 1, ".eps": 1, ".mpg": 1, ".pdf": 1, ".h5": 1, ".wmf": 1,
    }  # fmt: skip


def test_noise_and_texts_are_hardly_ever_taken_for_images(tmp_path):
    """Some formats begin in no way of their own."""
    random = np.random.default_rng(0)
    (tmp_path / "f").mkdir()
    for index in range(300):
        content = random.bytes(200) if index % 2 else bytes(random.integers(32, 127, 200, np.uint8))
        (tmp_path / f"f/{index}.jpg").write_bytes(content)
    opened = [item for item in open_source(str(tmp_path / "f")).read() if not isinstance(item.image, str)]
    assert len(opened) <= 3


def test_a_folder_of_more_digits_than_python_reads_is_a_name(tmp_path):
    long = "1" * 5000
    source = open_source(write(tmp_path, "zip", {f"{long}/a.png": IMAGES[0], "2/b.png": IMAGES[1]}))
    assert source.classes == (long, "2")
