"""How evenly samples cover the classes of the data."""

import numpy as np
from numpy.typing import ArrayLike

from gan.metrics.intervals import Estimate, Z, normal

CONFIDENT = 0.9  # the least probability of a class that counts as seen beyond doubt


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


def mode_count(counts: ArrayLike) -> Estimate:
    """How many of K classes, with counts [K] of independent samples, were seen. As many other samples would miss a
    class that was seen c times with a probability of about e^-c; the interval holds the variance of that."""
    counts = np.asarray(counts, dtype=np.float64)
    seen = int((counts > 0).sum())
    missed = np.exp(-counts[counts > 0])
    reach = Z * float((missed * (1 - missed)).sum()) ** 0.5
    return Estimate(seen, max(seen - reach, 0.0), min(seen + reach, float(len(counts))))


def inception_score(probabilities: np.ndarray) -> Estimate:
    """exp E KL(p(y|x) || p(y)) of class probabilities [N >= 2, K] of N images (Salimans et al. 2016, section 4), all of
    them in one part: in parts, as it is often computed, it is lower.

    The interval is by the delta method: an image moves the mean divergence by its own divergence, over N.
    """
    p = probabilities.astype(np.float64)
    mean = p.mean(0)
    logs = np.log(mean, out=np.zeros_like(mean), where=mean > 0)
    own_logs = np.log(p, out=np.zeros_like(p), where=p > 0)
    moved = (p * (own_logs - logs)).sum(1)
    error = Z * float(moved.std(ddof=1)) / len(p) ** 0.5
    value = float(moved.mean())
    return Estimate(float(np.exp(value)), max(float(np.exp(value - error)), 1.0), float(np.exp(value + error)))
