"""launch/grid/statistics.py against closed forms and scipy."""

import math

import numpy as np
import pytest

from launch.grid import statistics
from launch.grid.statistics import against_controls, bootstrap, chances_of_best, holm, least_p, permutation_test, ranks


def test_the_interval_of_three_seeds_reaches_from_the_least_to_the_greatest():
    found = bootstrap([3.0, 1.0, 2.0])
    assert (found.value, found.low, found.high) == (2.0, 1.0, 3.0)
    assert math.isinf(bootstrap([1.0]).high)


@pytest.mark.parametrize("n", [5, 9])
def test_bootstrap_is_that_of_scipy(n):
    stats = pytest.importorskip("scipy.stats")
    values = np.random.RandomState(n).lognormal(size=n)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=200_000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    ours = bootstrap(values)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=0.02)


@pytest.mark.parametrize("first,second", [(3, 3), (5, 5), (4, 7)])
def test_permutation_test_is_that_of_scipy(first, second):
    stats = pytest.importorskip("scipy.stats")
    random = np.random.RandomState(first)
    a = random.normal(size=first)
    b = random.normal(1.0, size=second)

    def difference(x, y, axis):
        return np.mean(x, axis) - np.mean(y, axis)

    theirs = stats.permutation_test((a, b), difference, n_resamples=np.inf, alternative="two-sided", vectorized=True)
    if first == second:  # otherwise scipy doubles the smaller tail, and we count both
        assert permutation_test(a, b) == pytest.approx(theirs.pvalue)
    both = np.concatenate([a, b])
    tail = [abs(both[list(p)].mean() - np.delete(both, p).mean()) for p in _picks(first, first + second)]
    assert permutation_test(a, b) == pytest.approx(np.mean(np.array(tail) >= abs(a.mean() - b.mean()) - 1e-12))


def _picks(k, n):
    return [[i for i in range(n) if bits >> i & 1] for bits in range(2**n) if bits.bit_count() == k]


def test_apart_as_far_as_can_be():
    assert permutation_test([1, 2, 3], [4, 5, 6]) == least_p(3, 3) == 0.1
    assert permutation_test([1, 2, 3, 4], [5, 6, 7, 8]) == least_p(4, 4) == pytest.approx(2 / 70)
    assert permutation_test([1.0, 1.0], [1.0, 1.0]) == 1.0


def test_many_seeds_are_divided_at_random(monkeypatch):
    random = np.random.RandomState(0)
    a, b = random.normal(size=8), random.normal(0.6, size=8)
    exact = permutation_test(a, b)
    monkeypatch.setattr(statistics, "MOST_RESAMPLES", 4000)
    assert permutation_test(a, b) == pytest.approx(exact, abs=0.02)


def test_holm():
    """The example of Holm's step-down by hand: 4 * .01, 3 * .013, 2 * .02, but never less than the one before."""
    assert holm([0.02, 0.01, 0.5, 0.013]) == pytest.approx([0.04, 0.04, 0.5, 0.04])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_ranks_share_ties_and_put_divergence_last():
    stats = pytest.importorskip("scipy.stats")
    assert ranks([2.0, math.nan, 1.0, 2.0]).tolist() == [2.5, 4.0, 1.0, 2.5]
    values = np.random.RandomState(0).randint(5, size=20)
    assert ranks(values).tolist() == stats.rankdata(values).tolist()


def test_too_few_seeds_make_no_claim():
    apart = [[9.0, 9.1, 9.2], [1.0, 1.1, 1.2]]
    alone, method = against_controls(apart, [None, 0])
    assert math.isnan(alone.p) and not alone.claim
    assert method.p == pytest.approx(0.1) and method.lower and not method.claim
    enough = [[9.0, 9.1, 9.2, 9.3], [1.0, 1.1, 1.2, 1.3]]
    assert against_controls(enough, [None, 0])[1].claim
    assert not against_controls(enough, [1, None])[0].lower
    assert math.isnan(against_controls([[1.0, 1.1], [math.nan, 2.0]], [None, 0])[1].p)


def test_equal_methods_differ_from_their_control_in_one_of_twenty_tables_at_most():
    """What Holm's correction promises; against the best of them it would be more."""
    random = np.random.RandomState(0)
    tables = random.normal(size=(400, 4, 5)).tolist()
    wrong = sum(any(each.claim for each in against_controls(table, [None, 0, 0, 0])) for table in tables)
    assert wrong / len(tables) < 0.05 + 3 * math.sqrt(0.05 * 0.95 / len(tables))


def test_chances_of_being_the_best():
    assert chances_of_best([[1.0, 1.1], [2.0, 2.1], [0.1, math.nan]]) == [1.0, 0.0, 0.0]
    same = chances_of_best([[1.0, 2.0], [1.0, 2.0]])
    assert sum(same) == pytest.approx(1) and same[0] == pytest.approx(0.5, abs=0.05)
    assert chances_of_best([[math.nan]]) == [0.0]
