"""The Dirac-GAN against golden trajectories, closed-form eigenvalues and step-size bounds, all made elsewhere."""

import math

import numpy as np
import pytest
import torch

from gan.errors import UserError
from gan.methods.regularizers import REGULARIZERS
from gan.theory.dirac import Game, eigenvalues, jacobian, losses, step_bound, step_matrix, trajectory

GAN, NS, WGAN = "f:gan:saturating=1", "nonsaturating", "wasserstein"
GAMES = {
    "gan": Game(),
    "nsgan": Game(NS),
    "wgan": Game(WGAN),
    "wgangp 1": Game(WGAN, "wgan_gp", 1.0),
    "wgangp 0.3": Game(WGAN, "wgan_gp:target=0.3", 0.25),
    "consensus": Game(consensus=1.0),
    "instance noise": Game(GAN, "instance_noise", 0.49),
    "r1 0.3": Game(GAN, "r1", 0.3),
    "r1 1": Game(GAN, "r1", 1.0),
    "r1ns": Game(NS, "r1", 0.3),
    "r1r2": Game(GAN, "r1_r2", 0.15),
    "roth": Game(GAN, "roth_js", 0.6),
}
# (theta, psi) after 100 and 5000 steps of 0.1 from (1, 1), simultaneous and alternating
GOLDEN = {
    "gan": [
        [(0.09918382912412, -1.54833144166), (2.772843907019, 2.339148169857)],
        [(0.4025691860342, -1.338842543335), (-0.7802753369606, 1.143278456282)],
    ],
    "nsgan": [
        [(0.7092586755771, -0.3782616726624), (0.3804619323644, -0.2304773697328)],
        [(0.6648523425385, -0.318323524952), (0.11725412434, -0.04295178730387)],
    ],
    "wgan": [
        [(-0.5603400541582, -2.257353911674), (-83370065642.84, 33741784566.86)],
        [(-0.316002913544, -1.357586940677), (-0.1584648117299, -1.377211990699)],
    ],
    "wgangp 1": [
        [(-1.48387489794, -0.272524961614), (-1.485360779821, -0.2733766824572)],
        [(-1.352551905018, 0.06517970458134), (-1.335003759024, -0.4586917761582)],
    ],
    "wgangp 0.3": [
        [(-0.2357182691363, -0.9604085665634), (-0.6343745725445, 0.006989650080226)],
        [(-0.1711106411451, -0.6408628901222), (0.1286264301875, 0.3717622568432)],
    ],
    "consensus": [
        [(0.03646953299227, -0.2076611958532), (-1.493709491269e-53, -1.718640444917e-52)],
        [(0.03158669431957, -0.1818131334856), (-3.313644107991e-56, 2.407162831087e-55)],
    ],
    "instance noise": [
        [(0.1745018862165, -0.3515843670541), (-1.139354240976e-16, 6.337582676074e-17)],
        [(0.1514066089139, -0.3073719053088), (-1.642237433497e-17, 8.950318416297e-17)],
    ],
    "r1 0.3": [
        [(0.06434919943535, -0.2498977148218), (-6.142827821746e-31, -2.51877511831e-31)],
        [(0.05118919839635, -0.2231465639913), (7.970697430694e-35, 9.765367231077e-34)],
    ],
    "r1 1": [
        [(0.02902106253399, 0.02405492891656), (9.204407995098e-110, 9.169506091159e-110)],
        [(0.03404404379041, 0.02600234480477), (4.956970668379e-89, 3.965576534703e-89)],
    ],
    "r1ns": [
        [(0.1762038490727, -0.09728042853603), (-3.680702265984e-31, -4.313024702424e-31)],
        [(0.1520054478342, -0.08867613851883), (-4.133338835801e-34, 5.292943759513e-34)],
    ],
    "r1r2": [
        [(0.06434919943535, -0.2498977148218), (-6.142827821746e-31, -2.51877511831e-31)],
        [(0.05118919839635, -0.2231465639913), (7.970697430694e-35, 9.765367231077e-34)],
    ],
    "roth": [
        [(0.1371922420668, -0.2655478735491), (5.806116193669e-23, -8.830798415478e-23)],
        [(0.1116458092889, -0.2327662737025), (2.502001816913e-23, -1.014669951441e-22)],
    ],
}


def check(game: Game, alternating: bool, golden: dict[int, tuple[float, float]]) -> None:
    for count, state in enumerate(trajectory(game, 0.1, max(golden), alternating), 1):
        if count in golden:
            scale = max(1.0, math.hypot(*golden[count]))  # one of them has grown to 1e11
            assert math.dist(state, golden[count]) < 1e-8 * scale, count


@pytest.mark.parametrize("alternating", [False, True], ids=["simultaneous", "alternating"])
@pytest.mark.parametrize("name", GAMES)
def test_golden_trajectories(name, alternating):
    check(GAMES[name], alternating, {100: GOLDEN[name][alternating][0]})


