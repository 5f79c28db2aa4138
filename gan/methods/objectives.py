"""Losses, as rows of pure functions: (D's outputs for reals, for fakes) -> [N], for D and for G; both are minimized.

Outputs are logits [N], or features [N, K] where a row asks for K of them. A loss that couples samples does so inside
blocks of its own `group` and returns one value per block. sp is softplus, P the data, Q the model.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import relu, softplus

from gan.errors import UserError
from gan.methods import discrepancies
from gan.methods.divergences import DIVERGENCES, Function, divergence
from gan.methods.rows import Entry

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Objective:
    """One row. Without a `discriminator` there is no critic, and the generator's loss sees flattened images [N, F]."""

    discriminator: Loss | None
    generator: Loss
    paired: bool = False  # the generator's loss looks at reals too, so the G step shows D those of the D step again
    group: int = 1  # samples that the losses couple: a batch is made of whole blocks of so many
    outputs: int = 1  # numbers per image that D puts out
    score: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda points, real, fake: points  # outputs -> a scalar critic
    curvature: Function | None = None  # f*''(T) T'(v)^2 of an f-divergence
    lipschitz: bool = False  # without a bound on D's slope the loss has no minimum
    boundary: float | None = 0.0  # D's output above which it calls an image real; None if only differences tell


def _f(row: str, form: str, saturating: int, **parameters: float) -> Objective:
    """D ascends E_P[T] - E_Q[f*(T)]; G descends it (saturating) or ascends E_Q[T] (Nowozin et al. 2016)."""
    shape = DIVERGENCES[row].make(**parameters).form(form)
    return Objective(
        lambda real, fake: shape.conjugate(fake) - shape.value(real),
        (lambda real, fake: -shape.conjugate(fake)) if saturating else (lambda real, fake: -shape.value(fake)),
        curvature=shape.curvature,
        boundary=shape.boundary,
    )


def _bgan(divergence_name: str, frozen: int) -> Objective:
    """D estimates the density ratio r = e^bend(output): its step is the f-GAN's in the log-ratio form (Uehara et al.
    2016). G descends the divergence that D's bound stands for, or with `frozen` E_Q[f(r)]."""
    row = divergence(divergence_name, "divergence")
    form = row.form("log_ratio")

    def mean_of_f(real: Tensor, fake: Tensor) -> Tensor:
        # f(u) = u f'(u) - f*(f'(u)): from u alone it would be a difference of large numbers. float64, as u is e^v.
        v = fake.double()
        return (form.bend(v).exp() * form.value(v) - form.conjugate(v)).to(fake.dtype)

    def bound(real: Tensor, fake: Tensor) -> Tensor:
        return -form.conjugate(fake)

    return Objective(
        lambda real, fake: form.conjugate(fake) - form.value(real),
        mean_of_f if frozen else bound,
        curvature=form.curvature,
        boundary=form.boundary,
    )


def blocks(x: Tensor, group: int) -> Tensor:
    """[N, ...] -> [N / group, group, features]; an output [N] is one feature."""
    return x.unflatten(0, (-1, group)).flatten(2) if x.ndim > 1 else x.view(-1, group, 1)


def _relativistic_average(group: int) -> Objective:
    _at_least_two(group)

    def loss(real: Tensor, fake: Tensor) -> Tensor:
        real, fake = real.unflatten(0, (-1, group)), fake.unflatten(0, (-1, group))
        above = softplus(fake.mean(1, keepdim=True) - real) + softplus(fake - real.mean(1, keepdim=True))
        return above.flatten()

    return Objective(loss, lambda real, fake: loss(fake, real), paired=True, group=group, boundary=None)


def _mmd(critic: int, kernel: str, scale: float, unbiased: int, group: int) -> Objective:
    _at_least_two(group)
    k = discrepancies.kernel(kernel, scale)

    def distance(real: Tensor, fake: Tensor) -> Tensor:
        return discrepancies.mmd(blocks(real, group), blocks(fake, group), k, bool(unbiased))

    def score(points: Tensor, real: Tensor, fake: Tensor) -> Tensor:
        # The sets it is measured against stand still: the gradient at a point is that point's own.
        real, fake = blocks(real.detach(), group), blocks(fake.detach(), group)
        return discrepancies.witness(blocks(points, group), real, fake, k).flatten()

    if not critic:
        return Objective(None, distance, paired=True, group=group)
    return Objective(
        lambda real, fake: -distance(real, fake),
        distance,
        paired=True,
        group=group,
        outputs=16,
        score=score,
        lipschitz=kernel == "distance",
    )


