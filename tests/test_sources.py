"""The built-in sources, what is a source at all, and reading every kind in parts and in forked children."""

import multiprocessing
import os
import pickle
import struct
import sys
import tarfile
import zipfile
from importlib import import_module
from pathlib import Path

import lmdb
import numpy as np
import pyarrow.parquet
import pytest
from click.testing import CliRunner
from PIL import Image
from sklearn.datasets import load_digits
from source_files import as_read, check, encoded, make_folder, make_zip, pixels, png, write_npz

from data import sources
from data.errors import DataError
from data.prepare import prepare
from data.sources import digits, open_source
from data.sources.digits import stacked_choice
from launch.prepare import main as command


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


def test_what_is_no_source(tmp_path):
    (tmp_path / "x.zip").write_bytes(png())
    with pytest.raises(
        DataError,
        match=r"damaged or of no known kind: a source is .*digits, .* a zip of images, .*, or shards such as set-",
    ):
        open_source(str(tmp_path / "x.zip"))
    with pytest.raises(DataError, match="does not exist"):
        open_source(str(tmp_path / "nowhere"))
    whole = make_zip(tmp_path / "y.zip", ["a.png"])
    os.truncate(whole, os.path.getsize(whole) - 10)
    with pytest.raises(DataError, match="damaged or of no known kind"):
        open_source(whole)


def test_an_empty_name_is_no_source():
    """An unset shell variable must not mean the current folder."""
    with pytest.raises(DataError, match="does not exist"):
        open_source("")


def test_a_new_kind_of_source_is_one_module(tmp_path, monkeypatch):
    """A module beside the others, and nothing else: it is found, asked before what any folder is, and listed."""
    (tmp_path / "shades.py").write_text(
        "import numpy as np\n"
        "from data.items import array_source\n"
        "from data.kinds import path_kind\n"
        "from data.labels import no_labels\n"
        "def open_shades(path, max_images):\n"
        "    return array_source('shades', np.full((3, 4, 4), 7, np.uint8), no_labels(3), max_images)\n"
        "KINDS = (path_kind('a folder of shades', lambda path: (path / 'shades').is_file(), open_shades),)\n"
    )
    monkeypatch.setattr(sources, "__path__", [*sources.__path__, str(tmp_path)])
    sources.kinds.cache_clear()
    try:
        make_folder(tmp_path / "in", ["shades", "0.png"])
        assert (open_source(str(tmp_path / "in")).name, open_source(str(tmp_path / "in")).count) == ("shades", 3)
        with pytest.raises(DataError, match=r"a folder of shades, .* a folder of images"):
            open_source(str(tmp_path / "nowhere"))
        assert "a folder of shades" in CliRunner().invoke(command, ["--help"]).output
    finally:
        sources.kinds.cache_clear()
        sys.modules.pop("data.sources.shades", None)


def test_every_module_of_the_package_declares_kinds_and_none_is_the_same():
    descriptions = [kind.description for kind in sources.kinds()]
    modules = {path.stem for path in Path(sources.__file__).parent.glob("*.py")} - {"__init__"}
    assert all(import_module(f"data.sources.{module}").KINDS for module in modules)
    assert len(set(descriptions)) == len(descriptions)


# Stacked


