"""Every row against a numerical supremum, autograd, quadrature and tables worked out elsewhere."""

import math

import pytest
import torch

from gan.errors import UserError
from gan.methods.divergences import DIVERGENCES, KNEE, Entry, divergence, from_generator, log_omega

ROWS = [n for n in DIVERGENCES if n not in ("jsw", "alpha")]
ROWS += ["jsw:pi=0.3", "jsw:pi=0.8", *(f"alpha:alpha={a}" for a in (-1, 0.5, 0.9, 1.5, 2, 3))]
SMOOTH = [name for name in ROWS if divergence(name).log_ratio]  # f' is no step
FORMS = [(name, form) for name in ROWS for form in ("paper", "log_ratio") if form == "paper" or name in SMOOTH]
U = torch.tensor([0.01, 0.2, 0.5, 0.9, 1.3, 2.0, 5.0, 60.0], dtype=torch.float64)
V = torch.tensor([-40.0, -9.0, -3.5, -1.7, -0.4, 0.3, 1.1, 2.9, 5.0, 30.0], dtype=torch.float64)


def close(ours, theirs, rtol=1e-10):
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=0)


def derivative(function, x: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(x).sum(), x, create_graph=True, allow_unused=True)
    return torch.zeros_like(x) if gradient is None else gradient.detach()


def supremum(row, t: float) -> float:
    """max over u of ut - f(u): the best of a grid in log u, then golden sections."""

    def value(x: torch.Tensor) -> torch.Tensor:
        return t * x.exp() - row.generator(x.exp())

    grid = torch.linspace(-34, 12, 4601, dtype=torch.float64)
    best = int(value(grid).argmax())
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, 4600)]
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(60):
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (a, high) if value(a) < value(b) else (low, b)
    return value(torch.stack([low, high, (low + high) / 2])).max().item()


@pytest.mark.parametrize("name", ROWS)
def test_conjugate_is_the_supremum_and_infinite_above_the_domain(name):
    row = divergence(name)
    t = row.derivative(U)
    t = torch.cat([t, t[0] - torch.tensor([0.5, 3.0], dtype=torch.float64)])  # below the knees of pearson and alpha = 3
    close(row.conjugate(t), torch.tensor([supremum(row, x) for x in t.tolist()], dtype=torch.float64))
    if row.domain < math.inf:
        assert row.conjugate(torch.tensor(row.domain + 0.05, dtype=torch.float64)) == math.inf
        assert divergence(name).derivative(torch.tensor(1e12, dtype=torch.float64)).item() <= row.domain
    else:
        assert row.conjugate(torch.tensor(20.0, dtype=torch.float64)).isfinite()


@pytest.mark.parametrize("name", SMOOTH)
def test_derivatives_thresholds_and_fenchel_young(name):
    row = divergence(name)
    close(row.derivative(U), derivative(row.generator, U))
    close(row.second(U), derivative(row.derivative, U))
    t = row.derivative(U)
    close(row.conjugate_derivative(t), U)
    close(row.conjugate_derivative(t), derivative(row.conjugate, t))
    assert row.threshold == pytest.approx(row.derivative(torch.ones((), dtype=torch.float64)).item(), abs=1e-15)
    gap = row.generator(U)[:, None] + row.conjugate(t)[None, :] - U[:, None] * t[None, :]
    scale = 1 + (U[:, None] * t[None, :]).abs()
    assert (gap / scale > -1e-13).all() and (gap.diagonal() / scale.diagonal()).abs().max() < 1e-13
    one = torch.ones((), dtype=torch.float64)
    assert row.generator(one).item() == pytest.approx(-math.log(4) if name == "gan" else 0, abs=1e-15)


@pytest.mark.parametrize("name,form_name", FORMS)
def test_forms_stay_conjugate_everywhere(name, form_name):
    """The extended exponentials included: it is the activation that changes, so the bound remains one."""
    row = divergence(name)
    form = row.form(form_name)
    t = form.value(V)
    if name in SMOOTH:
        assert (t <= row.domain).all()
    inside = V[(V.abs() < 20)]
    close(form.conjugate(inside), row.conjugate(form.value(inside)))
    slope = derivative(form.value, V)
    assert (slope >= 0).all()
    close(derivative(form.conjugate, inside), row.conjugate_derivative(form.value(inside)) * slope[V.abs() < 20])
    boundary = torch.tensor(form.boundary, dtype=torch.float64)
    assert form.value(boundary).item() == pytest.approx(row.threshold, abs=1e-12)
    if name in SMOOTH:
        curve = derivative(row.conjugate_derivative, form.value(inside)) * slope[V.abs() < 20].square()
        close(form.curvature(inside), curve)


