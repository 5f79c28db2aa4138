"""Adaptive augmentation: how often each kind of change happens, and how its strength follows D's verdicts.

What the changes themselves do is in tests/test_regularizers.py.
"""

import pytest
import torch

from gan.config import TrainConfig, override
from gan.draws import Draws
from gan.errors import UserError
from gan.methods.augment import AUGMENTATIONS, KINDS, MOST, adapt, augment, augment_some, change
from gan.methods.critic import Critic
from gan.methods.objectives import OBJECTIVES
from gan.methods.pairs import configured, critic_loss, find_pair

MANY = Draws(0, range(1000), 4)  # 4000 images
NUMBERS = {"flips": [0], "moves": [1, 2, 3], "colors": [6, 7, 8], "cuts": [4, 5]}  # that each kind is made of
STILL = torch.tensor([0.0, 0.5, 0.5, 0.5, -9.0, -9.0, 0.5, 0.5, 0.5], dtype=torch.float64)  # nothing happens


def images(count: int, side: int = 6) -> torch.Tensor:
    return torch.randn(count, 2, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def ada(**values) -> TrainConfig:
    return override(TrainConfig(), {"data.aug": "ada"} | {f"data.aug_{key}": value for key, value in values.items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_strength_0_no_bit_of_an_image_changes_and_at_1_all_changes_happen(dtype):
    x = images(4000).to(dtype)
    assert torch.equal(augment_some(x, MANY, "a", True, torch.zeros((), dtype=dtype)), x)
    for flip in (False, True):
        everything = augment_some(x, MANY, "a", flip, torch.ones((), dtype=dtype))
        torch.testing.assert_close(everything, augment(x, MANY, "a", flip))


@pytest.mark.parametrize("strength", [0.1, 0.5, 0.8])
def test_each_kind_of_change_happens_to_a_share_of_the_images_independently(strength):
    """Every image is compared with what each of the 16 sets of kinds makes of it; exactly one is what it became."""
    x = images(4000)
    became = augment_some(x, MANY, "a", True, strength)
    u = MANY.uniform("augmentation: a", 9).double()
    matches = []
    for bits in range(2**KINDS):
        chosen = [name for i, name in enumerate(NUMBERS) if bits >> i & 1]
        numbers = STILL.repeat(4000, 1)
        for name in chosen:
            numbers[:, NUMBERS[name]] = u[:, NUMBERS[name]]
        same = torch.isclose(change(x, numbers), became, atol=1e-9).flatten(1).all(1)
        matches.append(same & ((u[:, 0] >= 0.5) | ("flips" not in chosen)))  # a flip that tails call off is none
    found = torch.stack(matches)
    assert (found.sum(0) == 1).all()
    kinds = torch.stack([found[[bits for bits in range(16) if bits >> i & 1]].any(0) for i in range(KINDS)]).double()
    heads = (u[:, 0] >= 0.5).double().mean()
    wanted = torch.tensor([strength * heads, strength, strength, strength], dtype=torch.float64)
    deviation = (wanted * (1 - wanted) / 4000).sqrt()
    assert ((kinds.mean(1) - wanted).abs() < 4 * deviation).all()
    assert (torch.corrcoef(kinds) - torch.eye(KINDS)).abs().max() < 4 / 4000**0.5


def test_without_mirror_no_image_is_flipped():
    x = images(400)
    draws = Draws(0, range(100), 4)
    straight = augment_some(x, draws, "a", False, 0.7)
    flipped = augment_some(x, draws, "a", True, 0.7)
    differ = ~torch.isclose(straight, flipped).flatten(1).all(1)
    assert 90 < differ.sum() < 190  # .35 of them


def test_gradients_of_any_order_pass_through_what_is_selected():
    x = images(4, 3).requires_grad_()
    u = torch.rand(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    happens = torch.eye(4, dtype=torch.bool) | (torch.arange(4) == 1).view(4, 1)
    assert torch.autograd.gradcheck(lambda x: change(x, u, happens), x)
    assert torch.autograd.gradgradcheck(lambda x: change(x, u, happens).square(), x)


def strengths(verdicts: list[float], config: TrainConfig) -> list[tuple[float, float]]:
    """The strength and the average after each verdict, in plain numbers."""
    pace = config.batch / 1000 / config.data.aug_kimg
    kept = 0.5 ** (1000 * pace)  # half is forgotten while the strength moves by a thousandth
    strength = average = 0.0
    rows = []
    for verdict in verdicts:
        average = kept * average + (1 - kept) * verdict
        strength += pace if average > config.data.aug_target else -pace if average < config.data.aug_target else 0.0
        strength = min(max(strength, 0.0), 0.8)
        rows.append((strength, average))
    return rows


@pytest.mark.parametrize("kimg", [500, 20, 0.5])
def test_the_strength_moves_at_a_fixed_speed_toward_the_target_and_stays_in_bounds(kimg):
    config = ada(kimg=kimg, target=0.55)
    verdicts = [1.0] * 300 + [0.0] * 40 + [0.55] * 5 + [0.6, 0.5] * 30 + [-1.0] * 300
    state = torch.zeros(2, dtype=torch.float64)
    for verdict, row in zip(verdicts, strengths(verdicts, config), strict=True):
        adapt(state, torch.tensor(verdict, dtype=torch.float64), config)
        assert state.tolist() == pytest.approx(row, rel=1e-9, abs=1e-12)
    climb = strengths(verdicts, config)[299][0]
    assert climb == pytest.approx(min(300 * 32 / (1000 * kimg), MOST), rel=0.1)  # 32 images a step; the average lags
    assert state[0] == 0


@pytest.mark.parametrize("name", ["none", "diff"])
def test_what_is_not_adaptive_stays(name):
    state = torch.tensor([AUGMENTATIONS[name].strength, 0.0])
    adapt(state, torch.ones(()), override(TrainConfig(), {"data.aug": name}))
    assert state.tolist() == [AUGMENTATIONS[name].strength, 0.0]


@pytest.mark.parametrize("name", [n for n, e in OBJECTIVES.items() if e.make(**e.parameters).outputs == 1])
def test_a_boundary_is_what_the_best_d_says_where_reals_and_fakes_are_equally_likely(name):
    """There D minimizes its loss for reals and fakes of the same output v: its slope is 0 at the boundary, or anywhere
    if only differences of outputs mean something."""
    row = find_pair(name, "none")[0]
    if row.discriminator is None:
        return

    def slope(v: float) -> float:
        outputs = torch.full((row.group,), v, dtype=torch.float64, requires_grad=True)
        return torch.autograd.grad(row.discriminator(outputs, outputs).sum(), outputs)[0].sum().item()

    if row.boundary is None:
        assert all(slope(v) == pytest.approx(0, abs=1e-12) for v in (-2.0, 0.3, 1.0))
        return
    assert slope(row.boundary) == pytest.approx(0, abs=1e-9)
    if name not in ("hinge", "f:tv"):  # whose best D lies at the ends of an interval
        assert slope(row.boundary - 0.3) < -1e-3 and slope(row.boundary + 0.3) > 1e-3


def verdicts(objective: str) -> list[float]:
    """Of D(x) = the mean of x, at reals .2, .7, 1.5, -1 and fakes 0, 1, 1, -2."""
    real, fake = (torch.tensor(values).view(4, 1) for values in ([0.2, 0.7, 1.5, -1.0], [0.0, 1.0, 1.0, -2.0]))
    loss = critic_loss(*find_pair(objective, "none"), Critic(lambda x: x.mean(1), Draws(0, [0], 4)), real, fake)
    return loss.verdicts(find_pair(objective, "none")[0].boundary).tolist()


def test_verdicts_are_taken_at_the_boundary_or_between_real_and_fake():
    assert verdicts("nonsaturating") == [1, 1, 1, -1]
    assert verdicts("least_squares") == [-1, 1, 1, -1]
    assert verdicts("f:kl") == [-1, -1, 1, -1]
    assert verdicts("wasserstein") == verdicts("relativistic") == [1, -1, 1, 1]


@pytest.mark.parametrize("name", ["mmd", "mmd:critic=0", "energy"])
def test_an_objective_without_verdicts_is_refused(name):
    config = override(ada(), {"objective.name": name, "regularizer.name": "none"})
    with pytest.raises(UserError, match=r"data\.aug=ada follows what D says of single images, and objective\.name="):
        configured(config)
    configured(override(config, {"data.aug": "diff"}))
