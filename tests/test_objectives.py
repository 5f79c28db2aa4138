"""Losses against their closed forms, penalties against a function whose gradient is known."""

import math

import pytest
import torch

from gan.objectives import OBJECTIVES
from gan.regularizers import REGULARIZERS, zero_centered

R, F = torch.tensor([0.3, -2.0, 50.0], dtype=torch.float64), torch.tensor([-0.7, 1.5, -60.0], dtype=torch.float64)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    "name,d,g",
    [
        (
            "nonsaturating",
            lambda r, f: -math.log(sigmoid(r)) - math.log1p(-sigmoid(f)),
            lambda r, f: -math.log(sigmoid(f)),
        ),
        ("relativistic", lambda r, f: -math.log(sigmoid(r - f)), lambda r, f: -math.log(sigmoid(f - r))),
    ],
)
def test_losses(name, d, g):
    objective = OBJECTIVES[name]
    for i in (0, 1):  # beyond, the naive form overflows and ours must not
        assert objective.discriminator(R, F)[i] == pytest.approx(d(R[i].item(), F[i].item()), rel=1e-12)
        assert objective.generator(R, F)[i] == pytest.approx(g(R[i].item(), F[i].item()), rel=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_losses_are_finite_with_a_gradient_where_the_opponent_wins(objective):
    real, fake = torch.tensor([-200.0], requires_grad=True), torch.tensor([200.0], requires_grad=True)
    d_real, d_fake = torch.autograd.grad(objective.discriminator(real, fake).sum(), (real, fake))
    assert d_real.item() == pytest.approx(-1) and d_fake.item() == pytest.approx(1)
    real, fake = torch.tensor([200.0]), torch.tensor([-200.0], requires_grad=True)
    (g_fake,) = torch.autograd.grad(objective.generator(real, fake).sum(), fake)
    assert g_fake.item() == pytest.approx(-1)


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_only_paired_generators_look_at_reals(objective):
    real, fake = R.clone().requires_grad_(), F.clone().requires_grad_()
    seen, _ = torch.autograd.grad(objective.generator(real, fake).sum(), (real, fake), allow_unused=True)
    assert (seen is not None) == objective.paired


def quadratic(x: torch.Tensor) -> torch.Tensor:
    """D(x) = sum_i a_i x_i^2, whose gradient is 2 a_i x_i."""
    return (x.square() * torch.arange(1.0, 13.0, dtype=x.dtype).view(3, 2, 2)).flatten(1).sum(1)


def test_zero_centered_penalty_and_its_derivative():
    x = torch.randn(5, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    a = torch.arange(1.0, 13.0, dtype=torch.float64).view(3, 2, 2)
    penalty = zero_centered(quadratic(x), x)
    torch.testing.assert_close(penalty, (4 * a.square() * x.square()).flatten(1).sum(1))
    (second,) = torch.autograd.grad(penalty.sum(), x)
    torch.testing.assert_close(second, 8 * a.square() * x)


def test_rows_say_where_a_penalty_applies():
    where = {name: (r.on_real is not None, r.on_fake is not None) for name, r in REGULARIZERS.items()}
    assert where == {"none": (False, False), "r1": (True, False), "r1_r2": (True, True)}