@pytest.mark.parametrize("name,form_name", FORMS)
def test_finite_with_a_gradient_at_200_in_single_precision(name, form_name):
    """Where the opponent wins: a real called fake, a fake called real; and the generator's T at a fake called fake."""
    form = divergence(name).form(form_name)
    v = torch.tensor([-200.0, 200.0])
    assert form.value(v).isfinite().all() and form.conjugate(v).isfinite().all() and form.curvature(v).isfinite().all()
    t, c = derivative(form.value, v), derivative(form.conjugate, v)
    assert t.isfinite().all() and c.isfinite().all() and t[0] > 0 and c[1] > 0
    x = v.clone().requires_grad_()  # and a second time, as gradient penalties do
    (first,) = torch.autograd.grad((form.conjugate(x) - form.value(x)).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum() + 0 * x.sum(), x)
    assert second.isfinite().all()


D = torch.tensor([-2.0, -0.7, 0.0, 0.4, 2.5], dtype=torch.float64)
WEIGHTS = {  # saturating, alternative, in the density ratio u; m = 1 - pi + pi u
    "kl": (lambda u: u, lambda u: u**0),
    "rkl": (lambda u: u**0, lambda u: 1 / u),
    "pearson": (lambda u: 2 * u**2, lambda u: 2 * u),
    "neyman": (lambda u: 2 / u, lambda u: 2 / u**2),
    "hellinger2": (lambda u: u**0.5 / 2, lambda u: u**-0.5 / 2),
    "jeffrey": (lambda u: 1 + u, lambda u: 1 + 1 / u),
    "js2": (lambda u: u / (1 + u), lambda u: 1 / (1 + u)),
    "gan": (lambda u: u / (1 + u), lambda u: 1 / (1 + u)),
    "jsw:pi=0.3": (lambda u: 0.21 * u / (0.7 + 0.3 * u), lambda u: 0.21 / (0.7 + 0.3 * u)),
    "alpha:alpha=1.5": (lambda u: u**1.5, lambda u: u**0.5),
    "alpha:alpha=-1": (lambda u: 1 / u, lambda u: u**-2),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_of_the_generators_gradient_in_the_log_ratio_form(name):
    form, u = divergence(name).form("log_ratio"), D.exp()
    saturating, alternative = WEIGHTS[name]
    close(derivative(form.conjugate, D), saturating(u))
    close(derivative(form.value, D), alternative(u))
    close(form.curvature(D), saturating(u))  # Roth's term is E_Q[u^2 f''(u) |grad log u|^2]


P, Q = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.1, 0.25, 0.25, 0.4]], dtype=torch.float64)
CATEGORICAL = {  # D(P||Q), D(Q||P), T*, f*(T*)
    "tv": (0.45, 0.45, [0.5, 0.5, -0.5, -0.5], [0.5, 0.5, -0.5, -0.5]),
    "kl": (
        0.6788195026063463,
        0.7529588421715334,
        [2.609437912, 1.182321557, 0.489174376, -1.079441542],
        [5.0, 1.2, 0.6, 0.125],
    ),
    "rkl": (
        0.7529588421715334,
        0.6788195026063462,
        [-0.2, -0.833333333, -1.666666667, -8.0],
        [0.609437912, -0.817678443, -1.510825624, -3.079441542],
    ),
    "pearson": (1.95625, 2.845, [8.0, 0.4, -0.8, -1.75], [24.0, 0.44, -0.64, -0.984375]),
    "neyman": (2.845, 1.95625, [0.96, 0.305555556, -1.777777778, -63.0], [1.6, 0.333333333, -1.333333333, -14.0]),
    "hellinger2": (
        0.33492279989951534,
        0.33492279989951534,
        [0.552786405, 0.087129071, -0.290994449, -1.828427125],
        [1.236067977, 0.095445115, -0.225403331, -0.646446609],
    ),
    "jeffrey": (
        1.4317783447778796,
        1.4317783447778796,
        [2.409437912, 0.348988223, -1.17749229, -9.079441542],
        [5.609437912, 0.382321557, -0.910825624, -2.954441542],
    ),
    "js2": (
        0.31540281624538835,
        0.31540281624538824,
        [0.510825624, 0.087011377, -0.287682072, -1.504077397],
        [1.098612289, 0.09531018, -0.223143551, -0.575364145],
    ),
    "js": (0.15770140812269423, 0.15770140812269423, None, None),
    "jsw:pi=0.3": (
        0.1326916238576933,
        0.13660703541454847,
        [0.246294166, 0.037215795, -0.114897676, -0.532485705],
        [0.551920152, 0.040788236, -0.08948336, -0.213142434],
    ),
    "gan": (
        -1.0708915448745024,
        -1.0708915448745024,
        [-0.182321557, -0.606135804, -0.980829253, -2.197224577],
        [1.791759469, 0.78845736, 0.470003629, 0.117783036],
    ),
    "alpha:alpha=-1": (
        1.4225,
        0.978125,
        [0.48, 0.152777778, -0.888888889, -31.5],
        [0.8, 0.166666667, -0.666666667, -7.0],
    ),
    "alpha:alpha=0.5": (
        0.6698455997990306,
        0.6698455997990305,
        [1.105572809, 0.174258142, -0.581988897, -3.656854249],
        [2.472135955, 0.19089023, -0.450806662, -1.292893219],
    ),
    "alpha:alpha=2": (0.978125, 1.4225, [4.0, 0.2, -0.4, -0.875], [12.0, 0.22, -0.32, -0.4921875]),
    "alpha:alpha=3": (
        1.9977968750000004,
        4.245342592592594,
        [12.0, 0.22, -0.32, -0.4921875],
        [41.333333333, 0.242666667, -0.261333333, -0.332682292],
    ),
}


