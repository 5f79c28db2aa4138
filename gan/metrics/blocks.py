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


def nearest_squares(queries: Tensor, points: Tensor, k: int, held_out: bool = False) -> Tensor:
    """The squared distances of queries [n, F] to their k nearest points [m, F], ascending -> float64 [n, k]. held_out:
    the queries are the first n points, and each is held out of the points that it is compared with."""
    nearest = torch.full((len(queries), k), torch.inf, dtype=torch.float64, device=queries.device)
    for columns, others in blocks(points):
        for rows, block in blocks(queries):
            distances = squared_distances(block, others)
            if held_out and rows.start == columns.start:
                distances.fill_diagonal_(torch.inf)
            nearest[rows] = torch.cat([nearest[rows], distances], dim=1).topk(k, largest=False).values
    return nearest


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """||x_i - y_j||^2 of float64 x [n, F] and y [m, F] -> [n, m]. It is 0 for equal rows: differences as small as
    rounding errors of the sum count as 0."""
    x_norms = x.square().sum(1)[:, None]
    y_norms = y.square().sum(1)[None]
    distances = x_norms + y_norms - 2 * x @ y.T
    noise = torch.finfo(torch.float64).eps * 64 * (x_norms + y_norms)
    return torch.where(distances > noise, distances, 0.0)
