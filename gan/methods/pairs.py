"""An objective and a regularizer together: whether they go together, and the loss of the critic that they make."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

from torch import Tensor

from gan.config import TrainConfig
from gan.draws import Draws
from gan.errors import UserError
from gan.methods.objectives import OBJECTIVES, Objective
from gan.methods.regularizers import FAKE, REAL, REGULARIZERS, Regularizer, Scene
from gan.methods.rows import look_up


@cache  # the Dirac-GAN asks at every step
def find_pair(objective: str, regularizer: str) -> tuple[Objective, Regularizer]:
    """The rows of two names. Raises UserError for what does not exist and for pairs that cannot be."""
    first = look_up("--objective", objective, OBJECTIVES)
    second = look_up("--regularizer", regularizer, REGULARIZERS, objective=first)
    if first.discriminator is None and second.on_critic:
        raise UserError(
            f"--objective={objective} has no critic that --regularizer={regularizer} could regularize; "
            "give --regularizer=none"
        )
    return first, second


def configured(config: TrainConfig) -> tuple[Objective, Regularizer]:
    """The rows that a configuration names. Raises UserError as `find_pair` does, and where other keys do not fit."""
    objective, regularizer = find_pair(config.objective.name, config.regularizer.name)
    unit = math.lcm(config.distributed.group, objective.group)
    if config.batch % unit:
        raise UserError(
            f"--batch={config.batch} is not made of whole blocks of {unit}, which --objective={config.objective.name} "
            f"couples; try --batch={max(round(config.batch / unit), 1) * unit}, or another group"
        )
    if objective.discriminator is None and config.data.cond:
        raise UserError(
            f"--objective={config.objective.name} compares sets of images without a critic and would not see which "
            "class each belongs to; give --cond=0"
        )
    return objective, regularizer


def remarks(config: TrainConfig) -> Iterator[str]:
    """What is allowed and probably not meant, one line each."""
    objective, regularizer = configured(config)
    if objective.lipschitz and not regularizer.on_critic:
        yield (
            f"nothing bounds the slope of D, and the loss of {config.objective.name} has no minimum without; "
            "--regularizer=wgan_gp, clip or r1 would"
        )
    if objective.discriminator is None and config.optimizer.n_critic > 1:
        yield f"{config.objective.name} has no critic: {config.optimizer.n_critic - 1} batches in n_critic are unused"
    weighs = regularizer.on_real or regularizer.on_fake or regularizer.elsewhere or regularizer.noise
    if weighs and config.regularizer.gamma == 0:
        yield f"gamma is 0: {config.regularizer.name} is computed and does nothing"
    if regularizer.gamma_range and isinstance(config.regularizer.gamma, float):
        yield from _remark_on_gamma(config, config.regularizer.gamma, regularizer.gamma_range)


def _remark_on_gamma(
    config: TrainConfig, gamma: float, gamma_range: Callable[[int], tuple[float, float]]
) -> Iterator[str]:
    """A line where gamma is outside the range in which D trains."""
    network = config.network
    width = max(network.widths, default=min(network.channel_base // 4, network.channel_max))
    low, high = gamma_range(width)
    if gamma < low:
        reason = f"lets next to no gradient through layers of at most {width} channels, and nothing will train"
    elif gamma > high:
        reason = f"bounds next to nothing in layers of {width} channels, and D may grow without end"
    else:
        return
    yield f"--regularizer={config.regularizer.name} with --gamma={gamma:g} {reason}; try --gamma={high / 3:.1g}"


@dataclass(frozen=True)
class CriticLoss:
    """What a D step minimizes, and what it saw."""

    loss: Tensor  # [N] or [blocks]
    penalties: list[Tensor]  # [N] each, to be weighed by gamma / 2 * every
    real_outputs: Tensor  # [N] or [N, outputs]
    real_scores: Tensor  # [N]
    fake_scores: Tensor  # [N]


def critic_loss(
    objective: Objective,
    regularizer: Regularizer,
    critic: Callable[[Tensor, str], Tensor],
    real: Tensor,
    fake: Tensor,
    draws: Draws,
    due: bool = True,
) -> CriticLoss:
    """The critic's loss at images [N, ...], and the penalties if they are `due`.

    critic: (images, purpose of draws) -> outputs. Images get a gradient only where a penalty asks for it.
    """
    assert objective.discriminator is not None
    if due and (regularizer.on_real or REAL in regularizer.watch):
        real.requires_grad_()
    if due and (regularizer.on_fake or FAKE in regularizer.watch):
        fake.requires_grad_()
    outputs = critic(real, REAL), critic(fake, FAKE)
    scores = objective.score(outputs[0], *outputs), objective.score(outputs[1], *outputs)
    penalties: list[Tensor] = []
    if due and regularizer.on_real:
        penalties.append(regularizer.on_real(scores[0], real))
    if due and regularizer.on_fake:
        penalties.append(regularizer.on_fake(scores[1], fake))
    if due and regularizer.elsewhere:
        scene = Scene(lambda x, purpose: objective.score(critic(x, purpose), *outputs), real, fake, *scores, draws)
        penalties.append(regularizer.elsewhere(scene))
    return CriticLoss(objective.discriminator(*outputs), penalties, outputs[0], *scores)
