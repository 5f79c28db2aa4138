"""Whether samples are copies of training images: how near they are to the nearest, beside how near a real image is that
was held out.

A real image is held out of all others: it is as independent of them as an image that was never seen.
"""

import numpy as np
from torch import Tensor

from gan.metrics.blocks import nearest_squares
from gan.metrics.intervals import Estimate, normal, share

NEIGHBORS = 50  # among which the nearest must stand out
QUERIES = 2000  # samples, and held-out images, that are looked at; all of the reals are looked through
RARE = 0.01  # the share of held-out images that stand out as a copy does


def nearest(queries: Tensor, points: Tensor, k: int, held_out: bool = False) -> np.ndarray:
    """The distances of queries [n, F] to their k nearest points [m, F], ascending -> float64 [n, k]. held_out: the
    queries are the first n points, and each is held out of the points that it is compared with."""
    return nearest_squares(queries, points, k, held_out).sqrt().cpu().numpy()


def relative(distances: np.ndarray) -> np.ndarray:
    """The nearest of distances [n, k] over their mean: about 1, and near 0 for a copy (Carlini et al. 2023, section
    5.1). So a blurred image, which is near to all, is no copy. 0 where all are 0."""
    means = distances.mean(1)
    return np.divide(distances[:, 0], means, out=np.zeros(len(means)), where=means > 0)


def copies(real: Tensor, fake: Tensor) -> dict[str, Estimate]:
    """Of fakes [m, F] and reals [n > NEIGHBORS, F], the first QUERIES of each compared with all reals.

    `copies`: the share of fakes whose nearest real stands out from the NEIGHBORS nearest as it does only for 1 % of
    held-out reals, with Wilson's interval; `copies-by-chance`: that share of the reals. `nearest`: the mean distance
    of fakes to their nearest real over that of held-out reals; no figure where the latter is 0.
    """
    of_reals = nearest(real[:QUERIES], real, NEIGHBORS, held_out=True)
    of_fakes = nearest(fake[:QUERIES], real, NEIGHBORS)
    limit = np.quantile(relative(of_reals), RARE, method="lower")
    by_chance = float((relative(of_reals) <= limit).mean())
    figures = {
        "copies": share(int((relative(of_fakes) <= limit).sum()), len(of_fakes)),
        "copies-by-chance": Estimate(by_chance, by_chance, by_chance),
    }
    return figures | _ratio_of_means(of_fakes[:, 0], of_reals[:, 0])


def _ratio_of_means(fakes: np.ndarray, reals: np.ndarray) -> dict[str, Estimate]:
    if reals.mean() == 0:
        return {}
    ratio = fakes.mean() / reals.mean()
    errors = [values.std(ddof=1) / len(values) ** 0.5 for values in (fakes, reals)]
    error = np.hypot(errors[0], ratio * errors[1]) / reals.mean()
    return {"nearest": normal(float(ratio), float(error), least=0.0)}