def _energy(gamma: float, beta: float, group: int) -> Objective:
    _at_least_two(group)
    if not gamma >= 0:
        raise UserError(f"gamma must be at least 0, got {gamma:g}")
    if not 0 < beta < 2:
        raise UserError(f"beta must be between 0 and 2, where the score is strictly proper, got {beta:g}")
    return Objective(
        None,
        lambda real, fake: discrepancies.energy_score(blocks(real, group), blocks(fake, group), gamma, beta),
        paired=True,
        group=group,
    )


def _at_least_two(group: int) -> None:
    if group < 2:
        raise UserError(f"group must be at least 2, got {group}")


def _logistic() -> Objective:
    return Objective(lambda real, fake: softplus(-real) + softplus(fake), lambda real, fake: softplus(-fake))


def _relativistic() -> Objective:
    return Objective(
        lambda real, fake: softplus(fake - real), lambda real, fake: softplus(real - fake), paired=True, boundary=None
    )


def _least_squares() -> Objective:
    return Objective(
        lambda real, fake: ((real - 1).square() + fake.square()) / 2,
        lambda real, fake: (fake - 1).square() / 2,
        boundary=0.5,
    )


def _hinge() -> Objective:
    return Objective(lambda real, fake: relu(1 - real) + relu(1 + fake), lambda real, fake: -fake)


def _wasserstein() -> Objective:
    return Objective(lambda real, fake: fake - real, lambda real, fake: -fake, lipschitz=True, boundary=None)


OBJECTIVES: dict[str, Entry[Objective]] = {
    "nonsaturating": Entry("logistic D, G minimizes -log D(fake) (Goodfellow et al. 2014, section 3)", _logistic),
    "least_squares": Entry("D to 1 and 0, G to 1 (Mao et al. 2017, eq. 9)", _least_squares),
    "hinge": Entry("D beyond margins of 1 (Lim & Ye 2017; Miyato et al. 2018, eq. 16)", _hinge),
    "wasserstein": Entry("means of D; bound its slope, by clip or a penalty (Arjovsky et al. 2017)", _wasserstein),
    "relativistic": Entry(
        "each real against one fake (Jolicoeur-Martineau 2019; Huang et al. 2024, eq. 2)", _relativistic
    ),
    "relativistic_average": Entry(
        "each against the other kind's mean in a block (Jolicoeur-Martineau 2019)",
        _relativistic_average,
        {"group": 16},
    ),
    "mmd": Entry(
        "kernel discrepancy of 16 features of D, or with critic=0 of images; kernel rbf, rq or distance "
        "(Li et al. 2017; Bińkowski et al. 2018)",
        _mmd,
        {"critic": 1, "kernel": "rq", "scale": 1.0, "unbiased": 1, "group": 16},
    ),
    "energy": Entry(
        "energy score of images, no critic: DISCO nets (Bouchacourt et al. 2016)",
        _energy,
        {"gamma": 0.5, "beta": 1.0, "group": 16},
    ),
    "bgan": Entry(
        "D fits the density ratio; frozen=1 is the paper's G step, no gradient of the divergence (Uehara et al. 2016)",
        lambda divergence, frozen: _bgan(divergence, frozen),
        {"divergence": "pearson", "frozen": 0},
    ),
}


def _f_entry(name: str) -> Entry[Objective]:
    entry = DIVERGENCES[name]
    parameters = {**entry.parameters, "form": "paper", "saturating": 0}
    return Entry(f"{entry.summary} (Nowozin et al. 2016)", lambda **p: _f(name, **p), parameters)


OBJECTIVES |= {f"f:{name}": _f_entry(name) for name in DIVERGENCES}
