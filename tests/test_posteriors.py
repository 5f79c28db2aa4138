"""Posteriors, against a model whose posterior and log p(x) are known, and against numbers worked out elsewhere."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

from gan.errors import UserError
from gan.methods.rows import look_up
from gan.vae.gaussians import normal_divergence, normal_log_density
from gan.vae.posteriors import (
    POSTERIORS,
    Hamiltonian,
    leapfrog,
    stopped_log_density,
)

# z ~ N(0, I), x | z ~ N(W z + b, I / 4)
W = torch.tensor([[1.0, 0.5], [-0.3, 0.8], [0.2, -0.6]], dtype=torch.float64)
B = torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64)
X = torch.tensor([0.7, -0.4, 0.9], dtype=torch.float64)
LOG_P = -2.9405009275639395
BEST_WITHOUT_COVARIANCE = -2.945257783168717
ONE = torch.ones(1, 1, dtype=torch.float64)


def joint(z):
    return normal_log_density(z) + normal_log_density(X, z @ W.T + B, math.log(0.25))


def set_moments(posterior, mean, log_variance):
    """Let a Gaussian's moments be these for the feature 1."""
    posterior.moments.weight.data.zero_()
    posterior.moments.bias.data.copy_(torch.tensor([*mean, *log_variance], dtype=torch.float64))


def made(name, d=2, features=1):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return look_up("vae.posterior", name, POSTERIORS, features=features, d=d, group=1).double()


def noise(posterior, k, count=1, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((k, count, posterior.noise)))


def bound(posterior, k=4000, seed=0):
    z, log_q = posterior(noise(posterior, k, seed=seed), ONE, joint=joint)
    return joint(z) - log_q


def test_densities_are_those_of_torch():
    z = torch.randn(4, 3, dtype=torch.float64)
    mean = torch.randn(3, dtype=torch.float64)
    log_variance = torch.randn(3, dtype=torch.float64)
    q = Normal(mean, (log_variance / 2).exp())
    torch.testing.assert_close(normal_log_density(z, mean, log_variance), q.log_prob(z).sum(1))
    expected = torch.distributions.kl_divergence(q, Normal(torch.zeros(3).double(), 1.0)).sum()
    torch.testing.assert_close(normal_divergence(mean, log_variance), expected)


def test_the_elbo_of_a_known_case():
    posterior = made("diagonal")
    set_moments(posterior, [0.2, -0.1], [-0.5, -1.0])
    values = bound(posterior, 100_000)
    assert values.mean().item() == pytest.approx(-4.142237002255378, abs=4 * values.std().item() / 100_000**0.5)
    moments = torch.tensor([[0.2, -0.1], [-0.5, -1.0]], dtype=torch.float64)
    assert normal_divergence(*moments).item() == pytest.approx(0.2622050504420379, abs=1e-12)


