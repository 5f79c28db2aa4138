"""The stateless shuffle: a permutation per epoch that never drifts, however it is asked for."""

import tracemalloc

import numpy as np
import pytest

from data.sampler import sample_indices


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 16, 17, 63, 64, 65, 255, 256, 257, 1000, 1797, 4097, 50_000])
def test_an_epoch_is_a_permutation(length):
    for epoch in (0, 1, 1000):
        indices = sample_indices(epoch * length, length, length, seed=7)
        assert indices.dtype == np.int64
        np.testing.assert_array_equal(np.sort(indices), np.arange(length))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [sample_indices(epoch * 500, 500, 500, seed) for epoch in range(5) for seed in (0, 1, 2, 2**63, -1)]
    orders.append(np.arange(500))
    for number, one in enumerate(orders):
        for other in orders[:number]:
            assert (one == other).sum() < 10  # two random orders agree in one place on average


def test_any_division_into_calls_gives_the_same_order():
    whole = sample_indices(0, 350, 100, seed=3)  # across three epochs
    for step in (1, 7, 64, 100, 349):
        pieces = [sample_indices(first, min(step, 350 - first), 100, seed=3) for first in range(0, 350, step)]
        np.testing.assert_array_equal(np.concatenate(pieces), whole)
    assert len(sample_indices(5, 0, 100, seed=3)) == 0


# Frozen: a run that goes on under another version must see the same images.
@pytest.mark.parametrize(
    ("first", "length", "seed", "expected"),
    [
        (0, 1797, 0, [586, 472, 464, 196, 792]),
        (1795, 1797, 0, [630, 310, 994, 1647, 1051]),
        (0, 3, 1, [2, 1, 0, 0, 2]),
        (10**12, 2**40, 2**40 + 5, [1042948007586, 998335441298, 64160694709, 984357442217, 1000018679259]),
        (123_456_789, 50_000, 42, [3252, 47035, 15378, 11375, 12103]),
    ],
)
def test_the_order_is_frozen(first, length, seed, expected):
    assert sample_indices(first, 5, length, seed).tolist() == expected


@pytest.mark.parametrize("length", [2, 3, 5, 10, 16, 30])
def test_every_index_is_equally_likely_at_every_position(length):
    seeds = 1500
    orders = np.stack([sample_indices(0, length, length, seed) for seed in range(seeds)])
    counts = np.stack([np.bincount(orders[:, position], minlength=length) for position in range(length)])
    expected = seeds / length
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = (length - 1) ** 2  # rows and columns both sum to the number of seeds
    assert abs(chi_square - freedom) < 4 * np.sqrt(2 * freedom)


def test_neighbors_are_independent():
    """The step from one image to the next takes every value about equally often."""
    length, epochs = 32, 2000
    orders = sample_indices(0, length * epochs, length, seed=0).reshape(epochs, length)
    steps = np.bincount(((orders[:, 1:] - orders[:, :-1]) % length).ravel(), minlength=length)[1:]
    expected = steps.sum() / (length - 1)
    assert abs(((steps - expected) ** 2 / expected).sum() - (length - 2)) < 4 * np.sqrt(2 * length)


def test_a_giant_dataset_costs_no_more_than_a_small_one():
    tracemalloc.start()
    indices = sample_indices(10**15, 100_000, 2**40 - 1, seed=0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100e6
    assert indices.min() >= 0 and indices.max() < 2**40 - 1 and len(np.unique(indices)) == 100_000
    assert abs(indices.mean() / 2**39 - 1) < 0.01


@pytest.mark.parametrize("arguments", [(-1, 1, 10), (0, -1, 10), (0, 1, 0), (0, 1, 2**40 + 1)])
def test_wrong_arguments(arguments):
    with pytest.raises(ValueError, match="must be"):
        sample_indices(*arguments, seed=0)
