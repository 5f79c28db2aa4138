"""Annealed importance sampling, against a model whose log p(x) is known."""

import math

import pytest
import torch

from gan.vae.annealing import annealed_log_weights
from gan.vae.bounds import iwae
from gan.vae.gaussians import normal_log_density

# z ~ N(0, I), x | z ~ N(W z + b, I / 4)
W = torch.tensor([[1.0, 0.5], [-0.3, 0.8], [0.2, -0.6]], dtype=torch.float64)
B = torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64)
X = torch.tensor([[0.7, -0.4, 0.9], [3.0, 2.0, -2.0]], dtype=torch.float64)
LOG_P = -2.9405009275639395


def log_likelihood(z):
    return normal_log_density(X, z @ W.T + B, math.log(0.25))


def exact():
    covariance = W @ W.T + torch.eye(3) / 4
    return torch.distributions.MultivariateNormal(B, covariance).log_prob(X)


def test_annealing_finds_the_evidence():
    assert exact()[0].item() == pytest.approx(LOG_P, abs=1e-12)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(400, 2, 2, generator=generator, dtype=torch.float64)
    log_weights = annealed_log_weights(log_likelihood, start, 150, generator)
    torch.testing.assert_close(iwae(log_weights), exact(), atol=0.1, rtol=0)  # three standard errors of the second
    # It is a bound with one chain too, and a better one than the likelihood of draws of the prior.
    assert (log_weights.mean(0) < exact()).all()
    assert (log_weights.mean(0) > log_likelihood(start).mean(0) + 0.5).all()


def test_weights_are_right_on_average_where_steps_must_shrink():
    """A likelihood with steep walls, where one chain that follows its own moves is 1.7 % too high on average."""

    def walls(z):
        return -(50 * (z.abs() - 1).clamp(min=0)).square().sum(-1)

    x = torch.linspace(-6, 6, 100_001, dtype=torch.float64).unsqueeze(1)
    evidence = torch.trapezoid((walls(x) + normal_log_density(x)).exp(), x.squeeze(1))
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(1, 10_000, 1, generator=generator, dtype=torch.float64)  # one chain of each of many images
    weights = annealed_log_weights(walls, start, 300, generator).exp() / evidence
    assert abs(weights.mean() - 1) < 3 * weights.std() / 100


def test_more_steps_tighten_it():
    gaps = []
    for steps in (5, 80):
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(400, 2, 2, generator=generator, dtype=torch.float64)
        gaps.append((exact() - annealed_log_weights(log_likelihood, start, steps, generator).mean(0)).sum().item())
    assert 0 < gaps[1] < gaps[0] / 3
