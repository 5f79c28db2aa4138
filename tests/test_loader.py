"""Batches come in order, are read ahead by threads into memory that is used again, and end when they should."""

import itertools
import multiprocessing
import threading
import time

import lmdb
import numpy as np
import pytest

from data.dataset import ImageDataset
from data.errors import DataError
from data.loader import load
from data.prepare import prepare
from data.sampler import sample_indices
from data.store import image_key


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("loader") / "digits.lmdb"
    prepare("digits", path, max_images=100)
    return ImageDataset(path)


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("saddle-loader")]


def always(first: int, level: int) -> bool:
    """Verify the records of every request."""
    return True


REQUESTS = [(0, 8, 1), (8, 8, 1), (95, 10, 0), (300, 3, 1), (303, 0, 1), (40, 2, 1), (5000, 2500, 0), (6000, 9, 1)]


@pytest.mark.parametrize("block", [1, 8])
@pytest.mark.parametrize("workers", [0, 1, 2, 4, 20])
def test_batches_are_those_asked_for_in_order(dataset, workers, block):
    """Across epochs, levels, sizes and the runs in which the order is computed, forward and back."""
    batches = load(dataset, iter(REQUESTS), seed=5, workers=workers, block=block, check=always)
    for (images, labels), (first, count, level) in zip(batches, REQUESTS, strict=True):
        indices = sample_indices(first, count, 100, 5, block)
        np.testing.assert_array_equal(images, dataset.read(indices, level))
        np.testing.assert_array_equal(labels, dataset.labels[indices])
    assert not loader_threads()


def test_a_slow_batch_is_not_overtaken(dataset, monkeypatch):
    read = ImageDataset.read

    def slow(self, indices, *rest):
        time.sleep(0.02 * (len(indices) % 3))
        return read(self, indices, *rest)

    requests = [(10 * number, 1 + number % 5, 1) for number in range(12)]
    monkeypatch.setattr(ImageDataset, "read", slow)
    for (images, _), (first, count, _) in zip(load(dataset, iter(requests), 5, workers=4), requests, strict=True):
        np.testing.assert_array_equal(images, read(dataset, sample_indices(first, count, 100, 5), 1))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_memory_is_made_once_and_a_batch_is_valid_until_the_next(dataset, workers):
    made = []

    def allocate(size):
        made.append(np.zeros(size, np.uint8))
        return made[-1]

    requests = [(8 * number, 8, 1) for number in range(50)]
    for number, (images, _) in enumerate(load(dataset, iter(requests), 0, workers=workers, allocate=allocate)):
        assert any(np.shares_memory(images, memory) for memory in made)
        time.sleep(0.02 * (number < 5))  # time for threads to write where they should not
        np.testing.assert_array_equal(images, dataset.read(sample_indices(8 * number, 8, 100, 0), 1))
    assert len(made) == (workers + 2 if workers else 1)


def test_a_level_change_makes_memory_for_larger_batches_only(dataset):
    sizes = []

    def allocate(size):
        sizes.append(size)
        return np.zeros(size, np.uint8)

    levels = [0] * 9 + [1] * 9 + [0] * 9
    assert sum(len(images) for images, _ in load(dataset, iter((0, 4, k) for k in levels), 0, allocate=allocate)) == 108
    assert sizes == [4 * 16] * 3 + [4 * 64] * 3


def test_unlabeled(tmp_path):
    from PIL import Image

    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    prepare(str(tmp_path), tmp_path / "x.lmdb")
    ((images, labels),) = load(ImageDataset(tmp_path / "x.lmdb"), iter([(0, 2, 0)]), seed=0)
    assert images.shape == (2, 4, 4, 3) and labels is None


@pytest.mark.parametrize("workers", [1, 3])
def test_it_reads_one_more_than_its_workers_ahead(dataset, workers, monkeypatch):
    read, done = ImageDataset.read, []
    monkeypatch.setattr(ImageDataset, "read", lambda *rest: done.append(0) or read(*rest))
    batches = load(dataset, ((first, 1, 0) for first in itertools.count()), seed=0, workers=workers)
    for consumed in range(1, 5):
        next(batches)
        deadline = time.monotonic() + 10
        while len(done) < consumed + workers + 1 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)  # time to go too far
        assert len(done) == consumed + workers + 1
    batches.close()


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_an_error_comes_out_after_the_batches_before_it(dataset, workers):
    batches = load(dataset, iter([(0, 4, 0), (4, 4, 0), (8, 4, 7), (12, 4, 0)]), seed=0, workers=workers)
    assert len(next(batches)[0]) == len(next(batches)[0]) == 4
    with pytest.raises(DataError, match="no level 7"):
        next(batches)
    assert not loader_threads()


