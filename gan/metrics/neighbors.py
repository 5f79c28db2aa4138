"""Whether samples lie among the reals, and reals among the samples, by balls around nearest neighbors.

A ball reaches from a point to the k-th nearest other point of its own set, its border included. Shares depend on the
number of points: compare those of equal counts.
"""

import math

import torch
from torch import Tensor

from gan.metrics.blocks import blocks, nearest_squares, squared_distances
from gan.metrics.intervals import Estimate, normal, share


def radii(x: Tensor, k: int) -> Tensor:
    """The squared distance of each row of x [n > k, F] to its k-th nearest other row -> float64 [n]."""
    return nearest_squares(x, x, k, held_out=True).max(1).values


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> dict[str, Estimate]:
    """`precision`: the share of fakes [m > k, F] inside the ball of any real [n > k, F]; `recall`: the share of reals
    inside the ball of any fake (Kynkäänniemi et al. 2019, eq. 1 and 2).

    The intervals are Wilson's, for the points that are counted; the balls are taken as given.
    """
    real_radii = radii(real, k)
    fake_radii = radii(fake, k)
    fakes_inside = torch.zeros(len(fake), dtype=torch.bool, device=fake.device)
    reals_inside = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows, fakes in blocks(fake):
        for columns, reals in blocks(real):
            distances = squared_distances(fakes, reals)
            fakes_inside[rows] |= (distances <= real_radii[columns]).any(1)
            reals_inside[columns] |= (distances <= fake_radii[rows, None]).any(0)
    return {
        "precision": share(int(fakes_inside.sum()), len(fake)),
        "recall": share(int(reals_inside.sum()), len(real)),
    }


def density_coverage(real: Tensor, fake: Tensor, k: int = 5) -> dict[str, Estimate]:
    """`density`: in how many balls of reals [n > k, F] a fake [m, F] lies on average, over k; 1 for perfect fakes, and
    more if they crowd where reals are dense. `coverage`: the share of reals with a fake in their ball; a perfect
    generator reaches about 1 - 2^-k with as many fakes as reals (Naeem et al. 2020, sections 3.1 and 3.2).

    The intervals take the balls as given: normal for density, Wilson's for coverage.
    """
    real_radii = radii(real, k)
    balls = torch.zeros(len(fake), dtype=torch.float64, device=fake.device)
    covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows, fakes in blocks(fake):
        for columns, reals in blocks(real):
            inside = squared_distances(fakes, reals) <= real_radii[columns]
            balls[rows] += inside.sum(1)
            covered[columns] |= inside.any(0)
    density = float(balls.mean()) / k
    error = float(balls.std()) / k / math.sqrt(len(fake))
    return {"density": normal(density, error, least=0.0), "coverage": share(int(covered.sum()), len(real))}
