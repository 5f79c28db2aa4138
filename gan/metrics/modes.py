"""How evenly samples cover the classes of the data."""

import numpy as np
from numpy.typing import ArrayLike

from gan.metrics.intervals import Estimate, normal


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


def mode_kl_estimate(counts: ArrayLike) -> Estimate:
    """The mode-KL of counts [K] of independent samples, with its interval by the delta method: a sample of class k
    moves it by log(K share_k) / n. Near 0 the first order vanishes, and `mode_kl_floor` says more than the interval."""
    counts = np.asarray(counts, dtype=np.float64)
    share = counts / counts.sum()
    seen = share > 0
    logs = np.log(share[seen] * len(counts))
    value = mode_kl(counts)
    variance = max(float((share[seen] * logs**2).sum()) - value**2, 0.0)
    return normal(value, (variance / counts.sum()) ** 0.5, least=0.0)