def test_any_labeled_grey_set_can_be_stacked(tmp_path):
    images, labels = pixels(7, channels=1), np.array([0, 1, 2, 2, 1, 0, 2])
    source = open_source(f"stacked-digits:{write_npz(tmp_path / 'x.npz', images, labels)}", 20)
    assert source.name == "stacked-digits:x.npz" and len(source.classes) == 27 and source.classes[26] == "222"
    chosen = [stacked_choice(index, 7) for index in range(20)]
    expected = [9 * labels[a] + 3 * labels[b] + labels[c] for a, b, c in chosen]
    check(source, np.moveaxis(images[chosen], 1, -1).copy(), [int(label) for label in expected])
    assert open_source(f"stacked-digits:{tmp_path / 'x.npz'}").count == 50_000
    for number, image in enumerate(images):
        (tmp_path / f"f/{labels[number]}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / f"f/{labels[number]}/{number}.png")
    order = np.argsort(labels, kind="stable")  # as the folder has them
    first = next(open_source(f"stacked-digits:{tmp_path / 'f'}").read())
    np.testing.assert_array_equal(first.image, np.moveaxis(images[order][chosen[0]], 0, -1))


def test_stacking_the_digits_is_the_source_stacked_digits():
    assert as_read(open_source("stacked-digits:digits", 50).read()) == as_read(open_source("stacked-digits", 50).read())
    assert open_source("stacked-digits:digits").classes == open_source("stacked-digits").classes


def test_what_cannot_be_stacked(tmp_path, monkeypatch):
    def refused(images, labels, message):
        with pytest.raises(DataError, match=message):
            open_source(f"stacked-digits:{write_npz(tmp_path / 'x.npz', images, labels)}")

    refused(pixels(11, channels=1), np.arange(11), "11 classes")
    refused(pixels(11, channels=1), np.zeros((11, 2)), "no classes")
    refused(pixels(2), np.arange(2), "only grey")
    monkeypatch.setattr(digits, "MAX_BYTES", 100)
    refused(pixels(3, channels=1), np.arange(3), "cannot be stacked")
    for name, content in (("a/0.png", png()), ("b/0.png", b"")):
        make_folder(tmp_path / "f", [name], content)
    with pytest.raises(DataError, match=r"a/0.png of f: it has color"):
        open_source(f"stacked-digits:{tmp_path / 'f'}")
    (tmp_path / "f/a/0.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"a/0.png of f: empty file"):
        open_source(f"stacked-digits:{tmp_path / 'f'}")
    for name, size in (("a/0.png", 4), ("b/0.png", 5)):
        Image.new("L", (size, size)).save(tmp_path / "f" / name)
    with pytest.raises(DataError, match=r"different sizes"):
        open_source(f"stacked-digits:{tmp_path / 'f'}")
    with pytest.raises(DataError, match="does not exist"):
        open_source("stacked-digits:")


# Reading in parts and in forked children


def every_kind(root):
    """The name of a source of every kind that files can be, made here."""
    images, labels = pixels(6), [0, 1, 2, 0, 1, 2]
    files = {f"{label}/{i}.png": encoded(images[i]) for i, label in enumerate(labels)}
    for name, content in files.items():
        make_folder(root / "folder", [name], content)
    with zipfile.ZipFile(root / "zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    for name, mode in (("tar", "w"), ("tar.gz", "w:gz"), ("shards-0.tar", "w")):
        with tarfile.open(root / name, mode) as archive:
            for path in sorted(root.glob("folder/*/*.png")):
                archive.add(path, str(path.relative_to(root / "folder")))
    write_npz(root / "x.npz", images, np.array(labels))
    (root / "images-idx3").write_bytes(struct.pack(">HBB3I", 0, 8, 3, 6, 8, 18) + images.tobytes())
    (root / "labels-idx1").write_bytes(struct.pack(">HBBI", 0, 8, 1, 6) + bytes(labels))
    (root / "cifar").mkdir()
    fields = {"data": np.ascontiguousarray(np.moveaxis(pixels(6, (8, 8)), 3, 1).reshape(6, -1)), "labels": labels}
    (root / "cifar/data_batch_1").write_bytes(pickle.dumps(fields, 2))
    pyarrow.parquet.write_table(pyarrow.table({"image": list(files.values())}), root / "parquet", row_group_size=2)
    with lmdb.open(str(root / "lmdb"), map_size=1 << 20) as environment, environment.begin(write=True) as transaction:
        for index, content in enumerate(files.values()):
            transaction.put(b"8-%05d" % index, content)
        transaction.put(b"length", b"6")
    prepare(str(root / "x.npz"), root / "ours", resolution=(4, 4))
    files = sorted(str(path) for path in root.iterdir() if path.name not in ("shards-0.tar", "labels-idx1"))
    return [
        *files,
        str(root / "shards-{0..0}.tar"),
        "digits",
        "stacked-digits",
        f"stacked-digits:{root / 'images-idx3'}",
    ]


def read_in_child(source, start, stop, results):
    results.put(as_read(source.read(start, stop)))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_every_kind_is_read_in_parts_in_forked_children(tmp_path):
    context = multiprocessing.get_context("fork")
    for name in every_kind(tmp_path):
        source = open_source(name, 6)
        reading = source.read()
        whole = [as_read([item])[0] for item in reading]
        assert len(whole) == 6 and not any(isinstance(image, str) for _, image, _ in whole)
        held = source.read()
        next(held)  # the parent is in the middle of reading
        results = context.Queue()
        for start, stop in ((0, 3), (3, None)):
            child = context.Process(target=read_in_child, args=(source, start, stop, results))
            child.start()
            try:
                assert results.get(timeout=60) == whole[start:stop], name
            finally:
                child.join(timeout=60)
                child.kill()
        assert [as_read([item])[0] for item in held] == whole[1:], name


def test_a_source_names_all_files_that_it_is_made_of(tmp_path):
    """By their sizes and times an interrupted build knows whether it may go on."""
    make_folder(tmp_path / "lake", ["z.png"])
    make_folder(tmp_path / "in", ["a/1.png", "b/2.png", "notes.txt"])
    (tmp_path / "in/c").symlink_to(tmp_path / "lake")
    (tmp_path / "in/dataset.json").write_text('{"labels": null}')
    make_zip(tmp_path / "p.zip", ["1.png", "2.png"])
    for shard in "01":
        with tarfile.open(tmp_path / f"set-{shard}.tar", "w") as tar:
            tar.add(tmp_path / "in/a/1.png", f"{shard}.png")
    grey = pixels(3, channels=1)
    for name, array in (("t-images-idx3-ubyte", grey), ("t-labels-idx1-ubyte", np.zeros(3, np.uint8))):
        shape = struct.pack(f">{array.ndim}I", *array.shape)
        (tmp_path / name).write_bytes(bytes([0, 0, 8, array.ndim]) + shape + array.tobytes())
    digits = ["t-images-idx3-ubyte", "t-labels-idx1-ubyte"]
    prepare("digits", tmp_path / "d.lmdb", max_images=3)
    made_of = {
        "digits": [],
        "{}/in": ["in/a/1.png", "in/b/2.png", "in/c/z.png", "in/dataset.json"],
        "{}/p.zip": ["p.zip"],
        "train:1:{}/p.zip": ["p.zip"],
        "{}/set-{{0..1}}.tar": ["set-0.tar", "set-1.tar"],
        "{}/d.lmdb": ["d.lmdb"],
        "{}/t-images-idx3-ubyte": digits,
        "stacked-digits:{}/t-images-idx3-ubyte": digits,
        "test:1:stacked-digits:{}/t-images-idx3-ubyte": digits,
    }
    for source, files in made_of.items():
        found = open_source(source.format(tmp_path)).files
        assert [str(file.relative_to(tmp_path)) for file in found] == files, source
