"""What reading a file larger than memory keeps resident, with pages kept and dropped."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from stores import finish

from data.dataset import ImageDataset
from data.encodings import encode_image
from data.errors import DataError
from data.store import Reader
from data.store_writer import StoreWriter

ROOT = Path(__file__).parents[1]
MB = 1 << 20
LIMIT = 40 * MB  # of a control group: what Python, numpy and LMDB take, and little more

# Resident MB after every twentieth part of an epoch, then the sum of all pixels.
EPOCH = """
import sys
import data.dataset
from data.dataset import ImageDataset
from data.loader import load
data.dataset.DROP_BYTES = 8 << 20
dataset = ImageDataset(sys.argv[1], sys.argv[2])
total, steps = 0, len(dataset) // 4
for step, (images, _) in enumerate(load(dataset, ((4 * step, 4, 0) for step in range(steps)), seed=0)):
    total += int(images[:, ::16, ::16].sum())
    if step % (steps // 20) == 0:
        (line,) = [line for line in open("/proc/self/status") if line.startswith("VmRSS")]
        print(int(line.split()[1]) >> 10)
print(total)
"""

pytestmark = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs the /proc of Linux")


def build(path, count, side=256):
    """Random images, and their sum as EPOCH takes it."""
    total, noise = 0, np.random.default_rng(0).integers(0, 256, (side + count % 64 + 64, side, 3), np.uint8)
    with StoreWriter(path, "test", "RGB") as writer:
        for index in range(count):
            image = noise[index % 64 :][:side]
            values, digest = encode_image([image], "raw")
            writer.add(1, (0,), [values], [digest], [None])
            total += int(image[::16, ::16].sum())
        finish(writer, base=(side, side), levels=(0,))
    file = os.open(path, os.O_RDONLY)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)  # what is in memory already costs the reader nothing
    os.close(file)
    return total


def epoch(path, pages, *prefix):
    """(resident MB along the epoch, the sum)."""
    command = [*prefix, sys.executable, "-c", EPOCH, str(path), pages]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done
    *resident, total = map(int, done.stdout.split())
    return resident, total


def test_dropped_pages_keep_memory_flat(tmp_path):
    total = build(tmp_path / "x.lmdb", 600)  # 120 MB
    kept, same = epoch(tmp_path / "x.lmdb", "keep")
    dropped, also = epoch(tmp_path / "x.lmdb", "drop")
    assert same == also == total
    assert kept[-1] - kept[0] > 70  # else this test shows nothing
    assert max(dropped) - dropped[0] < 40 and max(dropped[10:]) - max(dropped[1:10]) < 10


@pytest.fixture
def group():
    """A new memory control group inside our own, limited to LIMIT: the file that takes processes in."""
    folder, limit = memory_group()
    folder = folder / f"saddlepoint-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no memory control group can be made here: {error}")
    try:
        try:
            (folder / limit).write_text(str(LIMIT))
        except OSError as error:
            pytest.skip(f"no memory control group can be limited here: {error}")
        yield folder / "cgroup.procs"
    finally:
        folder.rmdir()


def memory_group():
    """(the folder of our memory control group, its file of the limit) of version 1 or 2."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return Path("/sys/fs/cgroup/memory" + path), "memory.limit_in_bytes"
    return Path("/sys/fs/cgroup" + path), "memory.max"


@pytest.mark.slow
@pytest.mark.parametrize("pages", ["keep", "drop"])
def test_an_epoch_over_ten_times_the_memory_limit(tmp_path, group, pages):
    total = build(tmp_path / "x.lmdb", 2160)
    assert (tmp_path / "x.lmdb").stat().st_size > 10 * LIMIT
    enter = ["sh", "-c", f'echo $$ > {group} && exec "$@"', "sh"]
    resident, same = epoch(tmp_path / "x.lmdb", pages, *enter)
    assert same == total
    assert max(resident[10:]) <= max(resident[:10]) + 8


def test_dropping_changes_nothing_that_is_read(tmp_path, monkeypatch):
    build(tmp_path / "x.lmdb", 10, side=16)
    monkeypatch.setattr("data.dataset.DROP_BYTES", 1)
    calls, drop = [], Reader.drop_pages
    monkeypatch.setattr(Reader, "drop_pages", lambda reader: calls.append(reader) or drop(reader))
    kept, dropping = ImageDataset(tmp_path / "x.lmdb"), ImageDataset(tmp_path / "x.lmdb", pages="drop")
    for _ in range(3):
        np.testing.assert_array_equal(dropping.read(np.arange(10), 0, check=True), kept.read(np.arange(10), 0))
    assert len(calls) == 5  # twice to see that it can


def test_pages_of_a_file_that_was_moved_away_can_be_dropped(tmp_path):
    build(tmp_path / "x.lmdb", 10, side=16)
    dataset = ImageDataset(tmp_path / "x.lmdb", pages="drop")
    before = dataset.read(np.arange(3), 0)
    (tmp_path / "x.lmdb").rename(tmp_path / "y.lmdb")
    (tmp_path / "y.lmdb").unlink()
    dataset._reader().drop_pages()
    np.testing.assert_array_equal(dataset.read(np.arange(3), 0), before)


def test_dropping_pages_where_the_system_cannot_is_refused(tmp_path, monkeypatch):
    build(tmp_path / "x.lmdb", 2, side=16)
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"" if str(path) == "/proc/self/maps" else read(path))
    with pytest.raises(DataError, match=r"use run\.pages=keep"):
        ImageDataset(tmp_path / "x.lmdb", pages="drop")
