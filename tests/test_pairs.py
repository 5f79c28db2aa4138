"""Objectives and regularizers together: what is remarked, and the same step on two ranks as on one.

By default in as few pairs as show every row, and every kind of objective with every kind of regularizer; the rest of
some four hundred is marked slow.
"""

from collections.abc import Iterator, Mapping
from dataclasses import fields

import pytest
from test_distributed import by_itself, launch, relative

from gan.config import TrainConfig, override
from gan.errors import UserError
from gan.methods.objectives import OBJECTIVES, Objective
from gan.methods.pairs import configured, find_pair, remarks
from gan.methods.regularizers import REGULARIZERS, Regularizer

STEP = "1;precision.dtype=float64;regularizer.every=1;batch=16"
Pair = tuple[str, str]


def every_pair() -> list[Pair]:
    """Every objective, in a few of its variants, with every regularizer that goes with it."""
    plain = [name for name, entry in OBJECTIVES.items() if "group" not in entry.parameters]
    grouped = ["relativistic_average:", "mmd:", "mmd:kernel=rbf,", "mmd:kernel=distance,", "mmd:critic=0,", "energy:"]
    more = ["bgan:divergence=kl,frozen=1", "f:kl:saturating=1", "f:jeffrey:form=log_ratio"]
    pairs = []
    for objective in [*plain, *(f"{name}group=4" for name in grouped), *more]:
        for regularizer in REGULARIZERS:
            try:
                find_pair(objective, regularizer)
            except UserError:
                continue
            pairs.append((objective, regularizer))
    return pairs


def traits(row: Objective | Regularizer) -> frozenset[tuple[str, bool]]:
    """The fields of a row that are not at their default, and whether they are None; but for the boundary, which changes
    no loss."""
    given = {field: getattr(row, field.name) for field in fields(row) if field.name != "boundary"}
    return frozenset((field.name, value is None) for field, value in given.items() if value != field.default)


def shows(pair: Pair) -> set[tuple]:
    """What a pair shows: its objective, its regularizer, and these kinds of both together."""
    objective, regularizer = find_pair(*pair)
    return {("objective", pair[0]), ("regularizer", pair[1]), (traits(objective), traits(regularizer))}


def covering(shown: Mapping[Pair, set]) -> Iterator[Pair]:
    """Pairs, few of them, that show all that all pairs show: always the one that adds most, the first of equals."""
    left = set().union(*shown.values())
    while left:
        pair = max(shown, key=lambda pair: len(shown[pair] & left))
        left -= shown[pair]
        yield pair


PAIRS = every_pair()
FEW = list(covering({pair: shows(pair) for pair in PAIRS}))
REST = [pair for pair in PAIRS if pair not in FEW]


def test_few_pairs_cover_what_all_show():
    shown = {(1, 1): {"a"}, (1, 2): {"a", "b"}, (2, 1): {"b", "c", "d"}, (2, 2): {"e"}}
    assert list(covering(shown)) == [(2, 1), (1, 1), (2, 2)]
    assert len(FEW) < len(PAIRS) / 5
    assert {objective for objective, _ in PAIRS} == {objective for objective, _ in FEW}
    assert set(REGULARIZERS) == {regularizer for _, regularizer in FEW}
    objectives, regularizers = ({field for pair in FEW for field, _ in traits(find_pair(*pair)[i])} for i in (0, 1))
    assert objectives >= {"paired", "group", "outputs", "discriminator", "curvature", "lipschitz"}
    assert regularizers == {field.name for field in fields(Regularizer)}


@pytest.mark.parametrize("pairs", [FEW, pytest.param(REST, marks=pytest.mark.slow)], ids=["few", "rest"])
def test_two_ranks_compute_the_step_of_one_for_every_pair(pairs, tmp_path):
    cases = {f"{one} {other}": f"{STEP};objective.name={one};regularizer.name={other}" for one, other in pairs}
    alone = by_itself(cases)
    together = launch(2, tmp_path / "result.pt", cases)
    for (objective, _), name in zip(pairs, cases, strict=True):
        critic_free = objective.startswith(("energy", "mmd:critic=0"))
        for net in ("G",) if critic_free else ("G", "D"):
            theirs = alone[name]["gradients"][net]
            assert theirs and all(gradient.isfinite().all() for gradient in theirs.values()), (name, net)
            assert relative(together[name]["gradients"][net], theirs) < 1e-12, (name, net)


@pytest.mark.parametrize(
    "values,said",
    [
        ({"regularizer.share": 0.3}, "of 8 blocks of 4 samples is no whole number of blocks; try 0.25 or 0.375"),
        ({"regularizer.share": 0.01}, "try 0.125"),
        ({"regularizer.share": 0.25, "objective.name": "relativistic_average:group=16"}, "2 blocks of 16 .* try 0.5"),
        (
            {"regularizer.share": 0.25, "regularizer.name": "clip"},
            "name=clip has no penalty; leave regularizer.share out",
        ),
        ({"regularizer.share": 0.5, "regularizer.name": "spectral_norm"}, "spectral_norm has no penalty"),
        ({"regularizer.share": 0.5, "regularizer.name": "instance_noise"}, "instance_noise has no penalty"),
        ({"regularizer.share": 0.5, "regularizer.name": "none", "objective.name": "energy"}, "none has no penalty"),
        ({"regularizer.share": 0.5, "regularizer.name": "r1+spectral_norm"}, "D changes with every pass"),
        ({"regularizer.gamma": "auto", "regularizer.name": "clip"}, "give a number, as regularizer.gamma=0.01"),
        ({"regularizer.gamma": "auto", "regularizer.name": "instance_noise"}, "a bound or a variance"),
        ({"regularizer.name": "wgan_gp:target=nan"}, "target wants a number, got nan"),
        ({"objective.name": "mmd:scale=inf", "regularizer.name": "none"}, "scale wants a number, got inf"),
    ],
)
def test_settings_that_do_not_fit_a_method_are_refused_in_one_line(values, said):
    with pytest.raises(UserError, match=said) as caught:
        configured(override(TrainConfig(), {"batch": 32, **values}))
    assert "\n" not in str(caught.value)


def test_a_share_may_be_given_to_three_digits():
    configured(override(TrainConfig(), {"batch": 24, "regularizer.share": 0.333}))


@pytest.mark.parametrize(
    "objective,regularizer,more,said",
    [
        ("wasserstein", "none", {}, "nothing bounds the slope of D"),
        ("mmd:kernel=distance", "instance_noise", {"regularizer.gamma": 0.0}, "gamma is 0"),
        ("mmd:kernel=distance", "none", {}, "nothing bounds the slope of D"),
        ("mmd:kernel=rbf", "none", {}, ""),
        ("wasserstein", "clip", {"regularizer.gamma": 0.01}, ""),
        ("wasserstein", "wgan_gp", {}, ""),
        ("nonsaturating", "none", {}, ""),
        ("energy", "none", {"optimizer.n_critic": 3}, "2 batches in n_critic are unused"),
        ("nonsaturating", "r1", {"regularizer.gamma": 0.0}, "gamma is 0"),
        ("nonsaturating", "wgan_gp", {"regularizer.gamma": 0.0}, "gamma is 0"),
        ("nonsaturating", "spectral_norm", {"regularizer.gamma": 0.0}, ""),
    ],
)
def test_what_is_probably_not_meant_is_remarked_and_nothing_else(objective, regularizer, more, said):
    values = {"objective.name": objective, "regularizer.name": regularizer, **more}
    lines = list(remarks(override(TrainConfig(), values)))
    assert len(lines) == bool(said) and all(said in line for line in lines)
