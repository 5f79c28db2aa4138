"""What keeps D in bounds, as rows that say where each applies. A penalty maps (scores [N], images) to [N].

No weight and no mean here: D's loss adds gamma / 2 * every / share * penalty, for every row (so lambda = 10 of WGAN-GP
is gamma = 20). Squares are summed over channels and pixels. Scores are logits, or an objective's scalar critic.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from gan.draws import Draws
from gan.errors import UserError
from gan.methods.augment import augment
from gan.methods.objectives import Objective
from gan.methods.rows import Entry
from ops import gradient_penalty, interpolate_samples, squared_norm

Penalty = Callable[[Tensor, Tensor], Tensor]
REAL, FAKE, BETWEEN = "reals of the D step", "fakes of the D step", "points between"
STEP = 0.01  # root mean square, per pixel, of what finite differences move an image by


def input_gradient(scores: Tensor, images: Tensor) -> Tensor:
    """grad_x D(x), differentiable: scores [N], images [N, ...] that require grad -> [N, ...].

    Where D couples samples (minibatch standard deviation) this is the gradient of the sum over a coupling group.
    """
    return torch.autograd.grad(scores.sum(), images, create_graph=True)[0]


def zero_centered(scores: Tensor, images: Tensor) -> Tensor:
    """|grad_x D(x)|^2 per sample.  scores: [N], images: [N, C, H, W] that require grad -> [N], differentiable."""
    return squared_norm(input_gradient(scores, images))


def weighted(weight: Callable[[Tensor], Tensor]) -> Penalty:
    """weight(D(x)) |grad_x D(x)|^2. The weight is differentiated too, as in the code of Roth et al. 2017."""
    return lambda scores, images: weight(scores) * zero_centered(scores, images)


def centered_at(target: float, one_sided: bool = False) -> Penalty:
    """(|grad_x D(x)| - target)^2, or with `one_sided` only where the norm exceeds the target."""
    return lambda scores, images: gradient_penalty(input_gradient(scores, images), target, one_sided)


@dataclass(frozen=True)
class Scene:
    """What a penalty that is not a function of D at the reals, or at the fakes, alone may look at in a D step.

    critic: (images, purpose of the random draws) -> scores [N].
    """

    critic: Callable[[Tensor, str], Tensor]
    real: Tensor
    fake: Tensor
    real_scores: Tensor
    fake_scores: Tensor
    draws: Draws
    mirror: bool = False  # flipped images belong to the data (`data.mirror`)

    def at(self, where: str) -> tuple[Tensor, Tensor]:
        """(images, scores) at REAL or FAKE."""
        return (self.real, self.real_scores) if where == REAL else (self.fake, self.fake_scores)


Term = Callable[[Scene], Tensor]


@dataclass(frozen=True)
class Regularizer:
    """One row: where penalties are taken, and what else is done to D. What is None is not done."""

    on_real: Penalty | None = None
    on_fake: Penalty | None = None
    elsewhere: Term | None = None  # at other images, or by other means than the gradient at reals or at fakes
    watch: tuple[str, ...] = ()  # REAL, FAKE: where `elsewhere` uses the images' scores, or their gradient
    noise: bool = False  # D sees images with Gaussian noise of variance gamma
    prepare: Callable[[nn.Module], None] | None = None  # changes the layers of a new D, once
    constrain: Callable[[nn.Module, Tensor | float], None] | None = None  # (D, gamma), after each of D's updates
    gamma_range: Callable[[int], tuple[float, float]] | None = None  # channels of D's widest layer -> gammas that train
    pictures: bool = False  # it needs images [N, C, H, W], and cannot be used on points
    weighs: bool = True  # gamma is the weight of a penalty, if it is used at all
    precise: bool = False  # its passes through D are in float32: it divides differences of outputs by a small step

    @property
    def on_critic(self) -> bool:
        """Whether it acts on D, which an objective without a critic does not have: every row but none."""
        return self != Regularizer()

    @property
    def has_penalty(self) -> bool:
        """Whether it adds a term to D's loss."""
        return bool(self.on_real or self.on_fake or self.elsewhere)

    @property
    def is_penalty(self) -> bool:
        """Whether it acts by a term of D's loss alone: it changes neither D's weights nor what D is shown."""
        return not (self.noise or self.prepare or self.constrain)


def combine(rows: Sequence[Regularizer]) -> Regularizer:
    """All of them at once, as `r1+spectral_norm` asks: penalties are added and have one gamma. The only one is returned
    as it is. Raises UserError where gamma would be the weight of one and something else of another."""
    if len(rows) == 1:
        return rows[0]
    if not all(row.weighs for row in rows) and sum(row.has_penalty or not row.weighs for row in rows) > 1:
        raise UserError("gamma would be the weight of one and a bound or a variance of another; leave one out")
    on_real = [row.on_real for row in rows if row.on_real]
    on_fake = [row.on_fake for row in rows if row.on_fake]
    elsewhere = [row.elsewhere for row in rows if row.elsewhere]
    prepare = [row.prepare for row in rows if row.prepare]
    (constrain, gamma_range) = next(((row.constrain, row.gamma_range) for row in rows if row.constrain), (None, None))
    return Regularizer(
        on_real=_sum_of(on_real) if on_real else None,
        on_fake=_sum_of(on_fake) if on_fake else None,
        elsewhere=added(*elsewhere) if elsewhere else None,
        watch=tuple(dict.fromkeys(where for row in rows for where in row.watch)),
        noise=any(row.noise for row in rows),
        prepare=_in_turn(prepare) if prepare else None,
        constrain=constrain,
        gamma_range=gamma_range,
        pictures=any(row.pictures for row in rows),
        weighs=all(row.weighs for row in rows),
        precise=any(row.precise for row in rows),
    )