@pytest.mark.parametrize("name", CATEGORICAL)
def test_golden_categorical(name):
    row = divergence(name)
    forward, backward, t_star, conjugate = CATEGORICAL[name]
    assert (Q * row.generator(P / Q)).sum().item() == pytest.approx(forward, rel=1e-13)
    assert (P * row.generator(Q / P)).sum().item() == pytest.approx(backward, rel=1e-13)
    t = row.derivative(P / Q)
    assert (P * t - Q * row.conjugate(t)).sum().item() == pytest.approx(forward, rel=1e-12)  # the bound is tight
    if t_star:
        assert t.tolist() == pytest.approx(t_star, rel=0, abs=6e-10)  # nine decimals are printed
        assert row.conjugate(t).tolist() == pytest.approx(conjugate, rel=0, abs=6e-10)


GAUSSIANS = {  # P = N(0, 1), Q = N(0.5, 1.2^2)
    "tv": 0.1929884955562876,
    "kl": 0.11634933457173245,
    "rkl": 0.16267844320604527,
    "pearson": 0.19959733770490518,
    "neyman": 0.740228214285005,
    "hellinger2": 0.06662384942922417,
    "jeffrey": 0.2790277777777777,
    "js2": 0.06419378394921875,
    "jsw:pi=0.3": 0.025725183354383216,
    "gan": -1.3221005771706718,
    "alpha:alpha=-1": 0.3701141071425025,
    "alpha:alpha=0.5": 0.13324769885844834,
    "alpha:alpha=2": 0.09979866885245259,
    "alpha:alpha=3": 0.09457678808049741,
}


@pytest.mark.parametrize("name", GAUSSIANS)
def test_golden_gaussian_pair_by_quadrature(name):
    x = torch.linspace(-14, 14, 400_001, dtype=torch.float64)
    p = (-x.square() / 2).exp() / math.sqrt(2 * math.pi)
    q = (-((x - 0.5) / 1.2).square() / 2).exp() / math.sqrt(2 * math.pi) / 1.2
    value = torch.trapezoid(q * divergence(name).generator(p / q), x).item()
    assert value == pytest.approx(GAUSSIANS[name], rel=1e-7 if name == "tv" else 1e-11)  # tv has a kink


def test_identities_between_rows():
    def f(name: str) -> torch.Tensor:
        return divergence(name).generator(U)

    close(f("js2"), 2 * f("jsw:pi=0.5"))
    close(f("js2"), 2 * f("js"))
    close((Q * divergence("gan").generator(P / Q)).sum(), (Q * divergence("js2").generator(P / Q)).sum() - math.log(4))
    close(f("alpha:alpha=2"), f("pearson") / 2)
    close(f("alpha:alpha=-1"), f("neyman") / 2)
    close(f("alpha:alpha=0.5"), 2 * f("hellinger2"))
    close(f("jeffrey"), f("kl") + f("rkl"))
    close(f("alpha:alpha=1.02"), f("kl") - (U - 1), 0.08)
    close(f("alpha:alpha=0.02"), f("rkl") + U - 1, 0.08)


