"""Batches come in order, are read ahead by one thread, and end when they should."""

import itertools
import threading
import time

import numpy as np
import pytest

from data.dataset import ImageDataset
from data.errors import DataError
from data.loader import load
from data.prepare import prepare
from data.sampler import sample_indices


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("loader") / "digits.lmdb"
    prepare("digits", path, max_images=100)
    return ImageDataset(path)


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name == "saddle-loader"]


REQUESTS = [(0, 8, 1), (8, 8, 1), (95, 10, 0), (300, 3, 1), (303, 0, 1)]  # across epochs, levels and sizes


@pytest.mark.parametrize("depth", [0, 1, 2, 10])
def test_batches_are_those_asked_for_in_order(dataset, depth):
    batches = list(load(dataset, iter(REQUESTS), seed=5, depth=depth, check=True))
    assert len(batches) == len(REQUESTS)
    for (images, labels), (first, count, level) in zip(batches, REQUESTS, strict=True):
        indices = sample_indices(first, count, 100, seed=5)
        np.testing.assert_array_equal(images, dataset.read(indices, level))
        np.testing.assert_array_equal(labels, dataset.labels[indices])
    assert not loader_threads()


def test_unlabeled(tmp_path):
    from PIL import Image

    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    prepare(str(tmp_path), tmp_path / "x.lmdb")
    ((images, labels),) = load(ImageDataset(tmp_path / "x.lmdb"), iter([(0, 2, 0)]), seed=0)
    assert images.shape == (2, 4, 4, 3) and labels is None


@pytest.mark.parametrize("depth", [1, 3])
def test_it_reads_ahead_but_not_further_than_depth(dataset, depth):
    asked = itertools.count()
    last = -1

    def requests():
        nonlocal last
        for last in asked:
            yield last, 1, 0

    batches = load(dataset, requests(), seed=0, depth=depth)
    for consumed in range(4):
        next(batches)
        deadline = time.monotonic() + 10
        while last < consumed + depth and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)  # time to go too far
        assert last == consumed + depth
    batches.close()


@pytest.mark.parametrize("depth", [0, 2])
def test_an_error_comes_out_after_the_batches_before_it(dataset, depth):
    batches = load(dataset, iter([(0, 4, 0), (4, 4, 0), (8, 4, 7), (12, 4, 0)]), seed=0, depth=depth)
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
    batches = load(dataset, ((first, 1, 0) for first in itertools.count()), seed=0, depth=3)
    for _ in range(taken):
        next(batches)
    assert len(loader_threads()) == (taken > 0)
    batches.close()
    assert not loader_threads()


def test_forgetting_it_ends_the_thread(dataset):
    batches = load(dataset, ((first, 1, 0) for first in itertools.count()), seed=0)
    next(batches)
    del batches
    assert not loader_threads()
