"""Exact parameters against a table made by another optimizer and quadrature, and a training run against them."""

import json
import math

import pytest
import torch
from test_benchmark import saddle

from gan.errors import UserError
from gan.methods.divergences import DIVERGENCES, divergence, from_generator
from gan.methods.objectives import OBJECTIVES
from gan.methods.pairs import find_pair
from gan.methods.rows import Entry
from gan.theory.clusters import POINTS, SPREAD, describe, train_points
from gan.theory.gaussian import Mixture, exact_divergence, learned, log_normal, nodes, optima

PAPER = Mixture((0.33, 0.67), (-1.0, 2.0), (0.065, 2.0))
EXACT = {  # D, mean and deviation at the global minimum
    "tv": (0.23961579, 1.338217, 1.878857),
    "kl": (0.28305175, 1.01, 1.830669),
    "rkl": (0.24820993, 1.578105, 1.631174),
    "pearson": (0.64577986, 0.573663, 1.927313),
    "neyman": (0.40518013, 1.824794, 1.518568),
    "hellinger2": (0.13467817, 1.312939, 1.732648),
    "jeffrey": (0.57080723, 1.32163, 1.70292),
    "js2": (0.12807854, 1.306847, 1.753974),
    "jsw:pi=0.3": (0.05541835, 1.198327, 1.78804),
    "gan": (-1.25821582, 1.306847, 1.753974),
    "alpha:alpha=-1": (0.20259007, 1.824794, 1.518568),
    "alpha:alpha=3": (0.41911033, 0.350782, 1.954273),
}
SECOND = {
    "rkl": (0.990113, -0.955043, 0.316856),
    "neyman": (1.736732, -0.973174, 0.290585),
    "alpha:alpha=-1": (0.868366, -0.973174, 0.290585),
}


@pytest.mark.parametrize("name", EXACT)
def test_golden_optima(name):
    best, *others = optima(divergence(name), PAPER)
    assert best.divergence == pytest.approx(EXACT[name][0], abs=6e-9)
    assert (best.mean, best.deviation) == pytest.approx(EXACT[name][1:], abs=1e-6)
    found = [(o.divergence, o.mean, o.deviation) for o in others]
    assert found == ([pytest.approx(SECOND[name], abs=2e-6)] if name in SECOND else [])


CROSS = {  # trained for the row, measured in each of the columns
    "kl": (0.283052, 0.350242, 0.134647, 0.633293, 0.737844),
    "rkl": (0.3581, 0.24821, 0.135918, 0.60631, 1.432734),
    "js2": (0.299258, 0.274478, 0.128079, 0.573736, 0.953431),
    "jeffrey": (0.30529, 0.265517, 0.128557, 0.570807, 1.000641),
    "pearson": (0.311238, 0.558046, 0.164846, 0.869284, 0.64578),
}


@pytest.mark.parametrize("name", CROSS)
def test_golden_cross_table(name):
    at = torch.tensor([EXACT[name][1], math.log(EXACT[name][2])], dtype=torch.float64)
    row = [exact_divergence(divergence(column), PAPER, *at).item() for column in CROSS]
    assert row == pytest.approx(CROSS[name], abs=3e-6)
    assert row[3] == pytest.approx(row[0] + row[1], rel=1e-12)  # Jeffrey is the sum, in every row


def test_densities_that_no_generator_can_compare_make_no_minima():
    narrow = Mixture((0.5, 0.5), (-3.0, 3.0), (0.01, 0.01))
    best, *others = optima(divergence("kl"), narrow)  # its only stationary point
    assert (best.mean, best.deviation) == pytest.approx(narrow.moments, abs=1e-6) and not others


def test_kl_matches_moments_and_other_mixtures_work():
    mixture = Mixture((2.0, 1.0, 1.0), (0.0, 3.0, -2.0), (1.0, 0.3, 0.5))
    best = optima(divergence("kl"), mixture)[0]
    assert (best.mean, best.deviation) == pytest.approx(mixture.moments, abs=1e-7)
    assert PAPER.moments == pytest.approx((1.01, math.sqrt(3.351350)))
    one = optima(divergence("rkl"), Mixture((1.0,), (0.4,), (2.25,)))
    assert len(one) == 1 and one[0].divergence == pytest.approx(0, abs=1e-12)
    assert (one[0].mean, one[0].deviation) == pytest.approx((0.4, 1.5), abs=1e-6)


