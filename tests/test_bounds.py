"""Bounds on log p(x), against models whose log p(x) is known."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from torch.distributions import Normal

from gan.errors import UserError
from gan.vae.bounds import doubly_reparameterized, elbo, iwae, jackknife, jackknife_coefficients

# z ~ N(0, 1), x | z ~ N(z, 1), x = 1.5, and q is the prior. Exact values by numerical integration.
X = 1.5
LOG_P = -1.8280121234846454
IWAE = {1: -2.5439385332046722, 2: -2.099514694703327, 3: -1.9840752645338595}
BIAS = {
    (0, 8): -0.047355965976178194, (1, 8): 0.00662598358507549, (2, 8): -0.0012677662998066275,
    (3, 8): -0.00034873975457139217, (1, 4): 0.03800351350387088, (2, 4): 0.0011913469665881804,
    (3, 4): -0.006999237159906219,
}  # fmt: skip


def toy_log_weights(k, count, seed=0):
    z = torch.from_numpy(np.random.default_rng(seed).standard_normal((k, count)))
    return Normal(z, 1.0).log_prob(torch.tensor(X, dtype=torch.float64))


@pytest.mark.parametrize("k", IWAE)
def test_iwae_of_a_toy_is_its_exact_value(k):
    values = iwae(toy_log_weights(k, 200_000))
    assert values.mean().item() == pytest.approx(IWAE[k], abs=4 * values.std().item() / 200_000**0.5)


def test_one_sample_gives_the_elbo():
    log_weights = toy_log_weights(1, 10)
    torch.testing.assert_close(iwae(log_weights), elbo(log_weights))


@pytest.mark.parametrize(
    "k,order,expected",
    [(3, 2, [4.5, -4, 0.5]), (8, 1, [8, -7]), (8, 3, [85.33333333333333, -171.5, 108, -20.833333333333332])],
)
def test_coefficients_of_the_jackknife(k, order, expected):
    assert jackknife_coefficients(k, order) == pytest.approx(expected, rel=1e-14)
    assert sum(expected) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("order,k", BIAS)
def test_bias_of_the_jackknife_of_a_toy_is_its_exact_value(order, k):
    values = jackknife(toy_log_weights(k, 100_000), order)
    error = values.std().item() / 100_000**0.5
    assert values.mean().item() - LOG_P == pytest.approx(BIAS[order, k], abs=4 * error)


def exact_biases(k, order):
    """E[jackknife] - log p(x) from the exact E[iwae of n samples], n = k - order to k."""
    means = {n: exact_iwae(n) for n in range(k - order, k + 1)}
    return sum(c * means[k - j] for j, c in enumerate(jackknife_coefficients(k, order))) - exact_log_p()


def exact_log_p():
    return -np.log(4 * np.arccos(np.longdouble(-1))) / 2 - np.longdouble(X) ** 2 / 4  # x ~ N(0, 2)


def exact_iwae(n):
    """E log mean of n weights, by the transform of their sum: log s = integral of (exp(-t) - exp(-t s)) / t dt."""
    z = np.linspace(np.longdouble(-12), np.longdouble(12), 601)
    root = np.sqrt(2 * np.arccos(np.longdouble(-1)))  # of 2 pi
    density = np.exp(-(z**2) / 2) / root * (z[1] - z[0])
    weight = np.exp(-((X - z) ** 2) / 2) / root
    u = np.linspace(np.longdouble(-45), np.longdouble(60), 1200)  # t = exp(u)
    t = np.exp(u)[:, None]
    laplace = (np.exp(-t * weight / n) * density).sum(1) ** n
    return ((np.exp(-t[:, 0]) - laplace) * (u[1] - u[0])).sum()


@pytest.mark.slow
@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_the_bias_of_the_jackknife_falls_with_the_order(order):
    assert exact_iwae(2) == pytest.approx(IWAE[2], abs=1e-8)
    ratio = exact_biases(64, order) / exact_biases(128, order)
    assert math.log2(abs(ratio)) == pytest.approx(order + 1, abs=0.15)


def test_a_jackknife_is_the_mean_over_subsets_by_hand():
    log_weights = torch.tensor([[0.3], [-1.0], [2.0], [0.5]], dtype=torch.float64)
    by_hand = 0.0
    for j, c in enumerate(jackknife_coefficients(4, 2)):
        subsets = [
            math.log(sum(math.exp(log_weights[i]) for i in kept) / (4 - j)) for kept in combinations(range(4), 4 - j)
        ]
        by_hand += c * sum(subsets) / len(subsets)
    assert jackknife(log_weights, 2).item() == pytest.approx(by_hand, abs=1e-12)


def test_a_jackknife_does_not_cancel_where_one_weight_has_all_the_mass():
    log_weights = torch.full((6, 1), -800.0)
    log_weights[2] = 0.0
    assert jackknife(log_weights, 2).isfinite().all()


def test_orders_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="order 3 needs more than 3 samples; 3 were given"):
        jackknife(torch.zeros(3, 1), 3)
    with pytest.raises(UserError, match="subsets"):
        jackknife(torch.zeros(200, 1), 4)


def toy_pass(noise, mean, log_std, beta=1.0, stopped=True):
    """Latents of q = N(mean, exp(log_std)) and log weights p(x | z) (p(z) / q(z))^beta. stopped: q's parameters are, in
    its density."""
    z = (mean + log_std.exp() * noise).unsqueeze(2)
    q = Normal(mean.detach(), log_std.detach().exp()) if stopped else Normal(mean, log_std.exp())
    one = torch.ones((), dtype=torch.float64)
    divergence = q.log_prob(z.squeeze(2)) - Normal(0 * one, one).log_prob(z).squeeze(2)
    return z, Normal(z, one).log_prob(X * one).squeeze(2) - beta * divergence


def toy_noise():
    """(two noises [2, n], the mass of each pair), by Gauss-Hermite quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    weights = torch.from_numpy(weights / weights.sum())
    noise = torch.from_numpy(np.stack(np.meshgrid(nodes, nodes, indexing="ij")).reshape(2, -1))
    return noise, torch.outer(weights, weights).flatten()


