"""Penalties against functions whose gradients are known, the identities between them, and everything else done to D."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gan.config import RegularizerConfig, TrainConfig, override
from gan.draws import Draws
from gan.errors import UserError
from gan.layers import Conv2d, Linear
from gan.methods.augment import augment, change
from gan.methods.critic import Critic
from gan.methods.divergences import KNEE, divergence
from gan.methods.pairs import critic_loss, find_pair, remarks
from gan.methods.regularizers import REGULARIZERS, zero_centered
from gan.networks import ResNetDiscriminator
from gan.schedules import gamma_at

DRAWS = Draws(0, range(2), 4)
A = torch.arange(1.0, 13.0, dtype=torch.float64).view(3, 2, 2)


def close(ours, theirs, rtol=1e-10):
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol)


def quadratic(x: torch.Tensor) -> torch.Tensor:
    """D(x) = sum_i a_i x_i^2, whose gradient is 2 a_i x_i."""
    return (x.square() * A).flatten(1).sum(1)


def linear(x: torch.Tensor) -> torch.Tensor:
    return (x * A).flatten(1).sum(1)


def images(seed: int = 0, count: int = 8) -> torch.Tensor:
    return torch.randn(count, 3, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def penalty(name: str, critic, objective="nonsaturating", draws=DRAWS) -> torch.Tensor:
    """Sum of the penalties [N] of a row."""
    result = critic_loss(*find_pair(objective, name), Critic(critic, draws), images(0), images(1))
    return sum(result.penalties)


def test_zero_centered_penalty_and_its_derivative():
    x = images().requires_grad_()
    square = zero_centered(quadratic(x), x)
    close(square, (4 * A.square() * x.square()).flatten(1).sum(1))
    (second,) = torch.autograd.grad(square.sum(), x)
    close(second, 8 * A.square() * x)


@pytest.mark.parametrize(
    "together,apart",
    [
        ("r1+r2", ("r1", "r2")),
        ("r1+wgan_gp:target=1e+1+drift:weight=0.5", ("r1", "wgan_gp:target=10", "drift:weight=0.5")),
        ("r1_difference+r2_difference", ("r1_difference", "r2_difference")),
        ("r1+none", ("r1",)),
    ],
)
def test_penalties_that_are_combined_add_up(together, apart):
    close(penalty(together, quadratic), sum(penalty(name, quadratic) for name in apart))


def test_what_is_combined_changes_d_too():
    torch.manual_seed(0)
    D = ResNetDiscriminator([4, 4]).double()
    _, row = find_pair("nonsaturating", "r1+spectral_norm")
    row.prepare(D)
    assert row.on_real
    D(images(0, 8).repeat(1, 1, 4, 4), 1)
    assert torch.linalg.matrix_norm(D.logit.weight, 2).item() == pytest.approx(1, abs=1e-6)


def test_drift_is_the_square_of_outputs_at_reals():
    close(penalty("drift:weight=2", quadratic), 2 * quadratic(images(0)).square())


@pytest.mark.parametrize(
    "name,message",
    [
        ("r1+clip", "gamma would be the weight of one and a bound"),
        ("instance_noise+r1", "gamma would be"),
        ("clip+instance_noise", "gamma would be"),
        ("r1+r1", "names one twice"),
        ("r1+rr", "regularizer.name=rr is unknown"),
        ("r1+", "unknown"),
    ],
)
def test_what_cannot_be_combined_is_refused(name, message):
    with pytest.raises(UserError, match=message):
        find_pair("nonsaturating", name)


def test_where_a_penalty_applies():
    square = lambda x: (4 * A.square() * x.square()).flatten(1).sum(1)  # noqa: E731
    r1, r2 = square(images(0)), square(images(1))
    close(penalty("r1", quadratic), r1)
    close(penalty("r2", quadratic), r2)
    close(penalty("r1_r2", quadratic), r1 + r2)
    s = torch.sigmoid(torch.stack([quadratic(images(0)), quadratic(images(1))]))
    close(penalty("roth_js", quadratic), (1 - s[0]) ** 2 * r1 + s[1] ** 2 * r2)
    result = critic_loss(*find_pair("nonsaturating", "none"), Critic(quadratic, DRAWS), images(0), images(1))
    assert result.penalties == []
    late = critic_loss(*find_pair("nonsaturating", "r1"), Critic(quadratic, DRAWS), images(0), images(1), due=False)
    assert late.penalties == []


@pytest.mark.parametrize(
    "name", ["r1", "r2", "r1_difference", "r2_difference", "r1_r2", "r1_r2_difference", "wgan_gp", "none"]
)
def test_only_images_that_a_penalty_needs_require_grad(name):
    real, fake = images(0), images(1)
    required: list[bool] = []

    def D(x: Tensor) -> Tensor:
        required.append(x.requires_grad)
        return quadratic(x)

    critic_loss(*find_pair("nonsaturating", name), Critic(D, DRAWS), real, fake)
    apart = ["r1" in name, "r2" in name]  # reals, then fakes
    assert required[:2] == apart if any(apart) else not required[0]  # where neither needs it D is shown both at once
    assert not real.requires_grad and not fake.requires_grad  # the caller's own are left as they were


def test_penalties_about_a_target_slope():
    norm = A.square().sum().sqrt()
    for name in ("wgan_gp", "dragan", "wgan_lp"):
        close(penalty(name, linear), torch.full((8,), (norm - 1).item() ** 2, dtype=torch.float64))
        close(penalty(f"{name}:target=3", linear), torch.full((8,), (norm - 3).item() ** 2, dtype=torch.float64))
    flat = lambda x: 0.01 * linear(x)  # noqa: E731
    assert (penalty("wgan_lp", flat) == 0).all() and (penalty("wgan_gp", flat) > 0.5).all()
    close(penalty("zero_gp", linear), A.square().sum().expand(8))


@pytest.mark.parametrize("name", ["wgan_gp", "wgan_lp", "dragan", "r1_difference", "zero_gp"])
def test_a_flat_critic_leaves_no_nan(name):
    weight = torch.zeros(12, dtype=torch.float64, requires_grad=True)
    value = penalty(name, lambda x: x.flatten(1) @ weight)
    (gradient,) = torch.autograd.grad(value.sum(), weight)
    assert value.isfinite().all() and gradient.isfinite().all()


def shown(name: str) -> torch.Tensor:
    """Where a penalty looks, away from reals and fakes: the last images that D is shown."""
    seen = []

    def critic(x):
        seen.append(x.detach())
        return quadratic(x)

    penalty(name, critic)
    assert [len(x) for x in seen] == [16, 8]
    return seen[-1]


def test_points_between_and_near():
    real, fake = images(0), images(1)
    e = ((shown("wgan_gp") - fake) / (real - fake)).flatten(1)
    close(e, e[:, :1].expand_as(e), 1e-6)  # one weight per pair
    assert ((e > 0) & (e < 1)).all() and len(e[:, 0].unique()) == 8
    moved = shown("dragan") - real
    for group in (slice(0, 4), slice(4, 8)):  # half the standard deviation of the coupling group at most
        limit = real[group].std(correction=0) / 2
        assert limit / 2 < moved[group].abs().max() <= limit


# ---- Roth et al. 2017 -----------------------------------------------------------------------------------------------

F_ROWS = ["kl", "rkl", "pearson", "neyman", "hellinger2", "jeffrey", "js2", "gan", "jsw:pi=0.3", "alpha:alpha=0.5"]
F_ROWS += ["alpha:alpha=3", "alpha:alpha=-1"]


def as_objective(name: str, form: str) -> str:
    row, _, given = name.partition(":")
    return f"f:{row}:{given}{',' * bool(given)}form={form}"


@pytest.mark.parametrize("form", ["paper", "log_ratio"])
@pytest.mark.parametrize("name", F_ROWS)
def test_roth_weighs_by_the_second_derivative_of_the_conjugate(name, form):
    """f*''(T) |grad T|^2 with f*'' by autograd twice through f*, and grad T by autograd."""
    critic = lambda x: torch.tanh(linear(x) / 30) * 1.4  # noqa: E731
    row, x = divergence(name), images(1).requires_grad_()
    t = row.form(form).value(critic(x))
    (gradient,) = torch.autograd.grad(t.sum(), x)
    at = t.detach().requires_grad_()
    (first,) = torch.autograd.grad(row.conjugate(at).sum(), at, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), at)
    close(penalty("roth", critic, as_objective(name, form)), second * gradient.square().flatten(1).sum(1))


X = torch.linspace(-16, 17, 200_001, dtype=torch.float64).unsqueeze(1)  # one pixel
DENSITY_P = ((-X.square() / 2).exp() / math.sqrt(2 * math.pi)).squeeze(1)
DENSITY_Q = ((-((X - 0.5) / 1.2).square() / 2).exp() / math.sqrt(2 * math.pi) / 1.2).squeeze(1)


def log_ratio(x: torch.Tensor) -> torch.Tensor:
    """log p/q of P = N(0, 1), Q = N(0.5, 1.2^2): the best logit."""
    return (math.log(1.2) - x.square() / 2 + ((x - 0.5) / 1.2).square() / 2).squeeze(1)


def untangent(d: torch.Tensor, lower: bool = True, upper: bool = True) -> torch.Tensor:
    """The raw output whose extended exponentials are those of log ratio d."""
    over = (d.abs() - KNEE).clamp(min=0) * ((d < 0) & lower | (d > 0) & upper)
    return torch.where(over > 0, d.sign() * (KNEE + over.expm1()), d)


def omega(regularizer: str, objective: str, logits) -> float:
    """E of the row's penalty, reals from P and fakes from Q, by quadrature."""
    _, row = find_pair(objective, regularizer)
    total = 0.0
    for term, density in ((row.on_real, DENSITY_P), (row.on_fake, DENSITY_Q)):
        if term:
            x = X.clone().requires_grad_()
            total += torch.trapezoid(term(logits(x), x) * density, X.squeeze(1)).item()
    return total


