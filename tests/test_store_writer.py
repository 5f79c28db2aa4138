"""Writing a dataset: commits, trimming, locks, full disks, and builds that are killed and go on."""

import fcntl
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import lmdb
import numpy as np
import pytest
from PIL import Image
from stores import add, build, finish, images

from data import build as data_build
from data import store_writer as module
from data.dataset import ImageDataset
from data.errors import DataError, Interrupted
from data.prepare import prepare
from data.store_writer import StoreWriter
from data.verify import verify
from data.workers import in_order

ROOT = Path(__file__).parents[1]


def run(script, *args, **options):
    command = [sys.executable, "-W", "error", "-c", script, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, **options)


def commits(path):
    with lmdb.open(str(path), subdir=False, readonly=True, lock=False) as env:
        return env.info()["last_txnid"]


def test_the_file_is_trimmed_and_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BATCH_BYTES", 20_000)
    path = tmp_path / "x.lmdb"
    build(path, images(95))
    with lmdb.open(str(path), subdir=False, readonly=True, lock=False) as env:
        assert path.stat().st_size == (env.info()["last_pgno"] + 1) * env.stat()["psize"]
    assert 95 * 2016 // 20_000 < commits(path) <= 95 * 2016 // 20_000 + 2
    assert verify(path) == []
    assert os.listdir(tmp_path) == ["x.lmdb"]  # neither part nor lock file


def test_a_commit_holds_more_than_a_thousand_small_records(tmp_path):
    prepare("stacked-digits", tmp_path / "x.lmdb", max_images=3000)
    assert commits(tmp_path / "x.lmdb") <= 3000 * 2 / 1000


def test_float_vector_labels(tmp_path):
    labels = np.random.default_rng(0).normal(size=(25, 3)).astype(np.float32)
    with StoreWriter(tmp_path / "x.lmdb", "test", "RGB") as writer:
        for label, pyramid in zip(labels, images(), strict=True):
            add(writer, pyramid, label.tolist())
        finish(writer, label_dim=3)
    read = ImageDataset(tmp_path / "x.lmdb").labels
    np.testing.assert_array_equal(read, labels)
    assert read.dtype == np.float32 and verify(tmp_path / "x.lmdb") == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, DataError])
def test_an_error_before_the_first_commit_leaves_nothing(tmp_path, error):
    with pytest.raises(error), StoreWriter(tmp_path / "a/b/x.lmdb", "test", "RGB") as writer:
        add(writer, images(1)[0])
        raise error
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("error", "kept"), [(KeyboardInterrupt, True), (Interrupted, True), (DataError, False)])
def test_what_is_kept_after_a_commit(tmp_path, monkeypatch, error, kept):
    monkeypatch.setattr(module, "BATCH_BYTES", 1)
    with pytest.raises(error), StoreWriter(tmp_path / "x.lmdb", "test", "RGB") as writer:
        add(writer, images(1)[0])
        raise error
    assert os.listdir(tmp_path) == ["x.lmdb.part"] * kept


def test_an_existing_file_is_kept(tmp_path):
    path = tmp_path / "x.lmdb"
    build(path)
    before = path.read_bytes()
    with pytest.raises(DataError, match="exists: remove it"):
        build(path)
    with pytest.raises(DataError, match="is a folder"):
        build(path.parent)
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


def test_two_builds_of_one_file(tmp_path):
    with StoreWriter(tmp_path / "x.lmdb", "test", "RGB") as writer:
        with pytest.raises(DataError, match="being written by another process"):
            build(tmp_path / "x.lmdb")
        add(writer, images(1)[0])
        finish(writer, source="first")
    assert ImageDataset(tmp_path / "x.lmdb").manifest.source == "first"


# Builds that stop


def photos(root, count=40, size=16):
    """Images in two classes, one of them bad."""
    for folder in "ab":
        (root / folder).mkdir(parents=True)
    for index in range(count):
        pixels = np.random.default_rng(index).integers(0, 256, (size, size, 3), np.uint8)
        Image.fromarray(pixels).save(root / "ab"[index % 2] / f"{index:03d}.png")
    (root / "b/017.png").write_bytes(b"")
    return root


