"""The kernel distance between two sets of features (KID: Bińkowski et al. 2018)."""

import math

import torch
from torch import Tensor

from gan.metrics.blocks import blocks
from gan.metrics.intervals import Estimate, normal


def kernel_distance(x: Tensor, y: Tensor) -> Estimate:
    """The squared maximum mean discrepancy of x [n, F] and y [m, F], n and m >= 3, for the kernel (x.y / F + 1)^3: the
    unbiased estimate of Bińkowski et al. 2018 (eq. 4), with all pairs, so that it may be negative.

    The interval is value ± 1.96 standard errors, of the jackknife that leaves out one sample at a time; with the sums
    of the kernel's rows its n + m values cost nothing. The squared errors of the two sets add up.
    """
    n = len(x)
    m = len(y)
    xx = _row_sums(x, x) - _diagonal(x)
    yy = _row_sums(y, y) - _diagonal(y)
    xy = _row_sums(x, y)
    yx = _row_sums(y, x)
    within_x = xx.sum() / (n * (n - 1))
    within_y = yy.sum() / (m * (m - 1))
    value = within_x + within_y - 2 * xy.sum() / (n * m)
    without_x = (xx.sum() - 2 * xx) / ((n - 1) * (n - 2)) + within_y - 2 * (xy.sum() - xy) / ((n - 1) * m)
    without_y = (yy.sum() - 2 * yy) / ((m - 1) * (m - 2)) + within_x - 2 * (yx.sum() - yx) / ((m - 1) * n)
    squared_error = (n - 1) * without_x.var(correction=0) + (m - 1) * without_y.var(correction=0)
    return normal(float(value), math.sqrt(float(squared_error)))


def _row_sums(x: Tensor, y: Tensor) -> Tensor:
    """sum_j k(x_i, y_j) -> float64 [n]."""
    sums = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for _, columns in blocks(y):
        for rows, block in blocks(x):
            sums[rows] += (block @ columns.T / x.shape[1] + 1).pow(3).sum(1)
    return sums


def _diagonal(x: Tensor) -> Tensor:
    """k(x_i, x_i) -> float64 [n]."""
    return torch.cat([(block.square().mean(1) + 1).pow(3) for _, block in blocks(x)])