OMEGA = {
    "kl": 0.21392746913580243,
    "rkl": 0.3844444444444445,
    "pearson": 0.3412767236084173,
    "neyman": 3.6101843254965846,
    "hellinger2": 0.13444986063067027,
    "jeffrey": 0.5983719135802468,
    "js2": 0.12410658775567038,
    "gan": 0.12410658775567038,
    "jsw:pi=0.3": 0.04846835108905044,
    "alpha:alpha=0.5": 0.26889972126134054,
    "alpha:alpha=3": 0.1636395659120291,
}
ONE_SIDED = {"kl": (False, True), "rkl": (True, False), "js2": (False, False), "gan": (False, False)}


@pytest.mark.parametrize("name", OMEGA)
def test_golden_values_of_roths_term_at_the_optimum(name):
    sides = (False, False) if "jsw" in name else ONE_SIDED.get(name, (True, True))
    value = omega("roth", as_objective(name, "log_ratio"), lambda x: untangent(log_ratio(x), *sides))
    assert value == pytest.approx(OMEGA[name], rel=1e-9)


def test_r1_and_r2_are_special_cases():
    """Reverse KL is R2 anywhere inside the knee; KL is R1, and Jeffrey R1 + R2, at the optimum."""
    r1, r2 = omega("r1", "f:gan", log_ratio), omega("r2", "f:gan", log_ratio)
    assert r1 == pytest.approx(0.2139274691358024, rel=1e-10) and r2 == pytest.approx(OMEGA["rkl"], rel=1e-10)
    assert omega("r1_r2", "f:gan", log_ratio) == pytest.approx(OMEGA["jeffrey"], rel=1e-10)
    anywhere = lambda x: torch.sin(linear(x)) * 2.9  # noqa: E731
    close(penalty("roth", anywhere, "f:rkl:form=log_ratio"), penalty("r2", anywhere))
    close(penalty("roth", anywhere, "f:rkl"), penalty("r2", anywhere))