def _sum_of(penalties: Sequence[Penalty]) -> Penalty:
    return lambda scores, images: torch.stack([penalty(scores, images) for penalty in penalties]).sum(0)


def _in_turn(functions: Sequence[Callable[[nn.Module], None]]) -> Callable[[nn.Module], None]:
    def prepare(D: nn.Module) -> None:
        for function in functions:
            function(D)

    return prepare


def at_points(points: Callable[[Scene], Tensor], penalty: Penalty) -> Term:
    """A penalty at images that are neither reals nor fakes, which D has to be shown besides."""

    def term(scene: Scene) -> Tensor:
        images = points(scene).detach().requires_grad_()
        return penalty(scene.critic(images, BETWEEN), images)

    return term


def interpolates(scene: Scene) -> Tensor:
    """e x + (1 - e) y, one uniform e per pair (Gulrajani et al. 2017, algorithm 1)."""
    e = scene.draws.uniform("interpolation weights", 1).to(scene.real)
    return interpolate_samples(scene.real, scene.fake, e.squeeze(1))


def neighbors(scene: Scene) -> Tensor:
    """x + std U(-1/2, 1/2), the standard deviation over a coupling group (Kodali et al. 2017, as later code has it)."""
    real, size = scene.real, scene.draws.size
    deviation = real.unflatten(0, (-1, size)).std((1, *range(2, real.ndim + 1)), correction=0)
    noise = torch.special.ndtr(scene.draws.noise("perturbation", real)) - 0.5
    return real + deviation.repeat_interleave(size).view(-1, *[1] * (real.ndim - 1)) * noise


def difference(where: str, random: bool) -> Term:
    """|grad D|^2 without a second derivative: the squared slope of D over a small step, exact for a linear D.

    Along the gradient itself (one first-order backward), or along Gaussian noise n: E (n . grad D)^2 = |grad D|^2.
    """

    def term(scene: Scene) -> Tensor:
        images, scores = scene.at(where)
        if random:
            direction = scene.draws.noise(f"projection, {where}", images)
            length = STEP
        else:
            (gradient,) = torch.autograd.grad(scores.sum(), images, retain_graph=True)
            length = STEP * math.sqrt(images[0].numel())
            norm = squared_norm(gradient).sqrt().view(-1, *[1] * (images.ndim - 1))
            anywhere = torch.full_like(gradient, STEP / length)  # a unit vector, for where the gradient vanishes
            direction = torch.where(norm > 0, gradient / norm.clamp(min=1e-30), anywhere)
        moved = scene.critic(images.detach() + length * direction, where)
        return ((moved - scores) / length).square()

    return term


def added(*terms: Term) -> Term:
    """The sum of terms."""
    return terms[0] if len(terms) == 1 else lambda scene: torch.stack([term(scene) for term in terms]).sum(0)


def consistency(scene: Scene) -> Tensor:
    """|D(x) - D(Tx)|^2 at reals and at fakes, T a random augmentation (Zhao et al. 2020)."""
    total = torch.zeros_like(scene.real_scores)
    for where in (REAL, FAKE):
        images, scores = scene.at(where)
        changed = augment(images.detach(), scene.draws, f"consistency, {where}", scene.mirror)
        total = total + (scores - scene.critic(changed, where)).square()
    return total


def normalize_spectrum(D: nn.Module) -> None:
    """Divide each weight of D by its largest singular value, estimated by one power iteration per pass (Miyato et al.
    2018, section 2): the class embedding's too, as in Miyato & Koyama 2018.

    The layers' own run-time scales (equalized learning rate) would undo it and are set to one.
    """
    for module in list(D.modules()):
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim > 1:
            spectral_norm(module)
            if hasattr(module, "scale"):
                module.scale = 1.0  # type: ignore[assignment]


@torch.no_grad()
def clip_weights(D: nn.Module, limit: Tensor | float) -> None:
    """Every weight and bias into [-limit, limit] (Arjovsky et al. 2017, algorithm 1), as the layer computes with it:
    of a layer with a run-time scale (gan/layers.py) it is weight * scale that is bounded."""
    for module in D.modules():
        for name, parameter in module.named_parameters(recurse=False):
            scale = getattr(module, "scale", 1.0) if name == "weight" else 1.0
            bound = torch.as_tensor(limit / scale, dtype=parameter.dtype, device=parameter.device)
            parameter.clamp_(-bound, bound)