def test_an_error_of_the_requests_comes_out_too(dataset):
    def requests():
        yield 0, 4, 0
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        list(load(dataset, requests(), seed=0))


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_closing_ends_the_thread(dataset, taken):
    batches = load(dataset, ((first, 1, 0) for first in itertools.count()), seed=0, workers=2)
    for _ in range(taken):
        next(batches)
    assert (len(loader_threads()) > 0) == (taken > 0)
    batches.close()
    assert not loader_threads()


def test_a_loader_without_references_ends_its_thread(dataset):
    batches = load(dataset, ((first, 1, 0) for first in itertools.count()), seed=0)
    next(batches)
    del batches
    assert not loader_threads()


def test_several_datasets_and_loaders_at_once(dataset, tmp_path):
    prepare("stacked-digits", tmp_path / "x.lmdb", max_images=60)
    sets = [dataset, ImageDataset(tmp_path / "x.lmdb"), ImageDataset(dataset.path)]
    loaders = [load(one, ((6 * k, 6, 1) for k in range(30)), 0, workers=n) for n, one in enumerate(sets)]
    for k, batches in enumerate(zip(*loaders, strict=True)):
        for one, (images, labels) in zip(sets, batches, strict=True):
            indices = sample_indices(6 * k, 6, len(one), 0)
            np.testing.assert_array_equal(images, one.read(indices, 1))
            np.testing.assert_array_equal(labels, one.labels[indices])
    assert not loader_threads()


def totals(dataset, workers, results):
    """Sums of ten batches, for another process."""
    batches = load(dataset, ((8 * k, 8, 1) for k in range(10)), 0, workers=workers, check=always)
    results.put([int(images.sum()) for images, _ in batches])


# A fork while the parent's threads read is what Python 3.12 warns of; it must work all the same, as datasets do not
# share a lock with their parent.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loaders_in_processes_that_a_loading_one_starts(dataset, method):
    context = multiprocessing.get_context(method)
    results = context.SimpleQueue()
    mine = load(dataset, ((first, 1, 0) for first in itertools.count()), seed=0, workers=2)
    next(mine)
    workers = [context.Process(target=totals, args=(dataset, n, results), daemon=True) for n in (0, 1, 4)]
    [worker.start() for worker in workers]
    [worker.join(60) for worker in workers]
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    expected = [int(dataset.read(sample_indices(8 * k, 8, 100, 0), 1).sum()) for k in range(10)]
    assert [results.get() for _ in workers] == [expected] * 3
    next(mine)
    mine.close()


@pytest.mark.parametrize("encoding", ["raw", "png"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_checked_batch_with_a_flipped_byte_is_an_error_that_names_the_image(tmp_path, workers, encoding):
    path = tmp_path / "x.lmdb"
    prepare("digits", path, max_images=40, encoding=encoding, resolution=(8, 8))
    with lmdb.open(str(path), subdir=False, readonly=True, lock=False) as env, env.begin() as transaction:
        value = transaction.get(image_key(1, 11))
    content = bytearray(path.read_bytes())
    content[content.index(value) + len(value) - 10] ^= 4
    path.write_bytes(content)
    everything = [(0, 8, 1), (8, 32, 1)]
    with pytest.raises(DataError, match=r"image 11 at 8x8 in .*x.lmdb is damaged: its checksum does not match"):
        list(load(ImageDataset(path), iter(everything), seed=0, workers=workers, check=always))
    if encoding == "raw":  # what is not checked is not noticed
        assert len(list(load(ImageDataset(path), iter(everything), seed=0, workers=workers))) == 2
    sound = [(0, 40, 0)]  # the other level of the same image
    assert len(list(load(ImageDataset(path), iter(sound), seed=0, workers=workers, check=always))) == 1
