"""Estimates with 95 % confidence intervals."""

import math
from dataclasses import dataclass

import numpy as np

Z = 1.959963984540054  # the normal distribution is within so many deviations of its mean with a probability of 95 %


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval: where the figure of other samples of the same sources, and as many, would lie."""

    value: float
    low: float
    high: float


def normal(value: float, error: float, least: float = -math.inf) -> Estimate:
    """The interval value ± 1.96 error, cut off at `least`. error: the standard error, >= 0."""
    return Estimate(value, max(value - Z * error, least), value + Z * error)


def mean(values: np.ndarray) -> Estimate:
    """The mean of independent values [N >= 2], with its normal interval."""
    return normal(
        float(values.mean(dtype=np.float64)), float(values.std(ddof=1, dtype=np.float64)) / len(values) ** 0.5
    )


def share(hits: int, count: int) -> Estimate:
    """hits of count >= 1 independent trials, with Wilson's interval (1927), which holds for 0 and all of them too."""
    rate = hits / count
    weight = Z * Z / count
    middle = (rate + weight / 2) / (1 + weight)
    reach = Z / (1 + weight) * math.sqrt(rate * (1 - rate) / count + weight / (4 * count))
    return Estimate(rate, min(max(middle - reach, 0.0), rate), max(min(middle + reach, 1.0), rate))