def test_roths_general_and_logit_forms_agree_at_the_optimum_only():
    for scale, general, logit in (
        (1.0, 0.12410658775567038, 0.12410658775567038),
        (0.7, 0.06851018800182826, 0.06146205816867242),
    ):
        scaled = lambda x, scale=scale: scale * log_ratio(x)  # noqa: E731
        assert omega("roth", "f:gan", scaled) == pytest.approx(general, abs=1e-10)
        assert omega("roth_js", "f:gan", scaled) == pytest.approx(logit, abs=1e-10)


# ---- without double backward ----------------------------------------------------------------------------------------


class Once(torch.autograd.Function):
    """D(x) = a x^2, with a backward that cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return quadratic(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad.view(-1, 1, 1, 1) * 2 * A * x


@pytest.mark.parametrize("name", ["r1", "r2", "r1_r2"])
def test_stand_ins_need_no_second_derivative_and_are_close(name):
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    once = lambda x: Once.apply(x) * scale  # noqa: E731
    exact = penalty(name, quadratic)
    with pytest.raises(RuntimeError):  # no graph to go back through
        torch.autograd.grad(penalty(name, once).sum(), scale)
    ours = penalty(f"{name}_difference", once)
    torch.testing.assert_close(ours, exact, rtol=0.05, atol=0)
    torch.autograd.grad(ours.sum(), scale)
    expected = A.square().sum() * len(name.split("_"))
    close(penalty(f"{name}_difference", linear), expected.expand(8), 1e-9)  # exact for a linear D
    draws = Draws(0, range(5000), 4)
    many = images(0).repeat(2500, 1, 1, 1)
    result = critic_loss(*find_pair("nonsaturating", f"{name}_projection"), Critic(linear, draws), many, many.clone())
    mean = result.penalties[0].mean().item()
    assert mean == pytest.approx(expected.item(), rel=5 * math.sqrt(2 / 20_000))  # five standard errors of a chi-square


# ---- what else is done to D -----------------------------------------------------------------------------------------


def test_consistency_is_the_squared_change_of_d():
    x, y = images(0), images(1)
    tx, ty = (augment(z, DRAWS, f"consistency, {w}s of the D step") for z, w in ((x, "real"), (y, "fake")))
    expected = (quadratic(x) - quadratic(tx)) ** 2 + (quadratic(y) - quadratic(ty)) ** 2
    close(penalty("bcr", quadratic), expected)
    assert (penalty("bcr", lambda x: 0 * linear(x)) == 0).all() and (expected > 0).all()


def test_spectral_norm_bounds_every_weight():
    torch.manual_seed(0)
    net = nn.Sequential(Conv2d(3, 5, 3), nn.Flatten(), Linear(5 * 16, 7, activate=True), Linear(7, 1)).double()
    REGULARIZERS["spectral_norm"].make(objective=None).prepare(net)
    for _ in range(200):
        net(torch.randn(2, 3, 4, 4, dtype=torch.float64))
    for layer in (net[0], net[2], net[3]):
        assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=1e-6)
        assert layer.scale == 1


def test_spectral_norm_bounds_the_class_embedding_too():
    torch.manual_seed(0)
    D = ResNetDiscriminator((6, 4), classes=5)
    REGULARIZERS["spectral_norm"].make(objective=None).prepare(D)
    for _ in range(100):
        D(torch.randn(4, 3, 8, 8), 1, labels=torch.tensor([0, 1, 4, 2]))
    norms = {
        name: torch.linalg.matrix_norm(module.weight.flatten(1), 2).item()
        for name, module in D.named_modules()
        if parametrize.is_parametrized(module)
    }
    assert norms == pytest.approx(dict.fromkeys(norms, 1), abs=1e-3) and {"embedding", "logit"} <= norms.keys()


def test_clipping_bounds_weights_as_the_layers_compute_with_them():
    """A linear layer's output at the unit vectors is weight * scale + bias."""
    torch.manual_seed(0)
    layer = Linear(16, 8)
    torch.nn.init.normal_(layer.bias)
    before = layer(torch.eye(16)) - layer.bias, layer.bias.clone()
    REGULARIZERS["clip"].make(objective=None).constrain(layer, 0.1)
    after = layer(torch.eye(16)) - layer.bias, layer.bias
    for old, new in zip(before, after, strict=True):
        close(new, old.clamp(-0.1, 0.1), 1e-6)


