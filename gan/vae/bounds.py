"""Bounds and estimates of log p(x) from importance weights, and gradients of the bounds.

All take log weights [k, N]: log p(x, z) - log q(z | x) of k latents z ~ q(z | x) for each of N images.
"""

import math
from collections.abc import Iterator
from itertools import combinations, islice

import torch
from torch import Tensor

from gan.errors import UserError

CHUNK = 1 << 22  # weights that are looked at at a time by the jackknife
MOST_SUBSETS = 1 << 22  # that the jackknife goes through


def elbo(log_weights: Tensor) -> Tensor:
    """The evidence lower bound, a mean over k latents: [k, N] -> [N] (Kingma & Welling 2014, eq. 3)."""
    return log_weights.mean(0)


def iwae(log_weights: Tensor) -> Tensor:
    """log of the mean weight: [k, N] -> [N]. A lower bound on average, tighter with k (Burda et al. 2016, eq. 8)."""
    return log_weights.logsumexp(0) - math.log(len(log_weights))


def jackknife(log_weights: Tensor, order: int) -> Tensor:
    """The jackknife of `iwae` of an order m: [k, N] -> [N], float64 (Nowozin 2018, eq. 10 to 12).

    Its bias falls as k^-(m + 1), that of `iwae`, which is order 0, as 1 / k. It is no bound: it can be above log p(x).
    Each subset's sum is taken on its own in float64, as differences of sums of weights would cancel.

    Raises UserError if `order` is not in [0, k), or there are too many subsets of k - order latents to go through.
    """
    k = len(log_weights)
    if not 0 <= order < k:
        raise UserError(f"a jackknife of order {order} needs more than {order} samples; {k} were given")
    subsets = math.comb(k, min(order, k // 2))
    if subsets > MOST_SUBSETS:
        raise UserError(
            f"a jackknife of order {order} of {k} samples goes through {subsets} subsets, which is more than "
            f"{MOST_SUBSETS}; take a lower order, or fewer samples"
        )
    log_weights = log_weights.double()
    total = torch.zeros_like(log_weights[0])
    for left_out, coefficient in enumerate(jackknife_coefficients(k, order)):
        total += coefficient * _mean_over_subsets(log_weights, left_out)
    return total


def jackknife_coefficients(k: int, order: int) -> list[float]:
    """c_j of the mean bound of k - j samples, j = 0 to m: (-1)^j (k - j)^m / (j! (m - j)!). They add up to 1,
    and cancel the terms k^-1 to k^-m of the bias."""
    return [(-1) ** j * (k - j) ** order / (math.factorial(j) * math.factorial(order - j)) for j in range(order + 1)]


def _mean_over_subsets(log_weights: Tensor, left_out: int) -> Tensor:
    """The mean of `iwae` over all ways to leave so many of the k weights out: float64 [k, N] -> [N]."""
    k, count = log_weights.shape
    total = torch.zeros_like(log_weights[0])
    for rows in _chunks(combinations(range(k), left_out), max(CHUNK // (k * count), 1)):
        kept = torch.zeros(len(rows), k, 1, dtype=log_weights.dtype, device=log_weights.device)
        if left_out:
            kept.scatter_(1, torch.tensor(rows, device=kept.device).unsqueeze(2), -math.inf)
        total += (log_weights + kept).logsumexp(1).sum(0)
    return total / math.comb(k, left_out) - math.log(k - left_out)


def _chunks(items: Iterator[tuple[int, ...]], size: int) -> Iterator[list[tuple[int, ...]]]:
    while chunk := list(islice(items, size)):
        yield chunk


def doubly_reparameterized(z: Tensor, log_weights: Tensor, beta: Tensor | float = 1.0) -> Tensor:
    """A loss [N] whose gradient is that of -`iwae`, with a noise that does not grow with k for the posterior's
    parameters (Tucker et al. 2019, eq. 8). Call it once per pass.

    z: [k, N, d], made from the posterior's parameters; log_weights [k, N]: computed from z and from the model's
    parameters, with the posterior's stopped where they enter its density. The model's get the usual gradient, with
    weights v_i = w_i / sum w, and what reaches the posterior's through z_i is multiplied by v_i once more.

    beta: the weight of log q in log w, 1 in the paper. What the density's own parameters would get has this weight, and
    equals on average what reaches z_i times -(1 - v_i): so that factor is 1 - beta (1 - v_i), which for 1 is v_i.
    """
    shares = log_weights.detach().softmax(0)
    if z.requires_grad:
        factors = 1 - beta * (1 - shares)
        z.register_hook(lambda gradient: gradient * factors.unsqueeze(2))
    return -(shares * log_weights).sum(0)