def test_a_short_training_run_leaves_the_moments_of_the_mixture_for_the_optimum():
    found = learned("f:rkl:form=log_ratio,saturating=1", PAPER, steps=300, batch=256, lr=1e-2)
    bound, mean, deviation = EXACT["rkl"]
    assert abs(found.mean - mean) < 0.25 < 0.5 < abs(PAPER.moments[0] - mean)
    assert abs(found.deviation - deviation) < 0.1 < 0.15 < abs(PAPER.moments[1] - deviation)
    assert found.divergence == pytest.approx(bound, abs=0.02)


def best_output(form, t: torch.Tensor) -> torch.Tensor:
    """The raw output v at which T(v) = t, by bisection; its gradient is that of the inverse function."""
    low, high = torch.full_like(t, -1e25), torch.full_like(t, 1e25)
    for _ in range(150):
        middle = (low + high) / 2
        below = form.value(middle) < t
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    v = low.detach().requires_grad_()
    (slope,) = torch.autograd.grad(form.value(v).sum(), v)
    return v.detach() + (t - t.detach()) / slope


@pytest.mark.parametrize("form_name", ["paper", "log_ratio"])
@pytest.mark.parametrize("name", [name for name in EXACT if name != "tv"])
def test_against_the_best_critic_the_game_is_the_divergence(name, form_name):
    """The loss of D is -D_f, and the gradient of G's that of D_f, by quadrature: no row can have a sign wrong."""
    row, (head, _, given) = divergence(name), name.partition(":")
    objective, _ = find_pair(f"f:{head}:{given}{',' * bool(given)}form={form_name},saturating=1", "none")
    at = torch.tensor([0.4, math.log(1.4)], dtype=torch.float64)
    free = at.clone().requires_grad_()
    exact = exact_divergence(row, PAPER, free[0], free[1])
    x, weight = nodes(PAPER, 0.4, 1.4)

    def log_ratio(x):
        return PAPER.log_density(x) - log_normal(x, *at)

    p, q = PAPER.log_density(x).exp() * weight, log_normal(x, *at).exp() * weight
    seen = (log_ratio(x).abs() < 25) & (p + q > 1e-20)
    x, p, q = x[seen], p[seen], q[seen]
    v = best_output(row.form(form_name), row.derivative(log_ratio(x).exp()))
    zero = torch.zeros_like(v)
    loss = p @ objective.discriminator(v, zero) + q @ objective.discriminator(zero, v)
    assert -(loss - objective.discriminator(zero, zero)[0]).item() == pytest.approx(exact.item(), rel=1e-6)
    moved = free[0] + free[1].exp() * (x - at[0]) / at[1].exp()
    v = best_output(row.form(form_name), row.derivative(log_ratio(moved).exp()))
    ours, theirs = (torch.autograd.grad(value, free)[0] for value in (q @ objective.generator(zero, v), exact))
    assert ours.tolist() == pytest.approx(theirs.tolist(), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name,form,steps", [("tv", "paper", 4000), ("js2", "log_ratio", 2500)])
def test_training_reaches_the_exact_parameters(name, form, steps):
    found = learned(f"f:{name}:form={form},saturating=1", PAPER, steps=steps, batch=512)
    bound, mean, deviation = EXACT[name]
    assert abs(found.mean - mean) < 0.05 and abs(found.deviation - deviation) < 0.05
    assert abs(found.divergence - bound) < 0.005


def test_clusters_are_counted():
    ring = POINTS["ring"]
    generator = torch.Generator().manual_seed(0)
    pick = torch.arange(2500) % 8
    exact = torch.from_numpy(ring)[pick] + SPREAD * torch.randn(2500, 2, generator=generator, dtype=torch.float64)
    row = describe(exact.numpy(), ring)
    assert row["modes"] == 8 and row["near"] == pytest.approx(0.98889, abs=0.01) and row["mode_kl"] < 1e-3
    half = describe(exact[pick < 4].numpy(), ring)
    assert half["modes"] == 4 and half["mode_kl"] == pytest.approx(math.log(2), abs=1e-5)
    assert describe(exact.numpy() * math.nan, ring)["modes"] == 0


def test_a_gan_learns_clusters():
    """At first no sample is near any; a few steps show that every kind of row runs here too."""
    row = train_points("nonsaturating", "r1", 0.1, POINTS["ring"], seed=0, steps=250)
    assert row["modes"] >= 6 and row["mode_kl"] < 0.5 and row["near"] > 0.15
    for names in (
        ("energy", "none"),
        ("mmd", "wgan_gp"),
        ("relativistic_average", "instance_noise"),
        ("hinge", "clip"),
    ):
        assert math.isfinite(train_points(*names, 0.1, POINTS["ring"], seed=0, steps=4)["near"])


def test_a_penalty_on_a_share_of_the_points_changes_d_by_its_weight_alone():
    def largest(gamma: float, **when) -> float:
        return train_points("relativistic", "r1_r2", gamma, POINTS["ring"], seed=0, steps=6, **when)["largest"]

    assert largest(0.0, share=0.25, every=2) == pytest.approx(largest(0.0), rel=1e-5)
    assert largest(1.0, share=0.25) != pytest.approx(largest(1.0), rel=1e-3)


def test_the_command_prints_the_exact_table(monkeypatch, tmp_path, capsys):
    path = tmp_path / "rows.json"
    flags = ["--mixture=1,0,1;1,4,0.25", "--divergences=kl,jsw:pi=0.3", f"--json={path}"]
    assert saddle(monkeypatch, "divergences", "--exact", *flags) == 0
    rows = json.loads(path.read_text())
    assert [row["divergence"] for row in rows] == ["kl", "jsw:pi=0.3"]
    assert rows[0]["mean"] == pytest.approx(2, abs=1e-6) and "jsw:pi=0.3" in capsys.readouterr().out
    few = ["--seeds=2", "--seed=3", "--steps=8", f"--json={path}"]
    assert saddle(monkeypatch, "divergences", "--points=ring", "--divergences=kl", *few) == 0
    rows = json.loads(path.read_text())
    assert [row["seed"] for row in rows] == [3, 4] and rows[0]["modes"] in range(9)
    assert saddle(monkeypatch, "divergences", "--divergences=tv,jsw:pi=0.3", *few) == 0  # tv has the paper's form alone
    rows = json.loads(path.read_text())
    assert [(row["divergence"], row["seed"]) for row in rows] == [(n, s) for n in ("tv", "jsw:pi=0.3") for s in (3, 4)]
    assert rows[0]["learned mean"] != rows[1]["learned mean"] == pytest.approx(1.01, abs=0.1)


def test_a_divergence_is_one_row(monkeypatch, tmp_path, capsys):
    """Added to the table and nowhere else, it is in the command's help and in what it computes by default."""
    entry = Entry("triangular discrimination", lambda: from_generator(lambda u: (u - 1) ** 2 / (u + 1)))
    monkeypatch.setattr("gan.methods.divergences.DIVERGENCES", {"kl": DIVERGENCES["kl"], "triangular": entry})
    assert saddle(monkeypatch, "divergences", "--help") == 0
    text = capsys.readouterr().out
    assert "triangular discrimination" in text and "Kullback-Leibler" in text and "Hellinger" not in text
    flags = ["--exact", "--mixture=1,0,1;1,1,1", f"--json={tmp_path / 'rows.json'}"]
    assert saddle(monkeypatch, "divergences", *flags) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["divergence"] for row in rows] == ["kl", "triangular"]


def test_every_divergence_has_its_objective():
    assert [name for name in OBJECTIVES if name.startswith("f:")] == [f"f:{name}" for name in DIVERGENCES]


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--mixture=1,0"], "write"),
        (["--mixture=1,0,-1"], "positive variance"),
        (["--mixture=0,0,1"], "positive weight"),
        (["--mixture="], "write"),
        (["--divergences=kll"], "did you mean kl"),
        (["--divergences=jsw:pi=3"], "pi must be"),
        (["--divergences=tv", "--form=log_ratio", "--steps=9"], "no form log_ratio"),
        (["--points=rings"], "rings"),
        (["--regularizer=bcr"], "changes pictures"),
        (["--regularizer=bcr", "--points=ring"], "changes pictures"),
        (["--regularizer=clip"], "is no penalty"),
        (["--regularizer=instance_noise"], "is no penalty"),
        (["--regularizer=spectral_norm"], "is no penalty"),
        (["--regularizer=r3"], "did you mean"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capsys, arguments, message):
    assert saddle(monkeypatch, "divergences", *arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


def test_mixtures_that_cannot_be():
    with pytest.raises(UserError):
        Mixture((1.0,), (math.inf,), (1.0,))