@pytest.mark.slow
@pytest.mark.parametrize(
    "name,alternating", [(n, False) for n in GAMES] + [(n, True) for n in ("nsgan", "wgan", "wgangp 0.3", "roth")]
)
def test_long_golden_trajectories(name, alternating):
    check(GAMES[name], alternating, dict(zip((100, 5000), GOLDEN[name][alternating], strict=True)))


def last(game: Game, alternating: bool, count: int = 500) -> tuple[float, float]:
    return list(trajectory(game, 0.1, count, alternating))[-1]


@pytest.mark.parametrize("alternating", [False, True])
def test_what_converges_in_500_steps_and_what_does_not(alternating):
    assert math.hypot(*last(Game(GAN, "r1", 1.0), alternating)) < 1e-6
    for name in ("gan", "nsgan", "wgan"):
        assert math.hypot(*last(GAMES[name], alternating)) > 0.1


def test_golden_points_of_500_simultaneous_steps():
    assert math.hypot(*last(Game(), False)) == pytest.approx(2.253579, abs=6e-7)
    assert last(Game(GAN, "r1", 0.3), False) == pytest.approx((0.000723, -0.000568), abs=6e-7)
    assert math.hypot(*last(Game(consensus=1.0), False)) == pytest.approx(1.4e-5, abs=6e-7)
    assert math.hypot(*last(Game(NS), False, 5000)) == pytest.approx(math.sqrt(0.2), rel=1e-2)


def pair(real: float, under: float) -> tuple[complex, complex]:
    """real +- sqrt(under)."""
    root = complex(under) ** 0.5
    return real + root, real - root


CLOSED = {
    "gan": (Game(), pair(0, -0.25)),
    "ns-gan": (Game(NS), pair(0, -0.25)),
    "relativistic": (Game("relativistic"), pair(0, -0.25)),
    "wgan": (Game(WGAN), pair(0, -1)),
    **{f"consensus {g}": (Game(consensus=g), pair(-g / 4, -0.25)) for g in (0.5, 1.0, 2.0)},
    **{
        f"noise {s}": (Game(GAN, "instance_noise", s * s), pair(-s * s / 4, s**4 / 16 - 0.25))
        for s in (0.5, 0.7, 1.0, 2.0)
    },
    **{
        f"{row} {g}": (Game(GAN, row, g), pair(-g / 2, g * g / 4 - 0.25))
        for row in ("r1", "r2", "zero_gp")
        for g in (0.1, 0.3, 1.0, 2.0, 10.0)
    },
    **{
        f"{row} {g}": (Game(GAN, row, g), pair(-g / 2, g * g / 4 - 0.25))
        for row in ("r1_difference", "r1_projection", "r2_difference", "r2_projection")
        for g in (0.1, 0.49, 2.0)
    },
    **{f"r1_r2 {g}": (Game(GAN, "r1_r2", g), pair(-g, g * g - 0.25)) for g in (0.1, 0.5, 1.0, 10.0)},
    **{f"roth {g}": (Game(GAN, "roth_js", g), pair(-g / 4, g * g / 16 - 0.25)) for g in (0.5, 2.0, 8.0)},
    **{f"wgan r1 {g}": (Game(WGAN, "r1", g), pair(-g / 2, g * g / 4 - 1)) for g in (0.5, 2.0, 10.0)},
}


@pytest.mark.parametrize("name", CLOSED)
def test_eigenvalues_in_closed_form(name):
    game, expected = CLOSED[name]
    ours = eigenvalues(jacobian(game))
    for a, b in zip(ours, expected, strict=True):
        assert abs(a - b) < 1e-8, (ours, expected)


def test_eigenvalues_are_numpys():
    matrix = np.random.RandomState(0).randn(2, 2)
    expected = sorted(np.linalg.eigvals(matrix).astype(complex), key=lambda z: (z.real, z.imag))
    assert sorted(eigenvalues(matrix), key=lambda z: (z.real, z.imag)) == pytest.approx(expected)
    assert abs(eigenvalues(jacobian(Game(GAN, "r1", 10.0)))[0] + 0.025063) < 6e-7  # over-damped is slow


