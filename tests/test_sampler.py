"""The stateless shuffle: a permutation per epoch that never drifts, however it is asked for."""

import tracemalloc

import numpy as np
import pytest

from data.sampler import ClassGroups, grouped_indices, sample_indices


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


@pytest.mark.parametrize(
    "arguments", [(-1, 1, 10, 1), (0, -1, 10, 1), (0, 1, 0, 1), (0, 1, 2**40 + 1, 1), (0, 1, 9, 0)]
)
def test_wrong_arguments(arguments):
    first, count, length, block = arguments
    with pytest.raises(ValueError, match="must be"):
        sample_indices(first, count, length, 0, block)


# Blocks

SIZES = [
    (1, 1),
    (1, 5),
    (7, 7),
    (7, 8),
    (8, 2),
    (9, 2),
    (10, 3),
    (64, 16),
    (100, 16),
    (257, 64),
    (1000, 37),
    (5000, 512),
]


@pytest.mark.parametrize(("length", "block"), SIZES)
def test_blocks_are_permuted_whole(length, block):
    for epoch in (0, 1, 2, 1000):
        indices = sample_indices(epoch * length, length, length, seed=7, block=block)
        np.testing.assert_array_equal(np.sort(indices), np.arange(length))
        runs = [numbers[0] for numbers in np.split(indices // block, np.flatnonzero(np.diff(indices // block)) + 1)]
        assert sorted(runs) == list(range(-(-length // block)))  # each block is one run


@pytest.mark.parametrize(("length", "block"), SIZES)
def test_blocks_at_any_place_are_those_of_the_whole_order(length, block):
    whole = sample_indices(0, 3 * length, length, seed=3, block=block)
    for first, count in ((0, 1), (length // 2, length), (length - 1, 2), (2 * length - 1, 1)):
        np.testing.assert_array_equal(sample_indices(first, count, length, 3, block), whole[first : first + count])


def test_a_block_of_one_is_no_block():
    np.testing.assert_array_equal(sample_indices(50, 300, 100, 5, block=1), sample_indices(50, 300, 100, 5))


@pytest.mark.parametrize(("length", "block"), [(6, 2), (7, 3), (10, 4), (30, 10), (32, 10)])
def test_any_block_may_come_first_or_last_and_any_of_its_records(length, block):
    epochs, blocks = 3000, -(-length // block)
    orders = sample_indices(0, epochs * length, length, seed=0, block=block).reshape(epochs, length)
    starts = [np.bincount(orders[:, 0], minlength=length), np.bincount(orders[:, -1], minlength=length)]
    sizes = np.minimum(block, length - np.arange(blocks) * block)
    expected = np.repeat(epochs / blocks / sizes, sizes)
    for counts in starts:
        assert abs(((counts - expected) ** 2 / expected).sum() - (length - 1)) < 4 * np.sqrt(2 * length)


def test_each_block_and_each_epoch_has_an_order_of_its_own():
    orders = sample_indices(0, 20 * 1000, 1000, 0, block=100).reshape(200, 100) % 100
    assert len({order.tobytes() for order in orders}) == 200
    agreeing = (orders[:, None] == orders[None]).sum() - orders.size
    assert abs(agreeing / (200 * 199) - 1) < 0.1  # two random orders agree in one place on average


# Frozen, as above.
def test_the_order_of_blocks_is_frozen():
    assert sample_indices(8, 12, 50, 1, block=8).tolist() == [7, 2, 1, 4, 6, 0, 3, 5, 44, 45, 41, 42]


LABELS = np.random.default_rng(3).permutation(np.repeat([0, 1, 2, 4], [13, 8, 3, 30]))  # none of class 3


def test_groups_have_one_label_and_an_epoch_has_each_record_at_most_once():
    groups = ClassGroups.of(LABELS, 4)
    assert len(groups) == 4 * (3 + 2 + 0 + 7)
    for epoch in range(3):
        indices = grouped_indices(epoch * len(groups), len(groups), groups, seed=5)
        labels = LABELS[indices].reshape(-1, 4)
        assert (labels == labels[:, :1]).all() and len(set(indices)) == len(groups)
        assert np.bincount(labels[:, 0]).tolist() == [3, 2, 0, 0, 7]
    assert len(set(grouped_indices(0, 40 * len(groups), groups, seed=5))) == 51  # all but those of the class of three


def test_a_grouped_order_is_a_function_of_seed_and_place_alone():
    groups = ClassGroups.of(LABELS, 4)
    whole = grouped_indices(0, 200, groups, seed=1)
    assert np.array_equal(np.concatenate([grouped_indices(i, 10, groups, seed=1) for i in range(0, 200, 10)]), whole)
    assert not np.array_equal(whole, grouped_indices(0, 200, groups, seed=2))
    labels = LABELS[whole].reshape(-1, 4)[:, 0]
    assert len(set(labels[:8])) > 1  # classes are mixed


def test_classes_smaller_than_a_group_are_refused():
    with pytest.raises(ValueError, match="no class has 40 records"):
        ClassGroups.of(LABELS, 40)