@pytest.mark.parametrize("gamma,widths,remark", [
    (0.0, [], "no gradient through layers of at most 512 channels"),
    (0.001, [], "try regularizer.gamma=0.01"),
    (0.01, [48, 24], "try regularizer.gamma=0.03"),
    (1.0, [], "bounds next to nothing in layers of 512 channels"),
    (0.01, [], None),
    (0.03, [48, 24], None),
])  # fmt: skip
def test_clipping_at_what_trains_nothing_is_remarked_on(gamma, widths, remark):
    values = {"regularizer.name": "clip", "regularizer.gamma": gamma, "network.widths": widths}
    found = list(remarks(override(TrainConfig(), values)))
    assert len(found) == (remark is not None) and (remark or "") in "".join(found)


def test_gradients_vanish_where_that_is_remarked_on_and_pass_where_it_is_not():
    """At the images of a D of 48 channels that was just clipped."""
    slopes = []
    for gamma in (0.01, 0.03):
        torch.manual_seed(0)
        D, x = ResNetDiscriminator((48, 48, 24)), torch.randn(4, 3, 16, 16, requires_grad=True)
        REGULARIZERS["clip"].make(objective=None).constrain(D, gamma)
        slopes.append(torch.autograd.grad(D(x, 2).sum(), x)[0].norm().item())
    assert slopes[0] < 1e-6 and slopes[1] > 5e-5