def test_step_bounds():
    for g, simultaneous, alternating in (
        (0.1, 0.4, 3.619950248448356),
        (0.5, 2.0, 2.4721359549995796),
        (1.0, 4.0, 1.6568542494923806),
        (2.0, 1.0717967697244908, 0.9442719099991592),
        (10.0, 0.20050251573520178, 0.19950248448355978),
    ):
        game = Game(GAN, "r1", g)
        assert step_bound(game, alternating=False) == pytest.approx(simultaneous, rel=2e-7)
        assert step_bound(game, alternating=True) == pytest.approx(alternating, rel=1e-9)
    assert step_bound(Game(GAN, "r1", 0.1), True, n_critic=5) == pytest.approx(1.770296, abs=6e-7)
    assert step_bound(Game(GAN, "r1", 1.0), True, n_critic=5) == pytest.approx(1.907340, abs=6e-7)
    for g, simultaneous, alternating in ((1.0, 1.6, 2.6667), (2.0, 2.0, 2.0)):
        assert step_bound(Game(consensus=g), False) == pytest.approx(simultaneous, rel=1e-9)
        assert step_bound(Game(consensus=g), True) == pytest.approx(alternating, abs=5e-5)
    for g, simultaneous in ((1e-4, 4e-4), (1e4, 2e-4)):  # 2 |Re| / |.|^2, the smaller of both eigenvalues
        assert step_bound(Game(GAN, "r1", g), False) == pytest.approx(simultaneous, rel=1e-6)
    assert step_bound(Game(), False) == step_bound(Game(), True) == step_bound(Game(WGAN), True) == 0


def test_without_damping_nothing_contracts():
    for game, frequency, limit in ((Game(), 0.5, 4), (Game(WGAN), 1.0, 2)):
        for h in (0.1, 0.5, 1.0):
            radius = max(map(abs, eigenvalues(step_matrix(jacobian(game), h, False))))
            assert radius == pytest.approx(math.sqrt(1 + (frequency * h) ** 2), rel=1e-12)
        for h in (0.1, 1.0, 0.97 * limit):
            radius = max(map(abs, eigenvalues(step_matrix(jacobian(game), h, True))))
            assert radius == pytest.approx(1, abs=1e-7)
        assert max(map(abs, eigenvalues(step_matrix(jacobian(game), 1.05 * limit, True)))) > 1.2


@pytest.mark.parametrize("name", ["r1", "r2"])
def test_stand_ins_of_a_penalty_take_the_same_path(name):
    """For a linear D they are the penalty itself, at any state."""
    path = list(trajectory(Game(GAN, name, 0.49), count=50))
    for stand_in in (f"{name}_difference", f"{name}_projection"):
        other = list(trajectory(Game(GAN, stand_in, 0.49), count=50))
        assert np.abs(np.subtract(other, path)).max() < 1e-10


def test_noise_on_pairs_is_drawn_apart_for_real_and_fake():
    """E softplus(psi (x - y)), x and y with noise of variance s^2 each, is a mean over noise of variance 2 s^2."""
    s, theta, psi = 0.7, torch.tensor(0.4, dtype=torch.float64), torch.tensor(1.3, dtype=torch.float64)
    _, ours = losses(Game("relativistic", "instance_noise", s * s), theta, psi)
    x = torch.linspace(-12, 12, 100_001, dtype=torch.float64)
    density = (-x.square() / 2).exp() / math.sqrt(2 * math.pi)
    exact = torch.trapezoid(torch.nn.functional.softplus(-psi * (theta + math.sqrt(2) * s * x)) * density, x)
    assert ours.item() == pytest.approx(exact.item(), rel=1e-10)


@pytest.mark.parametrize("alternating", [False, True])
def test_clipping_holds_psi_in_its_bounds(alternating):
    """Of the WGAN, whose field is (-psi, theta), worked out step by step; it neither converges nor escapes."""
    theta, psi, h, c = 1.0, 1.0, 0.1, 0.49
    path = list(trajectory(Game(WGAN, "clip", c), h, 200, alternating))
    for state in path:
        moved = theta - h * psi
        psi = min(max(psi + h * (moved if alternating else theta), -c), c)
        theta = moved
        assert state == pytest.approx((theta, psi), abs=1e-12)
    assert {abs(psi) for _, psi in path} >= {c} and max(abs(theta) for theta, _ in path[100:]) > 0.1


@pytest.mark.parametrize("objective,regularizer,gamma,message", [
    ("energy", "none", 0.0, "objective.name=energy couples samples"),
    ("mmd", "none", 0.0, "couples samples"),
    (GAN, "bcr", 1.0, "regularizer.name=bcr changes pictures"),
    (GAN, "spectral_norm", 1.0, "regularizer.name=spectral_norm changes D's layers"),
    (GAN, "clip", 0.0, "give a positive gamma"),
])  # fmt: skip
def test_what_the_game_cannot_show_is_refused_in_one_line(objective, regularizer, gamma, message):
    with pytest.raises(UserError, match=message) as caught:
        jacobian(Game(objective, regularizer, gamma))
    assert "\n" not in str(caught.value)


def regularizers_without_effect() -> set[str]:
    """Rows that leave the field and the path of a game as they are without any."""
    plain = list(trajectory(Game(), count=20))
    silent = set()
    for name in REGULARIZERS:
        try:
            silent |= {name} if list(trajectory(Game(GAN, name, 0.49), count=20)) == plain else set()
        except UserError:
            continue
    return silent


def test_no_regularizer_is_ignored():
    assert regularizers_without_effect() == {"none", "drift"}  # D of the real point, 0, is 0 whatever D is
