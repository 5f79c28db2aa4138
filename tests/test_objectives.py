"""Losses against their closed forms, and what the golden tables of distances between samples say."""

import math

import pytest
import torch

from gan.errors import UserError
from gan.methods import discrepancies
from gan.methods.divergences import DIVERGENCES, divergence
from gan.methods.objectives import OBJECTIVES
from gan.methods.pairs import find_pair
from gan.methods.rows import look_up

R, F = torch.tensor([0.3, -2.0, 50.0], dtype=torch.float64), torch.tensor([-0.7, 1.5, -60.0], dtype=torch.float64)
LOGITS = [name for name, entry in OBJECTIVES.items() if entry.make(**entry.parameters).group == 1]
GROUPED = {"relativistic_average": "group=3", "mmd": "group=3", "mmd:critic=0": "group=3", "energy": "group=3"}


def objective(text: str):
    return look_up("--objective", text, OBJECTIVES)


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
        ("least_squares", lambda r, f: 0.5 * (r - 1) ** 2 + 0.5 * f**2, lambda r, f: 0.5 * (f - 1) ** 2),
        ("hinge", lambda r, f: max(0, 1 - r) + max(0, 1 + f), lambda r, f: -f),
        ("wasserstein", lambda r, f: f - r, lambda r, f: -f),
        ("f:kl", lambda r, f: math.exp(f - 1) - r, lambda r, f: -f),
        ("f:kl:saturating=1", lambda r, f: math.exp(f - 1) - r, lambda r, f: -math.exp(f - 1)),
        ("f:kl:form=log_ratio", lambda r, f: math.exp(f) - 1 - r, lambda r, f: -1 - f),
        ("f:rkl:saturating=1", lambda r, f: f - 1 + math.exp(-r), lambda r, f: 1 - f),
        ("f:pearson", lambda r, f: f * f / 4 + f - r, lambda r, f: -f),
        ("f:gan", lambda r, f: -math.log(sigmoid(r)) - math.log1p(-sigmoid(f)), lambda r, f: -math.log(sigmoid(f))),
        ("bgan", lambda r, f: math.exp(2 * f) - 1 - 2 * math.expm1(r), lambda r, f: 1 - math.exp(2 * f)),
        ("bgan:frozen=1", lambda r, f: math.exp(2 * f) - 1 - 2 * math.expm1(r), lambda r, f: math.expm1(f) ** 2),
    ],
)
def test_losses(name, d, g):
    row = objective(name)
    for i in (0, 1):  # beyond, the naive form overflows and ours must not
        assert row.discriminator(R, F)[i] == pytest.approx(d(R[i].item(), F[i].item()), rel=1e-12)
        assert row.generator(R, F)[i] == pytest.approx(g(R[i].item(), F[i].item()), rel=1e-12)
    assert row.discriminator(R, F).isfinite().all() and row.generator(R, F).isfinite().all()


@pytest.mark.parametrize("name", LOGITS)
def test_losses_are_finite_with_a_gradient_where_the_opponent_wins(name):
    row = objective(name)
    real, fake = torch.tensor([-200.0], requires_grad=True), torch.tensor([200.0], requires_grad=True)
    d_real, d_fake = torch.autograd.grad(row.discriminator(real, fake).sum(), (real, fake))
    assert -math.inf < d_real.item() < 0 < d_fake.item() < math.inf
    if name != "bgan":  # its G step is a saturating one
        real, fake = torch.tensor([200.0]), torch.tensor([-200.0], requires_grad=True)
        (g_fake,) = torch.autograd.grad(row.generator(real, fake).sum(), fake)
        assert -math.inf < g_fake.item() < 0


@pytest.mark.parametrize("name", [*LOGITS, *(f"{k}:{v}".replace("critic=0:", "critic=0,") for k, v in GROUPED.items())])
def test_only_paired_generators_look_at_reals(name):
    row, shape = objective(name), (3, objective(name).outputs) if objective(name).outputs > 1 else (3,)
    real = torch.linspace(-1, 2, math.prod(shape)).view(shape).requires_grad_()
    fake = torch.linspace(-2, 1, math.prod(shape)).view(shape).cos().requires_grad_()
    seen, _ = torch.autograd.grad(row.generator(real, fake).sum(), (real, fake), allow_unused=True)
    assert (seen is not None) == row.paired