def test_the_doubly_reparameterized_gradient_is_exact_on_average():
    mean = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    log_std = torch.tensor(-0.2, dtype=torch.float64, requires_grad=True)
    noise, mass = toy_noise()
    z, log_weights = toy_pass(noise, mean, log_std)
    assert (mass * iwae(log_weights)).sum().item() == pytest.approx(-1.9243399790390625, abs=1e-9)
    (mass * doubly_reparameterized(z, log_weights)).sum().backward()
    assert -mean.grad.item() == pytest.approx(0.42338476645599155, abs=1e-8)
    assert -log_std.grad.item() == pytest.approx(0.004229686104841743, abs=1e-8)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_it_is_exact_on_average_while_the_divergence_warms_up(beta):
    noise, mass = toy_noise()
    found = []
    for doubly in (True, False):
        q = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.3, -0.2)]
        z, log_weights = toy_pass(noise, *q, beta, stopped=doubly)
        loss = doubly_reparameterized(z, log_weights, beta) if doubly else -iwae(log_weights)
        found.append(torch.autograd.grad((mass * loss).sum(), q))
    torch.testing.assert_close(*found, rtol=0, atol=1e-7)


def test_the_models_parameters_get_the_usual_gradient():
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    z = torch.randn(5, 7, 1, dtype=torch.float64, requires_grad=True)
    log_weights = Normal(scale * z, 1.0).log_prob(torch.tensor(X, dtype=torch.float64)).squeeze(2)
    (usual,) = torch.autograd.grad(-iwae(log_weights).sum(), scale, retain_graph=True)
    (ours,) = torch.autograd.grad(doubly_reparameterized(z, log_weights).sum(), scale)
    torch.testing.assert_close(ours, usual)