def test_clamped_conjugates_do_not_turn_down():
    t = torch.tensor([-4.0], dtype=torch.float64)
    assert divergence("pearson").conjugate(t) == -1  # the table of the f-GAN paper gives 0
    for name in ("pearson", "alpha:alpha=3", "alpha:alpha=1.5"):
        assert derivative(divergence(name).conjugate, t) == 0
        assert derivative(divergence(name).paper.conjugate, t) == 0


def test_the_boundary_between_real_and_fake_is_not_always_at_output_zero():
    """Boundaries of the paper's own activations for jsw and alpha, which are not affine in log u, and of ours."""
    boundary = -math.log(0.5**-0.5 - 1)
    assert boundary == pytest.approx(0.8814, abs=5e-5)
    value = -0.5 * math.log(0.5) - math.log1p(math.exp(-boundary))
    assert value == pytest.approx(divergence("jsw:pi=0.5").threshold, abs=1e-12)
    boundary = -math.log(math.exp(2) - 1)
    assert boundary == pytest.approx(-1.8546, abs=5e-5)
    assert 2 - math.log1p(math.exp(-boundary)) == pytest.approx(divergence("alpha:alpha=0.5").threshold, abs=1e-12)
    assert divergence("kl").paper.boundary == 1
    assert divergence("jsw:pi=0.3").paper.boundary == pytest.approx(math.log(0.3 / 0.7))


def test_log_omega_and_its_derivatives():
    z = torch.tensor([-300.0, -30.0, -1.0, 0.0, 0.9, 1.0, 1.1, 3.0, 50.0, 1e6], dtype=torch.float64)
    x = log_omega(z)
    assert (x + x.exp()).tolist() == pytest.approx(z.tolist(), rel=1e-14, abs=1e-14)
    z = z[1:-1].requires_grad_()
    assert torch.autograd.gradcheck(log_omega, z) and torch.autograd.gradgradcheck(log_omega, z)
    assert log_omega(torch.tensor([-200.0, 200.0])).isfinite().all()


@pytest.mark.parametrize("name", ["kl", "pearson", "hellinger2", "jeffrey", "js2", "alpha:alpha=-1"])
def test_a_row_from_f_alone_agrees_with_the_closed_one(name):
    row = divergence(name)
    ours, t = from_generator(row.generator), row.derivative(U)
    close(ours.derivative(U), t)
    close(ours.conjugate(t), row.conjugate(t), 1e-8)
    close(derivative(ours.conjugate, t), U, 1e-6)
    assert ours.domain == pytest.approx(row.domain, abs=1e-6) and ours.threshold == pytest.approx(row.threshold)
    for part in ("value", "conjugate", "curvature"):
        close(getattr(ours.log_ratio, part)(D), getattr(row.log_ratio, part)(D), 1e-8)


def test_registering_a_new_row(monkeypatch):
    entry = Entry("triangular discrimination", lambda: from_generator(lambda u: (u - 1) ** 2 / (u + 1)))
    monkeypatch.setitem(DIVERGENCES, "triangular", entry)
    row, t = divergence("triangular"), torch.tensor([-2.0, 0.3, 0.9], dtype=torch.float64)
    close(row.conjugate(t), 4 - t - 4 * (1 - t).sqrt(), 1e-9)  # between f'(0) = -3 and 1
    assert row.domain == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    "text,message",
    [
        ("kll", "did you mean kl"),
        ("jsw:pi=1.5", "pi must be between 0 and 1, got 1.5"),
        ("jsw:po=0.5", "no parameter po; did you mean pi"),
        ("jsw:pi=x", "wants a number"),
        ("alpha:alpha=1", r"0.02 away from 0 \(rkl\) and 1 \(kl\)"),
        ("alpha:alpha=nan", "alpha wants a number, got nan"),
        ("kl:pi=0.3", "kl takes none"),
    ],
)
def test_unknown_names_and_forms_are_errors_of_one_line(text, message):
    with pytest.raises(UserError, match=message):
        divergence(text)
    with pytest.raises(UserError, match="there is paper"):
        divergence("tv").form("log_ratio")


def test_the_knee_is_outside_of_what_the_tables_cover():
    assert D.abs().max() <= KNEE