def test_clipping_moves_weights_into_their_bounds_and_no_others():
    net = nn.Linear(2, 2)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[0.3, -2.0], [1.5, -0.4]]))
    REGULARIZERS["clip"].make(objective=None).constrain(net, 0.5)
    assert torch.equal(net.weight, torch.tensor([[0.3, -0.5], [0.5, -0.4]]))


def test_noise_is_standard_and_belongs_to_its_group():
    like = torch.zeros(400, 3, 4, 4)
    whole = Draws(3, range(100), 4).noise("n", like)
    assert whole.shape == like.shape and abs(whole.mean()) < 0.03 and abs(whole.std() - 1) < 0.03
    parts = [Draws(3, range(*r), 4).noise("n", like[: 4 * (r[1] - r[0])]) for r in ((0, 30), (30, 100))]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(whole, Draws(3, range(100), 4).noise("m", like))
    u = Draws(3, range(500), 4).uniform("u", 3)
    assert u.shape == (2000, 3) and u.min() >= 0 and u.max() < 1 and abs(u.mean() - 0.5) < 0.02


# ---- gamma ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side,expected", [(16, 10.24), (32, 40.96), (256, 2621.44)])
def test_automatic_gamma_grows_with_the_pixels(side, expected):
    assert gamma_at(0, RegularizerConfig(gamma="auto"), side * side, 1) == pytest.approx(expected)


@pytest.mark.parametrize(
    "decay,values",
    [
        ("constant", [0.05, 0.05, 0.05, 0.05]),
        ("cosine", [0.05, 0.05 * (0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2), 0.0275, 0.005]),
        ("exponential", [0.05, 0.05 * 0.1**0.25, 0.05 * math.sqrt(0.1), 0.005]),
    ],
)
def test_gamma_changes_and_then_stays(decay, values):
    config = RegularizerConfig(gamma=0.05, decay=decay, decay_to=0.1, decay_kimg=20_000)
    over_the_run = replace(config, decay_kimg=0)
    points = (0, 5_000_000, 10_000_000, 20_000_000)
    assert [gamma_at(n, config, 1, 1) for n in points] == pytest.approx(values)
    assert [gamma_at(n, over_the_run, 1, 20_000_000) for n in points] == pytest.approx(values)
    assert gamma_at(10**9, config, 1, 1) == pytest.approx(values[-1])


