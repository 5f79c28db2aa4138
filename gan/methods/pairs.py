"""An objective and a regularizer together: whether they go together, and the loss of the critic that they make."""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from gan.config import TrainConfig
from gan.errors import UserError
from gan.methods.augment import AUGMENTATIONS
from gan.methods.critic import Critic
from gan.methods.objectives import OBJECTIVES, Objective
from gan.methods.regularizers import FAKE, REAL, REGULARIZERS, Regularizer, Scene, combine
from gan.methods.rows import look_up
from gan.schedules import penalty_turns


@cache  # the Dirac-GAN asks at every step
def find_pair(objective: str, regularizer: str) -> tuple[Objective, Regularizer]:
    """The rows of two names. Raises UserError for what does not exist and for pairs that cannot be."""
    first = look_up("objective.name", objective, OBJECTIVES)
    names = combined(regularizer)
    if len(set(names)) < len(names):
        raise UserError(f"regularizer.name={regularizer} names one twice; raise gamma instead")
    rows = [look_up("regularizer.name", name, REGULARIZERS, objective=first) for name in names]
    try:
        second = combine(rows)
    except UserError as error:
        raise UserError(f"regularizer.name={regularizer}: {error}") from None
    if first.discriminator is None and second.on_critic:
        raise UserError(
            f"objective.name={objective} has no critic that regularizer.name={regularizer} could regularize; "
            "give regularizer.name=none"
        )
    return first, second


def combined(regularizer: str) -> list[str]:
    """The names in one like r1+spectral_norm; a plus before a digit is part of a number."""
    return re.split(r"\+(?=[a-z])", regularizer)


def configured(config: TrainConfig) -> tuple[Objective, Regularizer]:
    """The rows that a configuration names. Raises UserError as `find_pair` does, and where other keys do not fit."""
    objective, regularizer = find_pair(config.objective.name, config.regularizer.name)
    unit = math.lcm(config.distributed.group, objective.group)
    if config.batch % unit:
        raise UserError(
            f"batch={config.batch} is not made of whole blocks of {unit}, which objective.name={config.objective.name} "
            f"couples; try batch={max(round(config.batch / unit), 1) * unit}, or another group"
        )
    if config.regularizer.share < 1 and not regularizer.has_penalty:
        raise UserError(
            f"regularizer.share={config.regularizer.share:g} is the share of a batch on which a penalty is computed, "
            f"and regularizer.name={config.regularizer.name} has no penalty; leave regularizer.share out"
        )
    if config.regularizer.share < 1 and regularizer.prepare:
        raise UserError(
            f"regularizer.share={config.regularizer.share:g}: D changes with every pass in regularizer.name="
            f"{config.regularizer.name}, and would have as many as a rank has penalties; leave regularizer.share out"
        )
    if config.regularizer.gamma == "auto" and not regularizer.weighs:
        raise UserError(
            f"regularizer.gamma=auto is the weight of a penalty, and gamma is a bound or a variance in "
            f"regularizer.name={config.regularizer.name}; give a number, as regularizer.gamma=0.01"
        )
    penalty_turns(config.regularizer, config.batch, unit)
    if objective.discriminator is None and config.data.cond:
        raise UserError(
            f"objective.name={config.objective.name} compares sets of images without a critic and would not see which "
            "class each belongs to; give data.cond=0"
        )
    judges = objective.discriminator is not None and objective.outputs == 1
    if AUGMENTATIONS[config.data.aug].adaptive and not judges:
        raise UserError(
            f"data.aug={config.data.aug} follows what D says of single images, and objective.name="
            f"{config.objective.name} has no D that does; give data.aug=diff, or another objective"
        )
    return objective, regularizer


def coupled_samples(config: TrainConfig) -> int:
    """How many samples in a row the objective couples."""
    return configured(config)[0].group


def method_names(config: TrainConfig) -> tuple[str, str]:
    """What names a run: the objective and the regularizer."""
    return config.objective.name, config.regularizer.name


def remarks(config: TrainConfig) -> Iterator[str]:
    """What is allowed and probably not meant, one line each."""
    objective, regularizer = configured(config)
    if objective.lipschitz and not regularizer.on_critic:
        yield (
            f"nothing bounds the slope of D, and the loss of {config.objective.name} has no minimum without; "
            "regularizer.name=wgan_gp, clip or r1 would"
        )
    if objective.discriminator is None and config.optimizer.n_critic > 1:
        yield f"{config.objective.name} has no critic: {config.optimizer.n_critic - 1} batches in n_critic are unused"
    if (regularizer.has_penalty or regularizer.noise) and config.regularizer.gamma == 0:
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
    name = config.regularizer.name
    yield f"regularizer.name={name} with regularizer.gamma={gamma:g} {reason}; try regularizer.gamma={high / 3:.1g}"


