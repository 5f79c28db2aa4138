"""What few seeds can say: bootstrap intervals, exact tests of differences, correction for many tests, ranks."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from gan.metrics.intervals import Estimate

LEVEL = 0.05
MOST_RESAMPLES = 20_000  # all are enumerated where there are no more, and as many are drawn where there are
BEST_RESAMPLES = 5_000


def bootstrap(values: ArrayLike) -> Estimate:
    """The mean of values [n] of as many seeds, and its 95 % percentile interval (Efron 1979). For up to five seeds all
    n^n resamples are enumerated; the interval of three reaches from the least to the greatest value.

    It is infinite for a single seed, which says nothing about others.
    """
    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    if n == 1:
        return Estimate(float(values[0]), -math.inf, math.inf)
    means = values[resamples(n)].mean(1)
    low = np.quantile(means, 0.025, method="lower")
    high = np.quantile(means, 0.975, method="higher")
    return Estimate(float(values.mean()), float(low), float(high))


def resamples(n: int) -> np.ndarray:
    """Indices of resamples with replacement: int64 [k, n]."""
    if n**n <= MOST_RESAMPLES:
        return np.array(list(itertools.product(range(n), repeat=n)))
    return np.random.RandomState(0).randint(n, size=(MOST_RESAMPLES, n))


def permutation_test(first: ArrayLike, second: ArrayLike) -> float:
    """The probability, if both came from one distribution, of a difference of means at least as large (Fisher 1935,
    two-sided, over all ways to divide the seeds, or over random ones where there are many)."""
    a = np.asarray(first, dtype=np.float64)
    b = np.asarray(second, dtype=np.float64)
    both = np.concatenate([a, b])
    observed = abs(a.mean() - b.mean())
    tolerance = 1e-12 * max(observed, 1e-300) + 1e-15 * np.abs(both).max()
    count = math.comb(len(both), len(a))
    if count <= MOST_RESAMPLES:
        picks = np.array(list(itertools.combinations(range(len(both)), len(a))))
    else:
        random = np.random.RandomState(0)
        picks = np.stack([random.permutation(len(both))[: len(a)] for _ in range(MOST_RESAMPLES)])
    sums = both[picks].sum(1)
    differences = np.abs(sums / len(a) - (both.sum() - sums) / len(b))
    hits = int((differences >= observed - tolerance).sum())
    return hits / len(picks) if count <= MOST_RESAMPLES else (hits + 1) / (len(picks) + 1)


def least_p(first: int, second: int) -> float:
    """The smallest value that `permutation_test` can have for so many seeds of each."""
    ways = math.comb(first + second, first)
    return (2 if first == second else 1) / ways


def holm(p_values: Sequence[float]) -> list[float]:
    """The values adjusted for as many tests (Holm 1979): a claim at 5 % each is then false for any of them with a
    probability of at most 5 %."""
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty(len(p_values))
    largest = 0.0
    for place, index in enumerate(order):
        largest = max(largest, min((len(p_values) - place) * p_values[index], 1.0))
        adjusted[index] = largest
    return adjusted.tolist()


def ranks(values: ArrayLike) -> np.ndarray:
    """Ranks from 1, the least first; equal values share the mean of theirs. NaN, a divergence, is worse than all.
    [n] -> float64 [n]."""
    values = np.nan_to_num(np.asarray(values, dtype=np.float64), nan=math.inf)
    below = (values[None] < values[:, None]).sum(1)
    equal = (values[None] == values[:, None]).sum(1)
    return below + (equal + 1) / 2


@dataclass(frozen=True)
class Comparison:
    """A method against its control."""

    p: float  # adjusted; NaN where there is no control, or a seed diverged
    lower: bool  # is the method's mean the lower one?

    @property
    def claim(self) -> bool:
        """Do they differ, at a level of 5 %?"""
        return self.p < LEVEL


def against_controls(values: Sequence[Sequence[float]], controls: Sequence[int | None]) -> list[Comparison]:
    """Each method's seeds against those of its control, an index or None, adjusted for the number of tests.

    Controls are chosen before results are seen: Holm's correction does not hold against the best of them all.
    """
    tested = {
        i: (np.asarray(values[i], dtype=np.float64), np.asarray(values[control], dtype=np.float64))
        for i, control in enumerate(controls)
        if control is not None and len(values[i]) > 1 and len(values[control]) > 1
    }
    tested = {i: pair for i, pair in tested.items() if not any(np.isnan(seeds).any() for seeds in pair)}
    adjusted = dict(zip(tested, holm([permutation_test(*pair) for pair in tested.values()]), strict=True))
    lower = {i: bool(mine.mean() < theirs.mean()) for i, (mine, theirs) in tested.items()}
    return [Comparison(adjusted.get(i, math.nan), lower.get(i, False)) for i in range(len(values))]


def chances_of_best(values: Sequence[Sequence[float]]) -> list[float]:
    """The share of bootstrap resamples of the seeds in which each method has the least mean. A method with a diverged
    seed has it never; ties are shared."""
    random = np.random.RandomState(0)
    means = np.stack(
        [
            np.asarray(seeds, dtype=np.float64)[random.randint(len(seeds), size=(BEST_RESAMPLES, len(seeds)))].mean(1)
            if len(seeds) and not np.isnan(seeds).any()
            else np.full(BEST_RESAMPLES, math.inf)
            for seeds in values
        ]
    )
    if np.isinf(means).all():
        return [0.0] * len(values)
    winners = means == means.min(0)
    return (winners / winners.sum(0)).mean(1).tolist()
