"""Estimates of log p(x), against the integral over a latent of two numbers."""

import math

import pytest
import torch
from test_vae import vae_task
from tiny import one_thread  # noqa: F401 - a fixture

from gan.errors import UserError
from gan.state import initial_state
from gan.vae.estimates import Scene, bits_per_number, find_estimator
from gan.vae.gaussians import normal_log_density

SMALL = {"network.z_dim": 2, "vae.hidden": [8, 8], "network.widths": [], "precision.dtype": "float64"}
KINDS = {
    "gaussian": {"vae.scale": 0.7},
    "bernoulli": {"vae.likelihood": "bernoulli", "vae.binarize": True, "data.cond": True},
    "logistic": {"vae.likelihood": "logistic"},
}


def scene(values, count=2):
    G = initial_state(vae_task(SMALL | values, last=0)).networks["VAE"].eval()
    for p in G.decoder.last.parameters():  # so that posteriors are not far from the prior ...
        p.data.mul_(0.1)
    for p in getattr(G.posterior, "moments", G.posterior).parameters():  # ... which approximates them here
        p.data.zero_()
    levels = torch.randint(256, (count, 2, 4, 4), generator=torch.Generator().manual_seed(0))
    images = levels.double() / 127.5 - 1
    if G.likelihood.binary:
        images = images.sign()
    labels = torch.arange(count) if G.classes else None
    return Scene(G, images, labels, torch.Generator().manual_seed(1))


@torch.no_grad()
def integral(of):
    """log of the integral of p(z) p(x | z), over a grid in both numbers."""
    line = torch.linspace(-6, 6, 61, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line).unsqueeze(1).expand(-1, len(of.images), -1)
    values = [of.G.log_likelihood(z, of.images, of.labels, masses=True) for z in grid.split(61)]
    return (normal_log_density(grid) + torch.cat(values)).logsumexp(0) + 2 * math.log(line[1] - line[0])


@pytest.mark.parametrize("kind", KINDS)
def test_all_estimators_are_near_the_integral_and_bounds_are_below(kind):
    of = scene(KINDS[kind])
    exact = integral(of)
    bounds = {name: find_estimator(name)(of) for name in ("elbo:draws=2000", "iwae:draws=50", "iwae:draws=2000")}
    bounds["ais"] = find_estimator("ais:steps=60,chains=100")(of)
    for name, values in bounds.items():
        assert (values < exact + 0.05).all(), name
    assert (bounds["elbo:draws=2000"] < bounds["iwae:draws=50"] + 0.05).all()
    torch.testing.assert_close(bounds["iwae:draws=2000"], exact, atol=0.05, rtol=0)
    torch.testing.assert_close(bounds["ais"], exact, atol=0.05, rtol=0)
    torch.testing.assert_close(find_estimator("jackknife:draws=64")(of), exact, atol=0.3, rtol=0)


def test_bits_per_number():
    assert bits_per_number(-math.log(2) * 30, 10) == 3


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match="jackknife:draws=3,order=3: order=3 needs more than 3 draws"):
        find_estimator("jackknife:draws=3,order=3")
    with pytest.raises(UserError, match="iwae:draws=0: draws must be at least 1"):
        find_estimator("iwae:draws=0")
    with pytest.raises(UserError, match="ask for ais"):
        find_estimator("iwae")(scene({"vae.posterior": "implicit"}))
