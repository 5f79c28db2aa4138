"""How evenly samples cover the classes of the data."""

import numpy as np
from numpy.typing import ArrayLike


def mode_kl(counts: ArrayLike) -> float:
    """KL(histogram of predicted classes || uniform) in nats, from counts [K] >= 0. It is 0 if all classes are equally
    frequent, and log K if there is only one."""
    counts = np.asarray(counts, dtype=np.float64)
    share = counts / counts.sum()
    seen = share > 0
    return float((share[seen] * np.log(share[seen] * len(counts))).sum())


def mode_kl_floor(samples: int, classes: int) -> float:
    """The mode-KL that n samples from K equally likely classes have on average, to first order: (K - 1) / (2 n)
    (Miller 1955)."""
    return (classes - 1) / (2 * samples)
