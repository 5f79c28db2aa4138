"""Gaussians with independent coordinates."""

import math

import torch
from torch import Tensor

LOG_2PI = math.log(2 * math.pi)


def normal_log_density(z: Tensor, mean: Tensor | float = 0.0, log_variance: Tensor | float = 0.0) -> Tensor:
    """log N(z; mean, exp(log_variance)) of independent coordinates: [..., d] -> [...]."""
    log_variance = torch.as_tensor(log_variance, dtype=z.dtype, device=z.device)
    return -0.5 * (LOG_2PI + log_variance + (z - mean).square() * torch.exp(-log_variance)).sum(-1)


def normal_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, diag exp(log_variance)) || N(0, I)): [..., d] -> [...] (Kingma & Welling 2014, appendix B)."""
    return 0.5 * (log_variance.exp() + mean.square() - 1 - log_variance).sum(-1)


def product_of_gaussians(mean: Tensor, log_variance: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log variance of the normalized product of n Gaussians with independent coordinates: [n, ..., d] each ->
    [..., d] each (Bouchacourt et al. 2018, eq. 4). Precisions add up."""
    log_total = torch.logsumexp(-log_variance, 0)
    weights = torch.exp(-log_variance - log_total)
    return (weights * mean).sum(0), -log_total
