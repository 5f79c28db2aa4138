"""`saddle benchmark data`: its contestants read the same images, and its figures are what it says they are."""

import json
import re
import sys

import numpy as np
import pytest

from data.dataset import ImageDataset
from data.prepare import prepare
from data.sampler import sample_indices
from launch import cli
from launch.benchmark import data_benchmark, readers
from launch.benchmark.data_benchmark import Rate, compare_rates, synthetic


def saddle(monkeypatch, *arguments: object) -> int:
    """The exit code of `saddle benchmark data ARGUMENTS`, in this process."""
    monkeypatch.setattr(sys, "argv", ["saddle", "benchmark", "data", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def test_a_quick_run_prints_what_it_writes(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(data_benchmark, "QUICK_IMAGES", 16)
    assert saddle(monkeypatch, "--quick", f"--json={tmp_path / 'new' / 'rows.json'}") == 0
    values, text = json.loads((tmp_path / "new" / "rows.json").read_text()), capsys.readouterr().out
    names = {(row["doing"], row["what"]) for row in values["rows"]}
    assert names >= {("build", "raw"), ("read", "direct"), ("read", "memcpy"), ("read", "loader, 1 thread")}
    assert all(
        re.search(rf"{re.escape(row['what'])} .* {row['images_per_second']:.0f} ", text) for row in values["rows"]
    )
    assert {(r["what"], r["of"]) for r in values["summary"]} >= {("direct", "folder PNG"), ("direct", "memcpy")}


def test_a_dataset_and_a_source_of_ones_own(monkeypatch, tmp_path, capsys):
    prepare("digits", tmp_path / "d.lmdb", max_images=40)
    arguments = [f"--data={tmp_path / 'd.lmdb'}", "--source=digits", "--repeats=1", "--count=20"]
    monkeypatch.setattr(data_benchmark, "SAMPLE_SECONDS", 0.001)
    assert saddle(monkeypatch, *arguments) == 0
    assert "8x8" in capsys.readouterr().out


@pytest.mark.parametrize("channels", [1, 3])
def test_every_contestant_reads_the_images(tmp_path, channels):
    images = synthetic(10, 16)[..., :channels]
    paths = readers.write_folder(images, tmp_path / "PNG", "PNG")
    prepare(str(tmp_path / "PNG"), tmp_path / "x.lmdb", mode="L" if channels == 1 else "RGB")
    dataset = ImageDataset(tmp_path / "x.lmdb")
    known = {image.tobytes() for image in images}

    def seen(call):
        """Every image of two epochs of batches of five."""
        return [np.ascontiguousarray(image).tobytes() for _ in range(4) for image in np.array(call())]

    calls = [
        readers.direct(dataset, 2, 5),
        readers.direct(dataset, 2, 5, check=True),
        readers.loader(dataset, 2, 5, 0, batches=1),
        readers.loader(dataset, 2, 5, 2, batches=1),
        readers.pillow(paths, 5),
    ]
    for call in calls:
        read = seen(call)
        assert len(read) == 20 and set(read[:10]) == set(read[10:]) == known
    last = readers.loader(dataset, 2, 5, 1, batches=3)()
    np.testing.assert_array_equal(last, dataset.read(sample_indices(10, 5, 10, 0), 2))
    floats = readers.pillow(paths, 10, floats=True)()
    assert floats.min() >= -1 and floats.max() <= 1 and floats.dtype.is_floating_point
    assert float(floats.mean()) == pytest.approx(images.mean() / 127.5 - 1, abs=1e-4)


def test_ratios_are_of_rates_at_the_same_size():
    def row(what, size, rate):
        return Rate("read", what, size, 16, 0, rate, rate, 0.0, 0.0)

    names = ("direct", "memcpy", "folder PNG", "litdata", "direct, checksums", "loader, 1 thread")
    rows = [row(what, "32x32", rate) for what, rate in zip(names, (60.0, 100, 2, 15, 30, 45), strict=True)]
    rows += [row("direct", "256x256", 7.0), row("memcpy", "256x256", 10.0)]
    found = {(r["size"], r["what"], r["of"]): (r["ratio"], r["wanted"]) for r in compare_rates(rows)}
    assert found == {
        ("32x32", "direct", "memcpy"): (0.6, None),
        ("32x32", "direct", "folder PNG"): (30.0, 30.0),
        ("32x32", "direct", "litdata"): (4.0, 3.0),
        ("32x32", "direct, checksums", "direct"): (0.5, None),
        ("32x32", "loader, 1 thread", "direct"): (0.75, 0.5),
        ("256x256", "direct", "memcpy"): (0.7, 0.6),
    }


def test_the_images_made_up_are_neither_noise_nor_flat():
    """PNG, which finds what neighbors share, makes them smaller, and not much smaller."""
    from io import BytesIO

    from PIL import Image

    image, file = synthetic(1, 128)[0], BytesIO()
    Image.fromarray(image).save(file, "png")
    assert 0.3 < len(file.getvalue()) / image.nbytes < 0.9


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--data=nothing.lmdb"], "no dataset at"),
        (["--resolution=2"], "not in the range"),
        (["--quick", "--source=nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, tmp_path, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert saddle(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
