"""Likelihoods: their probabilities add up to one, and agree with torch's distributions."""

import math

import pytest
import torch
from torch.distributions import Bernoulli, Normal

from gan.config import settings
from gan.vae.likelihoods import LIKELIHOODS, log1mexp, mixture_outputs

LEVELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1
SCALE = torch.tensor(math.log(0.1), dtype=torch.float64)


def some_outputs(channels, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(1, channels, 1, 1, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", ["gaussian", "logistic"])
@pytest.mark.parametrize("scale", [0.1, 1.0, 8.0])
def test_the_probabilities_of_all_levels_add_up_to_one(name, scale):
    row = LIKELIHOODS[name]
    outputs = some_outputs(row.outputs(1), scale).expand(256, -1, -1, -1)
    total = row.log_mass(outputs, LEVELS.view(256, 1, 1, 1), SCALE).logsumexp(0)
    assert total.item() == pytest.approx(0, abs=1e-10)


def test_the_probabilities_of_all_pairs_of_colors_add_up_to_one():
    row = LIKELIHOODS["logistic"]
    pairs = torch.cartesian_prod(LEVELS, LEVELS).view(-1, 2, 1, 1)
    outputs = some_outputs(mixture_outputs(2)).expand(len(pairs), -1, -1, -1)
    assert row.log_prob(outputs, pairs, SCALE).logsumexp(0).item() == pytest.approx(0, abs=1e-10)


def test_a_color_depends_on_those_before_it():
    row = LIKELIHOODS["logistic"]
    outputs = some_outputs(mixture_outputs(2))
    joint = row.log_prob(
        outputs.expand(65536, -1, -1, -1), torch.cartesian_prod(LEVELS, LEVELS).view(-1, 2, 1, 1), SCALE
    )
    table = joint.view(256, 256).exp()
    assert (table - table.sum(1, keepdim=True) * table.sum(0)).abs().max() > 1e-5


def test_densities_are_those_of_torch():
    x = torch.rand(3, 2, 4, 4, dtype=torch.float64) * 2 - 1
    outputs = torch.randn_like(x)
    expected = Normal(outputs, SCALE.exp()).log_prob(x).sum((1, 2, 3))
    torch.testing.assert_close(LIKELIHOODS["gaussian"].log_prob(outputs, x, SCALE), expected)
    black_or_white = x.sign()
    expected = Bernoulli(logits=outputs).log_prob((black_or_white + 1) / 2).sum((1, 2, 3))
    torch.testing.assert_close(LIKELIHOODS["bernoulli"].log_prob(outputs, black_or_white, SCALE), expected)


def test_the_mass_of_a_level_is_its_density_times_its_width_where_that_is_smooth():
    row = LIKELIHOODS["gaussian"]
    x = LEVELS[40:200].view(-1, 1, 1, 1)
    outputs = torch.full_like(x, 0.05)
    wide = torch.tensor(math.log(2.0), dtype=torch.float64)
    width = math.log(2 / 255)
    torch.testing.assert_close(
        row.log_mass(outputs, x, wide), row.log_prob(outputs, x, wide) + width, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_nothing_is_lost_where_an_image_is_far_from_what_was_expected(name):
    row = LIKELIHOODS[name]
    outputs = torch.full((1, row.outputs(3), 1, 1), -30.0, requires_grad=True)
    value = row.log_mass(outputs, torch.ones(1, 3, 1, 1), torch.tensor(-5.0))
    value.sum().backward()
    assert value.isfinite().all() and value < -10 and outputs.grad.isfinite().all()


def test_means_are_images():
    for row in LIKELIHOODS.values():
        mean = row.mean(torch.randn(2, row.outputs(3), 4, 4), 3)
        assert mean.shape == (2, 3, 4, 4)
    certain = torch.zeros(1, mixture_outputs(1), 1, 1)
    certain[0, 10::2] = 0.25  # the means of the ten parts
    assert LIKELIHOODS["logistic"].mean(certain, 1).item() == pytest.approx(0.25)


def test_log1mexp_keeps_digits():
    a = torch.tensor([-1e-9, -0.1, -1.0, -50.0], dtype=torch.float64)
    expected = [math.log(-math.expm1(v)) if v > -1 else math.log1p(-math.exp(v)) for v in a.tolist()]
    torch.testing.assert_close(log1mexp(a), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_the_rows_are_the_choices_of_the_configuration():
    assert settings()["vae.likelihood"].choices == tuple(LIKELIHOODS)