@pytest.mark.parametrize("name", [f"{k}:{v}".replace("critic=0:", "critic=0,") for k, v in GROUPED.items()])
def test_what_couples_samples_does_so_inside_blocks(name):
    row = objective(name)
    torch.manual_seed(0)
    real, fake = torch.randn(2, 9, row.outputs).squeeze(2)
    losses = [loss for loss in (row.discriminator, row.generator) if loss]
    for loss in losses:
        whole = loss(real, fake)
        parts = torch.cat([loss(real[i : i + 3], fake[i : i + 3]) for i in (0, 3, 6)])
        torch.testing.assert_close(whole, parts)
        assert len(whole) in (3, 9)


def test_the_score_of_a_point_of_mmd_depends_on_no_other_point():
    """Penalties take the gradient of the sum of scores at the reals, which are among those that scores compare with."""
    torch.manual_seed(0)
    real, fake = torch.randn(2, 6, 16, dtype=torch.float64)
    score = objective("mmd:group=3").score
    slopes = torch.autograd.functional.jacobian(lambda real: score(real, real, fake), real).abs().sum(2)
    assert torch.equal(slopes > 0, torch.eye(6, dtype=torch.bool))


def test_relativistic_average_by_its_definition():
    real, fake = torch.randn(2, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    row = objective("relativistic_average:group=4")
    d = -torch.log(torch.sigmoid(real - fake.mean())) - torch.log(1 - torch.sigmoid(fake - real.mean()))
    torch.testing.assert_close(row.discriminator(real, fake), d)
    torch.testing.assert_close(row.generator(real, fake), row.discriminator(fake, real))


X, Y = torch.tensor([[[0.0], [1], [2]], [[0.5], [2.5], [4]]], dtype=torch.float64).unsqueeze(1).unbind()


@pytest.mark.parametrize(
    "name,single,biased,unbiased",
    [("rbf", True, 0.294013, -0.171479), ("rq", False, 1.183516, -0.597053), ("distance", True, 1.111111, -0.111111)],
)
def test_golden_discrepancies_of_three_points(name, single, biased, unbiased):
    k = discrepancies.kernel(name, single=single)
    assert discrepancies.mmd(X, Y, k, unbiased=False).item() == pytest.approx(biased, abs=6e-7)
    assert discrepancies.mmd(X, Y, k, unbiased=True).item() == pytest.approx(unbiased, abs=6e-7)
    row = objective("mmd:critic=0,kernel=distance,group=3")
    assert row.generator(X[0], Y[0]).item() == pytest.approx(-0.111111, abs=6e-7)
    assert objective("mmd:kernel=distance,group=3").discriminator(X[0], Y[0]).item() == pytest.approx(
        0.111111, abs=6e-7
    )


def quantiles(mean: float, deviation: float, count: int) -> torch.Tensor:
    """The middles of `count` equally likely parts of a normal distribution: [1, count, 1]."""
    p = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return (mean + deviation * torch.special.ndtri(p)).view(1, -1, 1)


def expected(function, mean: float, variance: float) -> float:
    """E function(|X - Y|^2) where X - Y is N(mean, variance), by quadrature with a node where |X - Y| has its kink."""
    x = torch.arange(-120_000, 120_001, dtype=torch.float64) / 5000
    density = (-(x - mean).square() / (2 * variance)).exp() / math.sqrt(2 * math.pi * variance)
    return torch.trapezoid(function(x.square()) * density, x).item()


def discrepancy(k) -> float:
    """MMD^2 of N(0, 1) and N(1, 1.5^2)."""
    return expected(k, 0, 2) + expected(k, 0, 4.5) - 2 * expected(k, 1, 3.25)


@pytest.mark.parametrize("width,golden", [(0.5, 0.099383), (1, 0.141286), (2, 0.115928)])
def test_golden_discrepancy_of_gaussians(width, golden):
    def k(mean, variance):  # E k(X, Y) in closed form
        s = width**2 + variance
        return width / math.sqrt(s) * math.exp(-(mean**2) / (2 * s))

    ours = discrepancy(discrepancies.kernel("rbf", scale=width, single=True))
    assert ours == pytest.approx(k(0, 2) + k(0, 4.5) - 2 * k(1, 3.25), rel=1e-10)
    assert ours == pytest.approx(golden, abs=6e-7)


def test_golden_energy_distance_and_score():
    k = discrepancies.kernel("distance")
    assert discrepancy(k) == pytest.approx(0.487444, abs=6e-7)
    # Against one point x the score is E|x - Y| - E|Y - Y'| / 2, for a normal distribution in closed form
    crps = expected(k, 0, 4.5) / 2 - expected(k, 0.7 - 1, 2.25)
    s = (0.7 - 1) / 1.5
    density, below = math.exp(-s * s / 2) / math.sqrt(2 * math.pi), (1 + math.erf(s / math.sqrt(2))) / 2
    assert crps == pytest.approx(1.5 * (s * (2 * below - 1) + 2 * density - 1 / math.sqrt(math.pi)), rel=1e-8)
    assert crps == pytest.approx(0.374400, abs=6e-7)
    # and between samples half of the unbiased energy distance, which the three points above hold
    y = torch.randn(1, 6, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = torch.full_like(y, 0.7)
    assert discrepancies.energy_score(x, y).item() == pytest.approx(discrepancies.mmd(x, y, k).item() / 2, rel=1e-13)


def test_energy_score_by_loops_and_what_gamma_does():
    x, y = torch.randn(2, 1, 5, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    near = sum((a - b).norm() ** 1.3 for a in x[0] for b in y[0]) / 25
    apart = sum((a - b).norm() ** 1.3 for a in y[0] for b in y[0]) / 20
    torch.testing.assert_close(discrepancies.energy_score(x, y, 0.7, 1.3)[0], near - 0.7 * apart)
    # Of all normal distributions N(0, s) the score against N(0, 1) is least at s = 1; without gamma at s = 0.
    reals = quantiles(0, 1, 300)

    def score(s: float, gamma: float) -> float:
        return discrepancies.energy_score(reals, quantiles(0, s, 300), gamma).item()

    assert score(1, 0.5) < min(score(0.8, 0.5), score(1.2, 0.5))
    assert score(0.01, 0) < score(0.5, 0) < score(1, 0) and score(1.5, 0.8) < score(1, 0.8)


@pytest.mark.parametrize("name", ["energy:group=3", "mmd:critic=0,kernel=distance,group=3"])
def test_equal_samples_leave_no_nan_in_the_gradient(name):
    fake = torch.zeros(3, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(objective(name).generator(torch.ones(3, 2), fake).sum(), fake)
    assert gradient.isfinite().all() and gradient.norm() > 0


def test_wasserstein_is_the_distance_of_shifted_distributions():
    """D(x) = x is the best 1-Lipschitz critic of Q = P + 0.7 with its sign: W1 is |shift|."""
    x = quantiles(0, 1, 100).flatten()
    assert objective("wasserstein").discriminator(-x, -(x + 0.7)).mean().item() == pytest.approx(-0.7)


def gradient_at(name: str) -> float:
    """d/dmu of the G loss, Q = N(mu, 1.2^2) at mu = 0.5, D at the log ratio to P = N(0, 1) and standing still."""
    z = torch.linspace(-9, 9, 20_001, dtype=torch.float64)
    weight = (-z.square() / 2).exp() / math.sqrt(2 * math.pi)
    mu = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    x = mu + 1.2 * z
    ratio = math.log(1.2) - x.square() / 2 + ((x - 0.5) / 1.2).square() / 2
    loss = torch.trapezoid(weight * objective(name).generator(ratio, ratio), z)
    return torch.autograd.grad(loss, mu)[0].item()


def test_golden_generator_gradients_of_b_gan(monkeypatch):
    monkeypatch.setattr("gan.methods.divergences.KNEE", 60.0)  # of the plain exponential, far into the tails
    true = 0.5 / 1.2**2  # d KL(P||Q) / d mu
    assert true == pytest.approx(0.347222, abs=6e-7)
    assert gradient_at("f:kl:form=log_ratio,saturating=1") == pytest.approx(true, abs=6e-7)
    assert gradient_at("bgan:divergence=kl") == pytest.approx(true, abs=6e-7)
    assert gradient_at("bgan:divergence=kl,frozen=1") == pytest.approx(-0.281526, abs=6e-7)


@pytest.mark.parametrize("name", [n for n in DIVERGENCES if divergence(n).log_ratio])
def test_the_frozen_step_of_b_gan_is_of_the_ratio_that_d_has_learned(name):
    """D's T is f'(r) at its ratio r, so r is f*'(T), beyond the knee too, and G's loss is f(r)."""
    v, zero = torch.tensor([-10.0, -4.0, -0.5, 0.0, 2.0, 4.0, 10.0, 0.0], dtype=torch.float64).split([7, 1])
    loss = objective(f"bgan:divergence={name}").discriminator
    row = divergence(name)
    t = loss(zero, zero) - loss(v, zero) + row.threshold  # T at v, for T at 0 is f'(1)
    ratio = row.conjugate_derivative(t)
    ours = objective(f"bgan:divergence={name},frozen=1").generator(v, v)
    torch.testing.assert_close(ours, row.generator(ratio), rtol=1e-8, atol=1e-10)


def test_the_frozen_step_of_b_gan_far_out_in_float32():
    """f(e^v) of the GAN's own divergence is -e^v log(1 + e^-v) - log(1 + e^v): -1 - v far up, with slope -1."""
    v = torch.tensor([-100.0, 0.0, 12.0, 30.0, 100.0], requires_grad=True)
    loss = objective("bgan:divergence=gan,frozen=1").generator(v, v)
    expected = [0, -2 * math.log(2), -13 - math.exp(-12) / 2, -31, -101]
    torch.testing.assert_close(loss, torch.tensor(expected), atol=1e-6, rtol=1e-6)
    (slope,) = torch.autograd.grad(loss.sum(), v)
    torch.testing.assert_close(slope, torch.tensor([0, -math.log(2), -1 + math.exp(-12) / 2, -1, -1]))


def test_the_ratio_of_b_gan_beyond_the_knee():
    """KL's generator is u log u, and at v = 10 the ratio is e^3 (1 + 10 - 3) = 160.7, not e^10."""
    loss = objective("bgan:divergence=kl,frozen=1").generator(R, torch.tensor([10.0], dtype=torch.float64))
    ratio = math.exp(3) * 8
    assert ratio == pytest.approx(160.7, abs=0.05) and loss.item() == pytest.approx(ratio * math.log(ratio))


def test_a_loss_against_a_real_gan_on_paper():
    """f:gan is the non-saturating GAN, f:js2 the same game shifted, and f:js half of it."""
    for a, b, factor in (("f:gan", "nonsaturating", 1), ("f:js2", "f:gan", 1), ("f:js", "f:gan", 0.5)):
        for part in ("discriminator", "generator"):
            real, fake = R.clone().requires_grad_(), F.clone().requires_grad_()
            ours, theirs = getattr(objective(a), part), getattr(objective(b), part)
            grads = [
                torch.autograd.grad(loss(real, fake).sum(), (real, fake), allow_unused=True, materialize_grads=True)
                for loss in (ours, theirs)
            ]
            torch.testing.assert_close(grads[0], tuple(factor * g for g in grads[1]))


@pytest.mark.parametrize(
    "name,regularizer,message",
    [
        ("nonsaturatin", "r1", "objective.name=nonsaturatin is unknown; did you mean nonsaturating"),
        ("f:perason", "r1", "did you mean f:pearson"),
        ("hinge", "r3", "regularizer.name=r3 is unknown; did you mean"),
        ("hinge:margin=2", "r1", "no parameter margin; hinge takes none"),
        ("f:jsw:pi=0", "none", "pi must be between 0 and 1"),
        ("f:alpha:alpha=1", "none", "0.02 away from 0"),
        ("f:tv:form=log_ratio", "none", "no form log_ratio; there is paper"),
        ("energy:beta=2", "none", "beta must be between 0 and 2"),
        ("energy:gamma=-1", "none", "gamma must be at least 0"),
        ("mmd:group=1", "none", "group must be at least 2"),
        ("mmd:kernel=rfb", "none", "kernel rfb is unknown; known: rbf"),
        ("mmd:scale=0", "none", "scale must be positive"),
        ("bgan:divergence=jsw:pi=2", "none", "pi must be"),
        ("bgan:divergence=tv", "none", "no form log_ratio"),
        ("energy", "r1", "has no critic that regularizer.name=r1 could regularize"),
        ("mmd:critic=0", "spectral_norm", "has no critic"),
        ("f:tv", "roth", "is zero, and so is the penalty"),
        ("hinge", "roth", "use an objective f:..., or roth_js"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(name, regularizer, message):
    with pytest.raises(UserError, match=message) as caught:
        find_pair(name, regularizer)
    assert "\n" not in str(caught.value)
