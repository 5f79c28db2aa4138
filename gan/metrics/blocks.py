"""Sets of features in blocks of rows: float64 copies, distances and products of all pairs would not fit in memory."""

from collections.abc import Iterator

import torch
from torch import Tensor

ROWS = 1024


def blocks(x: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield x [N, F] in float64, in blocks of rows: (which rows, block [n <= 1024, F])."""
    for start in range(0, len(x), ROWS):
        rows = slice(start, start + ROWS)
        yield rows, x[rows].double()


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """||x_i - y_j||^2 of float64 x [n, F] and y [m, F] -> [n, m]. It is 0 for equal rows: differences as small as
    rounding errors of the sum count as 0."""
    x_norms = x.square().sum(1)[:, None]
    y_norms = y.square().sum(1)[None]
    distances = x_norms + y_norms - 2 * x @ y.T
    noise = torch.finfo(torch.float64).eps * 64 * (x_norms + y_norms)
    return torch.where(distances > noise, distances, 0.0)