# ---- augmentation ---------------------------------------------------------------------------------------------------

STILL = torch.tensor([0.0, 0.5, 0.5, 0.5, -9.0, -9.0, 0.5, 0.5, 0.5], dtype=torch.float64)  # nothing happens


def changed(x: torch.Tensor, **values: float) -> torch.Tensor:
    names = ("flip", "down", "right", "zoom", "top", "left", "bright", "vivid", "contrast")
    u = STILL.clone()
    for name, value in values.items():
        u[names.index(name)] = value
    return change(x, u.expand(len(x), -1))


def test_each_augmentation_does_what_it_says():
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    close(changed(x), x)
    close(changed(x, flip=0.7), x.flip(3))
    close(changed(x, down=1.0), torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :, :8])  # an eighth of the side
    close(changed(x, right=0.0), torch.nn.functional.pad(x, (0, 1))[..., 1:])
    close(changed(x, bright=0.75), x + 0.25)
    gray = x.mean(1, keepdim=True)
    close(changed(x, vivid=0.0), gray.expand_as(x))
    mean = x.mean((1, 2, 3), keepdim=True)
    close(changed(x, contrast=0.0), mean + (x - mean) / 2)
    hole = changed(x, top=0.5, left=0.0)
    assert (hole[:, :, 2:6, :2] == 0).all()
    close(hole[:, :, :, 2:], x[:, :, :, 2:])
    close(hole[:, :, :2], x[:, :, :2])


def test_images_are_flipped_only_where_asked_for():
    """Without `flip` no image is; with it those are whose number is at least 1/2, and all else is the same."""
    x, draws = images(0, 400), Draws(0, range(100), 4)
    heads = draws.uniform("augmentation: a", 9)[:, 0] >= 0.5
    straight, flipped = augment(x, draws, "a"), augment(x, draws, "a", flip=True)
    assert 150 < heads.sum() < 250
    assert torch.equal(straight[~heads], flipped[~heads])
    assert not torch.isclose(straight[heads], flipped[heads]).flatten(1).all(1).any()
    close(augment(x.flip(3), draws, "a")[heads], flipped[heads])


def test_consistency_flips_where_the_data_are_mirrored():
    x, y = images(0), images(1)
    for mirror in (False, True):
        tx, ty = (augment(z, DRAWS, f"consistency, {w}s of the D step", mirror) for z, w in ((x, "real"), (y, "fake")))
        expected = (quadratic(x) - quadratic(tx)) ** 2 + (quadratic(y) - quadratic(ty)) ** 2
        bcr = find_pair("nonsaturating", "bcr")
        close(critic_loss(*bcr, Critic(quadratic, DRAWS, mirror=mirror), x, y).penalties[0], expected)


def test_zoom_and_translation_against_grid_sample():
    x = torch.randn(3, 2, 6, 10, dtype=torch.float64)
    scale, down, right = 1.2**0.6, (2 * 0.3 - 1) / 8, (2 * 0.9 - 1) / 8
    theta = torch.tensor([[1 / scale, 0, -2 * right / scale], [0, 1 / scale, -2 * down / scale]], dtype=torch.float64)
    grid = torch.nn.functional.affine_grid(theta.expand(3, 2, 3), x.shape, align_corners=False)
    expected = torch.nn.functional.grid_sample(x, grid, align_corners=False)
    close(changed(x, zoom=0.8, down=0.3, right=0.9), expected)


def test_gradients_of_any_order_pass_through():
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    u = torch.rand(2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda x: change(x, u), x)
    assert torch.autograd.gradgradcheck(lambda x: change(x, u).square(), x)
