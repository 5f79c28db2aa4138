"""gan.metrics.kernel_distance against a closed form and against sums that are written out."""

import math

import numpy as np
import pytest
import torch

from gan.metrics.kernel_distance import kernel_distance


def naive(x: np.ndarray, y: np.ndarray) -> float:
    """Bińkowski et al. 2018, eq. 4, pair by pair."""

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return (float(a @ b) / len(a) + 1) ** 3

    n, m = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


def test_value_and_error_are_those_of_the_sums_written_out():
    random = np.random.RandomState(0)
    x, y = random.randn(12, 3), random.randn(9, 3) + 0.5
    estimate = kernel_distance(torch.from_numpy(x), torch.from_numpy(y))
    assert estimate.value == pytest.approx(naive(x, y), rel=1e-10)
    without_x = [naive(np.delete(x, i, 0), y) for i in range(12)]
    without_y = [naive(x, np.delete(y, i, 0)) for i in range(9)]
    error = math.sqrt(11 * np.var(without_x) + 8 * np.var(without_y))
    assert estimate.high - estimate.value == pytest.approx(1.959964 * error, rel=1e-6)
    assert estimate.high + estimate.low == pytest.approx(2 * estimate.value)


def test_many_blocks_are_summed_as_one(monkeypatch):
    random = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 4, generator=random), torch.randn(30, 4, generator=random)
    whole = kernel_distance(x, y)
    monkeypatch.setattr("gan.metrics.blocks.ROWS", 7)
    parts = kernel_distance(x, y)
    assert parts.value == pytest.approx(whole.value, rel=1e-12) and parts.low == pytest.approx(whole.low, rel=1e-12)


def test_the_interval_covers_the_known_distance():
    """One feature: k(x, y) = (xy + 1)^3, so MMD^2 = 3 (Ex - Ey)^2 + 3 (Ex^2 - Ey^2)^2 + (Ex^3 - Ey^3)^2. For N(0, 1)
    and N(1/2, 1) the moments are 0, 1, 0 and 1/2, 5/4, 13/8."""
    known = 3 * 0.25 + 3 / 16 + (13 / 8) ** 2
    generator = torch.Generator().manual_seed(0)
    estimates = []
    for _ in range(300):
        x = torch.randn(600, 1, generator=generator, dtype=torch.float64)
        y = torch.randn(400, 1, generator=generator, dtype=torch.float64) + 0.5
        estimates.append(kernel_distance(x, y))
    assert np.mean([e.value for e in estimates]) == pytest.approx(known, rel=0.05)
    assert 0.9 < np.mean([e.low <= known <= e.high for e in estimates]) < 0.985
