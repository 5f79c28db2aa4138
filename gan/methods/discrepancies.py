"""Distances between sets of samples that need no ratio of densities: maximum mean discrepancy and the energy score.

Sets come in coupling groups, [groups, n, K]; a result is one value per group.
"""

import torch
from torch import Tensor

from gan.errors import UserError
from gan.methods.divergences import Function, power

BANDWIDTHS = (1.0, 2.0, 4.0, 8.0, 16.0)
EXPONENTS = (0.2, 0.5, 1.0, 2.0, 5.0)


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """|x_i - y_j|^2: [..., n, K], [..., m, K] -> [..., n, m]. By differences: |x|^2 + |y|^2 - 2xy cancels."""
    return (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)


def kernel(name: str, scale: float = 1.0, single: bool = False) -> Function:
    """A positive definite function of squared distances. Lengths are divided by `scale`.

    "rbf" and "rq" are the sums over BANDWIDTHS and EXPONENTS (Li et al. 2017; Bińkowski et al. 2018, section 2.1), or
    with `single` the one at 1; "distance" is -|x - y|, whose discrepancy is the energy distance (Sejdinovic et al.
    2013). Raises UserError for another name or a scale that is not positive.
    """
    if not scale > 0:
        raise UserError(f"scale must be positive, got {scale:g}")
    widths, exponents = ((1.0,), (1.0,)) if single else (BANDWIDTHS, EXPONENTS)
    kernels = {
        "rbf": lambda s: sum((-s / (2 * b * b)).exp() for b in widths),
        "rq": lambda s: sum((1 + s / (2 * a)) ** -a for a in exponents),
        "distance": lambda s: -power(s, 0.5),
    }
    if name not in kernels:
        raise UserError(f"kernel {name} is unknown; known: {', '.join(kernels)}")
    return lambda squared: kernels[name](squared / scale**2)


def mmd(x: Tensor, y: Tensor, k: Function, unbiased: bool = True) -> Tensor:
    """MMD^2 (Gretton et al. 2012, lemma 6 and eq. 5): [groups, n, K], [groups, m, K] -> [groups].

    The unbiased estimate leaves k(x, x) out and may be negative; it needs n, m >= 2.
    """
    cross = k(squared_distances(x, y)).mean((-2, -1))
    return _mean_within(x, k, unbiased) + _mean_within(y, k, unbiased) - 2 * cross


def _mean_within(x: Tensor, k: Function, unbiased: bool) -> Tensor:
    n, values = x.shape[-2], k(squared_distances(x, x))
    if not unbiased:
        return values.mean((-2, -1))
    apart = ~torch.eye(n, dtype=torch.bool, device=x.device)
    return torch.where(apart, values, 0.0).sum((-2, -1)) / (n * (n - 1))


def witness(points: Tensor, x: Tensor, y: Tensor, k: Function) -> Tensor:
    """E k(point, x) - E k(point, y), the critic that the discrepancy stands for: [groups, l, K], ... -> [groups, l]."""
    return k(squared_distances(points, x)).mean(-1) - k(squared_distances(points, y)).mean(-1)


def energy_score(x: Tensor, y: Tensor, gamma: float = 0.5, beta: float = 1.0) -> Tensor:
    """E|x - y|^beta - gamma E|y - y'|^beta, the lower the better: [groups, n, K], [groups, m, K] -> [groups].

    y are the samples, at least 2. With gamma = 1/2 and 0 < beta < 2 strictly proper (Gneiting & Raftery 2007;
    Bouchacourt et al. 2016). Constant terms of x alone are left out.
    """
    distance = lambda s: power(s, beta / 2)  # noqa: E731
    return distance(squared_distances(x, y)).mean((-2, -1)) - gamma * _mean_within(y, distance, True)