@dataclass(frozen=True)
class CriticLoss:
    """What a D step minimizes, and what it saw."""

    loss: Tensor  # [N] or [blocks]
    penalties: list[Tensor]  # [N] each
    real_outputs: Tensor  # [N] or [N, outputs]
    real_scores: Tensor  # [N]
    fake_scores: Tensor  # [N]

    def total(self, weight: Tensor | float) -> Tensor:
        """The sum over samples, 0-dim; weight, of the penalties: gamma / 2 * every / share."""
        return total_over_samples(self.loss, len(self.fake_scores)) + sum(
            weight * penalty.sum() for penalty in self.penalties
        )

    @torch.no_grad()
    def verdicts(self, boundary: float | None) -> Tensor:
        """[N], of each real: 1 if D says that it is real, -1 if it says that it is a fake.

        It says real above the boundary. Where only differences mean something (None), it says real above the fake in
        the same place of the batch: a fair share of such verdicts is right more often, .77 on average where it is .6
        above a boundary if scores of both kinds are normal with the same deviation.
        """
        return (self.real_scores - (self.fake_scores if boundary is None else boundary)).sign()

    def statistics(self, regularizer: str) -> dict[str, Tensor]:
        """What a run reports of it, by name."""
        # One without penalties reports none of them, by the same name: all ranks must report the same names.
        penalty = torch.stack(self.penalties).sum(0) if self.penalties else self.real_scores[:0]
        return {
            "Loss/scores/real": self.real_scores,
            "Loss/scores/fake": self.fake_scores,
            "Loss/D/loss": self.loss,
            "Loss/signs/real": self.real_scores.sign(),
            "Loss/signs/fake": self.fake_scores.sign(),
            f"Loss/{re.sub(':[^+]*', '', regularizer)}_penalty": penalty,
        }


def critic_loss(
    objective: Objective,
    regularizer: Regularizer,
    critic: Critic,
    real: Tensor,
    fake: Tensor,
    due: bool = True,
) -> CriticLoss:
    """The critic's loss at images [N, ...], and the penalties if they are `due`.

    Images get a gradient only where a penalty asks for it; those of the caller are left as they were.
    """
    assert objective.discriminator is not None
    watch_real = due and bool(regularizer.on_real or REAL in regularizer.watch)
    watch_fake = due and bool(regularizer.on_fake or FAKE in regularizer.watch)
    real = _with_gradient(real) if watch_real else real
    fake = _with_gradient(fake) if watch_fake else fake
    # Apart where a penalty is due, so that second derivatives are taken of its images only. Apart where reals and fakes
    # are compared, as then what they add to D's last bias cancels: summed in another order it would be a rounding
    # error, which Adam makes as large as any gradient.
    if watch_real or watch_fake or objective.paired:
        real_outputs = (critic.penalized() if watch_real else critic)(real, REAL)
        fake_outputs = (critic.penalized() if watch_fake else critic)(fake, FAKE)
    else:
        real_outputs, fake_outputs = critic.both(real, fake, (REAL, FAKE))

    def score(outputs: Tensor) -> Tensor:
        return objective.score(outputs, real_outputs, fake_outputs)

    real_scores = score(real_outputs)
    fake_scores = score(fake_outputs)
    penalties: list[Tensor] = []
    if due and regularizer.on_real:
        penalties.append(regularizer.on_real(real_scores, real))
    if due and regularizer.on_fake:
        penalties.append(regularizer.on_fake(fake_scores, fake))
    if due and regularizer.elsewhere:
        scene = Scene(
            critic=lambda x, purpose: score(critic.penalized()(x, purpose)),
            real=real,
            fake=fake,
            real_scores=real_scores,
            fake_scores=fake_scores,
            draws=critic.draws,
            mirror=critic.mirror,
        )
        penalties.append(regularizer.elsewhere(scene))
    loss = objective.discriminator(real_outputs, fake_outputs)
    return CriticLoss(loss, penalties, real_outputs, real_scores, fake_scores)


def _with_gradient(images: Tensor) -> Tensor:
    """The same images, so that a penalty can ask for their gradient; the caller's tensor is left as it was."""
    return images if images.requires_grad else images.detach().requires_grad_()


@dataclass(frozen=True)
class GeneratorLoss:
    """What a G step minimizes, over so many samples."""

    loss: Tensor  # [N] or [blocks]
    samples: int

    def total(self) -> Tensor:
        """The sum over samples, 0-dim."""
        return total_over_samples(self.loss, self.samples)

    def statistics(self) -> dict[str, Tensor]:
        """What a run reports of it, by name."""
        return {"Loss/G/loss": self.loss}


def generator_loss(objective: Objective, critic: Critic, real: Tensor, fake: Tensor) -> GeneratorLoss:
    """The generator's loss at images [N, ...]. The critic is shown the reals again only where the loss pairs them."""
    real_outputs = critic(real, "reals of the G step") if objective.paired else None
    fake_outputs = critic(fake, "fakes of the G step")
    # Where it does not pair them it looks at no reals, and fakes stand in their place.
    loss = objective.generator(fake_outputs if real_outputs is None else real_outputs, fake_outputs)
    return GeneratorLoss(loss, len(fake))


def total_over_samples(loss: Tensor, samples: int) -> Tensor:
    """Sum of a loss over samples, whether it comes as [samples] or as [blocks]."""
    return loss.sum() * (samples / len(loss))