# Small chunks and batches, so that there are many of both; `sleep` gives a killer time to meet any moment.
PREPARE = """
import os, sys, time; from data import build, prepare, store_writer; from data.errors import DataError
source, dest, workers, sleep = sys.argv[1:]
build.CHUNK_IMAGES, store_writer.BATCH_BYTES = 3, 2000
step = build.make_chunk
build.make_chunk = lambda *args: (time.sleep(float(sleep)), step(*args))[-1]
def progress(items, total, label):
    print("ready", flush=True)
    yield from items
prepare.prepare(source, dest, workers=int(workers), progress=progress, say=print)
"""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(source, bytes of the file that a build nobody disturbs makes of it)."""
    folder = tmp_path_factory.mktemp("undisturbed")
    source = photos(folder / "in")
    done = run(PREPARE, source, folder / "x.lmdb", 1, 0)
    assert done.returncode == 0, done.stderr
    assert commits(folder / "x.lmdb") > 8
    return source, (folder / "x.lmdb").read_bytes()


@pytest.mark.parametrize("workers", [2, 3])
def test_the_file_does_not_depend_on_the_number_of_workers(undisturbed, tmp_path, workers):
    source, expected = undisturbed
    assert run(PREPARE, source, tmp_path / "x.lmdb", workers, 0).returncode == 0
    assert (tmp_path / "x.lmdb").read_bytes() == expected
    assert verify(tmp_path / "x.lmdb") == [] and len(ImageDataset(tmp_path / "x.lmdb")) == 39


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_again_and_again_it_ends_with_the_same_bytes(undisturbed, tmp_path, workers):
    source, expected = undisturbed
    path, chance, resumed = tmp_path / "x.lmdb", random.Random(workers), 0
    for attempt in range(30):
        command = [sys.executable, "-c", PREPARE, source, path, str(1 + (workers + attempt) % 2), "0.05"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True) as child:
            while (line := child.stdout.readline()) not in ("ready\n", ""):
                resumed += "going on" in line
            time.sleep(chance.uniform(0, 0.3))
            if child.poll() is None:
                child.kill()
        if path.exists():
            break
        with pytest.raises(DataError, match="unfinished"):
            ImageDataset(path)
    assert resumed
    assert path.read_bytes() == expected
    assert sorted(os.listdir(tmp_path)) == ["x.lmdb", "x.lmdb.skipped.txt"]


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_part_that_was_finished_and_not_renamed_is_built_anew(undisturbed, tmp_path, where):
    """Another source of the same name and size must not get its images."""
    source, expected = undisturbed
    killing = f"import os, signal; os.{where} = lambda *args: os.kill(os.getpid(), signal.SIGKILL)\n" + PREPARE
    assert run(killing, source, tmp_path / "x.lmdb", 1, 0).returncode == -signal.SIGKILL
    assert (tmp_path / "x.lmdb.part").exists()
    other = photos(tmp_path / "other" / "in")  # of the same name, as many images, the same classes
    for image in other.glob("*/0*.png"):
        Image.new("RGB", (16, 16), "red").save(image)
    (other / "b/017.png").write_bytes(b"")
    again = run(PREPARE, other, tmp_path / "x.lmdb", 1, 0)
    assert again.returncode == 0 and "starting anew" in again.stdout, again
    assert (ImageDataset(tmp_path / "x.lmdb").read(np.arange(39), 2) == [255, 0, 0]).all()
    assert "b/017.png\tempty file" in (tmp_path / "x.lmdb.skipped.txt").read_text()
    (tmp_path / "x.lmdb").rename(tmp_path / "x.lmdb.part")  # killed at that moment once more, and the source is ours
    assert run(PREPARE, source, tmp_path / "x.lmdb", 1, 0).returncode == 0
    assert (tmp_path / "x.lmdb").read_bytes() == expected


def stopped(source, path):
    """Build with a full disk: leaves a part with commits."""
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))\n"
    caught = (
        PREPARE.replace("\nprepare.prepare", "\ntry: prepare.prepare") + "except DataError as error: print(error)\n"
    )
    return run(full + caught, source, path, 1, 0)


def test_a_full_disk_is_one_error_and_the_same_command_goes_on(undisturbed, tmp_path):
    source, expected = undisturbed
    path = tmp_path / "x.lmdb"
    done = stopped(source, path)
    assert done.returncode == 0 and "cannot write" in done.stdout and "make room and run" in done.stdout, done
    assert os.listdir(tmp_path) == ["x.lmdb.part"]
    again = run(PREPARE, source, path, 2, 0)
    assert again.returncode == 0 and "going on with" in again.stdout
    assert path.read_bytes() == expected


def test_a_disk_that_is_full_from_the_start_is_left_as_it_was(tmp_path):
    source = photos(tmp_path / "in", 20, size=64)
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
    done = run(full + PREPARE, source, tmp_path / "x.lmdb", 1, 0)
    assert "Interrupted: cannot write" in done.stderr and "disk full" in done.stderr, done
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize("change", ["source", "part of a source", "settings", "garbage"])
def test_a_part_of_another_build_is_not_gone_on_with(undisturbed, tmp_path, change):
    folder = photos(tmp_path / "in")
    source = f"train:1:{folder}" if change == "part of a source" else folder
    path, part = tmp_path / "x.lmdb", tmp_path / "x.lmdb.part"
    stopped(source, path)
    if "source" in change:
        photos(tmp_path / "other", 1)
        os.replace(tmp_path / "other/a/000.png", folder / "b/009.png")
    script = PREPARE.replace("workers=int", "levels=2, workers=int") if change == "settings" else PREPARE
    if change == "garbage":
        part.write_bytes(b"garbage" * 1000)
    again = run(script, source, path, 1, 0)
    assert again.returncode == 0 and "going on" not in again.stdout, again
    assert ("starting anew" in again.stdout) == (change != "garbage")
    (tmp_path / "fresh").mkdir()
    assert run(script, source, tmp_path / "fresh/x.lmdb", 1, 0).returncode == 0
    assert path.read_bytes() == (tmp_path / "fresh/x.lmdb").read_bytes()


def test_a_worker_that_dies_is_one_error_and_the_same_command_goes_on(undisturbed, tmp_path):
    source, expected = undisturbed
    dying = PREPARE.replace("time.sleep(float(sleep))", "args[-1] == 30 and os._exit(3)")
    done = run(dying, source, tmp_path / "x.lmdb", 2, 0)
    assert "Interrupted: a worker died (exit code 3" in done.stderr, done
    assert run(PREPARE, source, tmp_path / "x.lmdb", 2, 0).returncode == 0
    assert (tmp_path / "x.lmdb").read_bytes() == expected


def test_workers_die_with_their_parent_and_do_not_hold_its_lock(undisturbed, tmp_path):
    told = PREPARE.replace("time.sleep(float(sleep))", "os.write(1, b'%d\\n' % os.getpid()), time.sleep(0.5)")
    command = [sys.executable, "-c", told, undisturbed[0], tmp_path / "x.lmdb", "2", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True) as child:
        workers = {int(line) for line in (child.stdout.readline() for _ in range(5)) if line.strip().isdigit()}
        child.kill()
    assert len(workers) == 2
    with (tmp_path / "x.lmdb.part").open() as part:
        fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)  # while they are busy still
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{worker}/cmdline").exists() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{worker}/cmdline").exists() for worker in workers)


# More than a commit has room for


def test_labels_that_take_more_than_the_images(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BATCH_BYTES", 1 << 20)
    monkeypatch.setattr(module, "MAP_ROOM", 1 << 22)
    monkeypatch.setattr(data_build, "CHUNK_IMAGES", 4)
    labels = np.random.default_rng(0).normal(size=(300, 2000)).astype(np.float32)
    np.savez(tmp_path / "v.npz", images=np.zeros((300, 64, 64), np.uint8), labels=labels)
    prepare(str(tmp_path / "v.npz"), tmp_path / "x.lmdb", workers=1)
    np.testing.assert_array_equal(ImageDataset(tmp_path / "x.lmdb").labels, labels)
    assert commits(tmp_path / "x.lmdb") > 1


def test_a_large_image_after_one_that_is_skipped(tmp_path, monkeypatch):
    """The first decides for how much there is room."""
    monkeypatch.setattr(module, "BATCH_BYTES", 1 << 18)
    monkeypatch.setattr(module, "MAP_ROOM", 1 << 20)
    monkeypatch.setattr(data_build, "CHUNK_IMAGES", 1)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/0.png").write_bytes(b"")
    Image.new("L", (1024, 1024)).save(tmp_path / "in/1.png")
    assert prepare(str(tmp_path / "in"), tmp_path / "x.lmdb", workers=1).manifest.count == 1


def test_a_file_that_a_worker_cannot_read_is_the_same_error_as_with_one_process():
    def work(task):
        raise FileNotFoundError(2, "No such file or directory", "v.zip")

    for workers in (1, 2):
        with pytest.raises(FileNotFoundError, match="such file"):
            list(in_order(work, range(4), workers, 100))