def clip_limits(width: int) -> tuple[float, float]:
    """(lowest, highest) limit of `clip_weights` that trains a D whose widest layer has `width` channels.

    A 3x3 layer whose weights are all at the limit, with random signs, multiplies a signal by limit * sqrt(9 * width).
    Below 1/4 next to nothing passes through a stack of such layers; above 2 the limit does not keep D from growing.
    """
    unit = 1 / math.sqrt(9 * width)
    return unit / 4, 2 * unit


def _roth(objective: Objective) -> Regularizer:
    if objective.curvature is None:
        raise UserError("it weighs by f*'' of an f-divergence: use an objective f:..., or roth_js")
    if not objective.curvature(torch.linspace(-2, 2, 9)).any():
        raise UserError("f*'' of this divergence is zero, and so is the penalty: use r1, or another objective")
    return Regularizer(on_fake=weighted(objective.curvature))


def _entry(summary: str, make: Callable[..., Regularizer], **parameters: float) -> Entry[Regularizer]:
    """A row that does not depend on the objective."""
    return Entry(summary, lambda objective, **given: make(**given), parameters)


def _difference_rows(name: str, *where: str) -> dict[str, Entry[Regularizer]]:
    return {
        f"{name}_difference": _entry(
            f"{name} without double backward, by a step along the gradient",
            lambda: Regularizer(elsewhere=added(*(difference(w, random=False) for w in where)), watch=where),
        ),
        f"{name}_projection": _entry(
            f"{name} without double backward, by a step along noise",
            lambda: Regularizer(
                elsewhere=added(*(difference(w, random=True) for w in where)), watch=where, precise=True
            ),
        ),
    }


REGULARIZERS: dict[str, Entry[Regularizer]] = {
    "none": _entry("no regularizer", Regularizer),
    "r1": _entry(
        "squared gradient at the reals (Mescheder et al. 2018, eq. 9)", lambda: Regularizer(on_real=zero_centered)
    ),
    "r2": _entry(
        "squared gradient at the fakes (Mescheder et al. 2018, eq. 10)", lambda: Regularizer(on_fake=zero_centered)
    ),
    "r1_r2": _entry(
        "squared gradient at reals and fakes (Mescheder et al. 2018, eq. 9 and 10)",
        lambda: Regularizer(on_real=zero_centered, on_fake=zero_centered),
    ),
    "roth": Entry(
        "f*''(T) |grad T|^2 at the fakes, gamma the variance of the noise it stands for (Roth et al. 2017)", _roth
    ),
    "roth_js": _entry(
        "the same for Jensen-Shannon on logits, at reals and fakes (Roth et al. 2017)",
        lambda: Regularizer(
            on_real=weighted(lambda v: torch.sigmoid(-v).square()),
            on_fake=weighted(lambda v: torch.sigmoid(v).square()),
        ),
    ),
    "wgan_gp": _entry(
        "(|grad| - target)^2 between reals and fakes (Gulrajani et al. 2017, eq. 3)",
        lambda target: Regularizer(elsewhere=at_points(interpolates, centered_at(target))),
        target=1.0,
    ),
    "wgan_lp": _entry(
        "the same where |grad| exceeds the target (Petzka et al. 2018)",
        lambda target: Regularizer(elsewhere=at_points(interpolates, centered_at(target, one_sided=True))),
        target=1.0,
    ),
    "dragan": _entry(
        "(|grad| - target)^2 near the reals (Kodali et al. 2017)",
        lambda target: Regularizer(elsewhere=at_points(neighbors, centered_at(target))),
        target=1.0,
    ),
    "zero_gp": _entry(
        "squared gradient between reals and fakes (Thanh-Tung et al. 2019)",
        lambda: Regularizer(elsewhere=at_points(interpolates, zero_centered)),
    ),
    "drift": _entry(
        "weight * D^2 at the reals, which keeps outputs near 0 (Karras et al. 2018, appendix A.1)",
        lambda weight: Regularizer(elsewhere=lambda scene: weight * scene.real_scores.square()),
        weight=1.0,
    ),
    "bcr": _entry(
        "balanced consistency: D alike for an image and its copy moved, zoomed, cut out, recolored and, with --mirror, "
        "flipped (Zhao et al. 2020)",
        lambda: Regularizer(elsewhere=consistency, watch=(REAL, FAKE), pictures=True),
    ),
    "instance_noise": _entry(
        "D sees images with Gaussian noise of variance gamma (Sønderby et al. 2017)",
        lambda: Regularizer(noise=True, weighs=False),
    ),
    "spectral_norm": _entry(
        "each weight of D over its largest singular value (Miyato et al. 2018)",
        lambda: Regularizer(prepare=normalize_spectrum),
    ),
    "clip": _entry(
        "D's weights kept in [-gamma, gamma], .01 in the paper (Arjovsky et al. 2017)",
        lambda: Regularizer(constrain=clip_weights, gamma_range=clip_limits, weighs=False),
    ),
    **_difference_rows("r1", REAL),
    **_difference_rows("r2", FAKE),
    **_difference_rows("r1_r2", REAL, FAKE),
}