def quadrature():
    """Noise [k, 1, 2] and its probabilities [k, 1], exact for polynomials: all functions here are quadratic."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(8)
    grid = torch.from_numpy(np.stack(np.meshgrid(nodes, nodes)).reshape(2, -1).T).unsqueeze(1)
    mass = torch.from_numpy(np.outer(weights, weights).flatten() / weights.sum() ** 2).unsqueeze(1)
    return grid, mass


def trained_bound(posterior, steps):
    """The exact ELBO of a Gaussian posterior, after training."""
    grid, mass = quadrature()
    optimizer = torch.optim.LBFGS(posterior.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        z, log_q = posterior(grid, ONE)
        value = (mass * (log_q - joint(z))).sum()
        value.backward()
        return value

    optimizer.step(loss)
    return -loss().item()


def test_without_covariance_the_bound_keeps_its_gap_and_reflections_close_it():
    reached = trained_bound(made("diagonal"), 100)
    assert reached == pytest.approx(BEST_WITHOUT_COVARIANCE, abs=1e-9)
    assert LOG_P - reached == pytest.approx(0.0047568556047765664, rel=1e-6)
    assert trained_bound(made("householder:layers=2"), 300) == pytest.approx(LOG_P, abs=1e-9)


def test_householder_makes_the_exact_posterior():
    posterior = made("householder:layers=2")
    trained_bound(posterior, 300)
    z, _ = posterior(noise(posterior, 20_000), ONE)
    precision = torch.eye(2).double() + 4 * W.T @ W
    exact = MultivariateNormal(torch.linalg.solve(precision, 4 * W.T @ (X - B)), precision_matrix=precision)
    torch.testing.assert_close(z.mean((0, 1)), exact.mean, atol=0.01, rtol=0)
    torch.testing.assert_close(z.squeeze(1).T.cov(), exact.covariance_matrix, atol=0.01, rtol=0)


@pytest.mark.parametrize("name", [name for name in POSTERIORS if name not in ("implicit", "grouped")])
def test_no_posterior_exceeds_the_evidence_and_their_weights_have_its_mean(name):
    posterior = made(name)
    start = getattr(posterior, "start", getattr(posterior, "first", posterior))
    set_moments(start, [0.3] * (start.moments.bias.numel() // 2), [-0.5] * (start.moments.bias.numel() // 2))
    log_weights = bound(posterior, 100_000).detach()
    assert log_weights.mean() < LOG_P
    weights = (log_weights - LOG_P).exp()
    assert weights.mean().item() == pytest.approx(1, abs=5 * weights.std().item() / 100_000**0.5)


@pytest.mark.parametrize("name", ["diagonal", "householder", "iaf", "coupling"])
def test_the_density_of_latents_is_that_with_which_they_were_drawn(name):
    posterior = made(name, d=4, features=3)
    for parameter in posterior.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    h = torch.randn(5, 3, dtype=torch.float64)
    z, log_q = posterior(noise(posterior, 3, 5), h)
    torch.testing.assert_close(posterior.log_density(z, h), log_q, atol=1e-8, rtol=0)
    stopped = stopped_log_density(posterior, z, h)
    torch.testing.assert_close(stopped, log_q, atol=1e-8, rtol=0)
    (slope,) = torch.autograd.grad(stopped.sum(), z, retain_graph=True)
    assert slope.abs().sum() > 0
    free = posterior.log_density(z.detach(), h)
    assert free.requires_grad and not stopped_log_density(posterior, z.detach(), h).requires_grad


# z ~ N(0, 1), x | z ~ N(z, 1), x = 1.5
def toy_joint(z):
    return normal_log_density(z) + normal_log_density(torch.full_like(z, 1.5), z)


def test_leapfrog_of_a_known_case():
    start = torch.tensor([0.3], dtype=torch.float64), torch.tensor([-0.5], dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    z, momentum = leapfrog(*start, lambda z: 1.5 - 2 * z, 0.25 * one, 5, one)
    assert (z.item(), momentum.item()) == pytest.approx((0.4905891418457031, 0.7155149459838868), abs=1e-12)


@pytest.mark.parametrize(
    "step,steps,expected",
    [(0.25, 1, -2.5399788774429544), (0.25, 4, -2.511961107671559), (0.25, 5, -2.5126115994375686),
     (0.5, 2, -2.421990291017173)],
)  # fmt: skip
def test_hamiltonian_bounds_of_a_toy_are_exact(step, steps, expected):
    posterior = Hamiltonian(1, 1, steps).double()
    set_moments(posterior.start, [0.0], [0.0])
    posterior.log_step.data.fill_(math.log(step))
    grid, mass = quadrature()
    z, log_q = posterior(grid, ONE, joint=toy_joint)
    assert (mass * (toy_joint(z) - log_q)).sum().item() == pytest.approx(expected, abs=1e-9)


def test_hamiltonian_learns_through_the_slopes():
    posterior = made("hamiltonian:steps=2")
    bound(posterior, 8).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in posterior.parameters())
    assert posterior.log_step.grad.abs().sum() > 0


def test_the_adversary_of_an_implicit_posterior_makes_its_divergence_known():
    """N(.6, .3) against N(0, 1): with the exact ratio to the contrast, which is 0 here, log q is exact."""
    posterior = made("implicit:size=1", d=1)

    class Exact(torch.nn.Module):
        def forward(self, noise):
            return 0.6 + math.sqrt(0.3) * noise[:, :1]

    class Zero(torch.nn.Module):
        def forward(self, z, h):
            return torch.zeros_like(z[..., 0])

    posterior.network = Exact()
    posterior.draws = 400
    posterior.adversary = Zero()
    draws = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 4000, 401)))
    z, log_q = posterior(draws, ONE.expand(4000, 1))
    difference = log_q - normal_log_density(z)
    # The contrast's moments are estimated from 400 draws, which adds about 1 / 400 to the divergence.
    error = difference.std().item() / 4000**0.5
    assert difference.mean().item() == pytest.approx(0.431986402162968, abs=4 * error + 0.005)


def test_parameters_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="layers must be at least 1"):
        made("planar:layers=0")
    with pytest.raises(UserError, match="coupling"):
        made("coupling", d=1)
