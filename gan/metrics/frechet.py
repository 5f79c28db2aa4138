"""The Fréchet distance between Gaussians fitted to features (Dowson, Landau 1982; for GANs Heusel et al. 2017)."""

import math

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from gan.errors import UserError
from gan.metrics.blocks import blocks
from gan.metrics.intervals import Estimate, normal


def gaussian_fit(features: ArrayLike | Tensor) -> tuple[Tensor, Tensor]:
    """Features [N >= 2, F] -> (mean [F], unbiased covariance [F, F]) in float64. Raises UserError for fewer samples."""
    x = torch.as_tensor(features)
    if len(x) < 2:
        raise UserError(f"a covariance needs at least 2 samples, not {len(x)}; give more")
    mean = torch.stack([block.sum(0) for _, block in blocks(x)]).sum(0) / len(x)
    sigma = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    for _, block in blocks(x):
        centered = block - mean
        sigma += centered.T @ centered
    return mean, sigma / (len(x) - 1)


def square_root(sigma: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric root of a positive semidefinite [F, F], and the root's pseudoinverse. Eigenvalues as small as
    rounding errors count as 0."""
    values, vectors = torch.linalg.eigh(sigma)
    noise = values[-1].clamp(min=0) * len(values) * torch.finfo(torch.float64).eps
    roots = values.clamp(min=0).sqrt()
    seen = values > noise
    root = (vectors * torch.where(seen, roots, 0.0)) @ vectors.T
    return root, (vectors * torch.where(seen, 1 / roots, 0.0)) @ vectors.T


def frechet_distance(mu1: ArrayLike, sigma1: ArrayLike, mu2: ArrayLike, sigma2: ArrayLike) -> float:
    """||mu1 - mu2||^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2), for mu [F] and sigma [F, F]: the squared distance, as
    FID reports it.

    The trace of the last term is the nuclear norm of S1^1/2 S2^1/2. Computed like this, it needs no root of a
    nonsymmetric matrix, and loses no digits if a covariance lacks full rank (fewer samples than features, dead units).
    Raises ValueError for values that are not finite.
    """
    moments = [torch.as_tensor(a, dtype=torch.float64) for a in (mu1, sigma1, mu2, sigma2)]
    if not all(bool(a.isfinite().all()) for a in moments):
        raise ValueError("Fréchet distance of moments that are not finite")
    mean1, cov1, mean2, cov2 = moments
    overlap = torch.linalg.svdvals(square_root(cov1)[0] @ square_root(cov2)[0])
    return _distance(mean1 - mean2, cov1, cov2, overlap)


def _distance(difference: Tensor, sigma1: Tensor, sigma2: Tensor, overlap: Tensor) -> float:
    distance = difference.square().sum() + sigma1.trace() + sigma2.trace() - 2 * overlap.sum()
    return max(float(distance), 0.0)


def frechet_estimate(x: Tensor, y: Tensor) -> Estimate:
    """The Fréchet distance between samples x [n, F] and y [m, F], n and m > F, with a 95 % interval by the delta
    method: the limit law of the empirical distance of Rippl, Munk and Sturm (2016, theorem 2.3).

    The distance is a smooth function of the four moments, so to first order a sample moves it by its influence,
    2 (mu1 - mu2).(x - mu1) + (x - mu1)' (I - T) (x - mu1) - tr((I - T) S1), where T is the optimal transport map from
    one Gaussian to the other; the squared error is var(influence of x) / n + var(influence of y) / m. One decomposition
    gives value and error, where a bootstrap would need a hundred.

    The interval is that of the distance at these counts. The distance of finite samples is above that of their sources
    by about as much as two halves of one source are apart (times the counts' ratio), and the interval is not moved to
    make up for it: compare figures of equal counts. Between samples of one source the first order vanishes; the
    interval is then about 1.4 times as wide as it need be. Of networks that are compared with the same y, the
    difference is more certain than the intervals, which hold the error of y too.
    """
    mu1, sigma1 = gaussian_fit(x)
    mu2, sigma2 = gaussian_fit(y)
    root1, inverse1 = square_root(sigma1)
    root2, inverse2 = square_root(sigma2)
    u, overlap, v = torch.linalg.svd(root1 @ root2)
    rotation = u @ v
    there = root2 @ rotation.T @ inverse1  # (S1^1/2 S2 S1^1/2)^1/2 = S1^1/2 S2^1/2 (u v)': T = S1^-1/2 (...) S1^-1/2
    back = root1 @ rotation @ inverse2
    squared_error = _influence(x, mu1, mu1 - mu2, there).var() / len(x)
    squared_error += _influence(y, mu2, mu2 - mu1, back).var() / len(y)
    return normal(_distance(mu1 - mu2, sigma1, sigma2, overlap), math.sqrt(float(squared_error)), least=0.0)


def _influence(x: Tensor, mu: Tensor, difference: Tensor, transport: Tensor) -> Tensor:
    """How much each row of x [n, F] moves the distance, times n and up to a constant: [n]."""
    parts = []
    for _, block in blocks(x):
        centered = block - mu
        parts.append(2 * centered @ difference + ((centered - centered @ transport) * centered).sum(1))
    return torch.cat(parts)
