"""The Fréchet distance between Gaussians fitted to features (Dowson, Landau 1982; for GANs Heusel et al. 2017)."""

import numpy as np

from gan.errors import UserError


def gaussian_fit(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features [N >= 2, F] -> (mean [F], unbiased covariance [F, F]) in float64."""
    if len(features) < 2:
        raise UserError(f"a covariance needs at least 2 samples, not {len(features)}; give more")
    features = np.asarray(features, dtype=np.float64)
    return features.mean(0), np.cov(features, rowvar=False).reshape(features.shape[1], features.shape[1])


def square_root(sigma: np.ndarray) -> np.ndarray:
    """The symmetric root of a positive semidefinite [F, F]. Eigenvalues as small as rounding errors count as 0."""
    values, vectors = np.linalg.eigh(sigma)
    noise = max(values[-1], 0) * len(values) * np.finfo(np.float64).eps
    return (vectors * np.sqrt(np.where(values > noise, values, 0))) @ vectors.T


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """||mu1 - mu2||^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2), for mu [F] and sigma [F, F]: the squared distance, as
    FID reports it.

    The trace of the last term is the nuclear norm of S1^1/2 S2^1/2. Computed like this, it needs no root of a
    nonsymmetric matrix, and loses no digits if a covariance lacks full rank (fewer samples than features, dead units).
    Raises ValueError for values that are not finite.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, dtype=np.float64) for a in (mu1, sigma1, mu2, sigma2))
    if not all(np.isfinite(a).all() for a in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("Fréchet distance of moments that are not finite")
    overlap = np.linalg.svd(square_root(sigma1) @ square_root(sigma2), compute_uv=False).sum()
    distance = np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * overlap
    return max(float(distance), 0.0)
