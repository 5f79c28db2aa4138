"""Latents that groups share: products of Gaussians, and what is counted once."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from gan.errors import UserError
from gan.vae.gaussians import product_of_gaussians
from gan.vae.groups import Grouped


def exact(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_the_product_of_known_gaussians():
    mean = exact([0.5, -1.0], [1.0, 0.2], [-0.3, 0.4])
    variance = exact([0.5, 1.0], [0.25, 2.0], [1.0, 0.5])
    found, log_variance = product_of_gaussians(mean, variance.log())
    torch.testing.assert_close(found, exact(0.6714285714285715, -0.028571428571428564))
    torch.testing.assert_close(log_variance.exp(), exact(0.14285714285714285, 0.2857142857142857))
    with_prior = torch.cat([mean, exact([0.0, 0.0])]), torch.cat([variance.log(), exact([0.0, 0.0])])
    found, log_variance = product_of_gaussians(*with_prior)
    torch.testing.assert_close(found, exact(0.5875, -0.022222222222222216))
    torch.testing.assert_close(log_variance.exp(), exact(0.125, 0.2222222222222222))


@pytest.fixture
def posterior():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Grouped(5, 4, content=3, size=2).double()


def test_a_group_shares_its_content_and_no_style(posterior):
    h = torch.randn(6, 5, dtype=torch.float64)
    z, log_q = posterior(torch.randn(7, 6, 4, dtype=torch.float64), h)
    pairs = z.unflatten(1, (3, 2))
    assert torch.equal(pairs[:, :, 0, :3], pairs[:, :, 1, :3]) and (pairs[:, :, 0, 3] != pairs[:, :, 1, 3]).all()
    assert (pairs[:, 0, 0, :3] != pairs[:, 1, 0, :3]).all()
    assert log_q.shape == (7, 6)


def test_the_divergence_of_content_counts_once_per_group(posterior):
    h = torch.randn(6, 5, dtype=torch.float64)
    mean, log_variance = posterior.moments(h).chunk(2, -1)
    total = 0.0
    for group in range(3):
        members = slice(2 * group, 2 * group + 2)
        precision = (-log_variance[members, :3]).exp()
        shared = Normal((precision * mean[members, :3]).sum(0) / precision.sum(0), precision.sum(0) ** -0.5)
        total += kl_divergence(shared, Normal(exact(0.0), 1.0)).sum()
    own = Normal(mean[:, 3:], (log_variance[:, 3:] / 2).exp())
    total += kl_divergence(own, Normal(exact(0.0), 1.0)).sum()
    torch.testing.assert_close(posterior.divergence(h).sum(), total)


def test_content_must_leave_room_for_style():
    with pytest.raises(UserError, match="content=4 must leave some of the latent's 4 numbers to style"):
        Grouped(5, 4, content=4, size=2)
