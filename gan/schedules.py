"""Everything that changes during a run, as pure functions of `images_seen`, the only clock (Karras et al. 2018).

A step is one D update on the samples [images_seen, images_seen + batch). Stages begin and end on step boundaries.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from gan.config import RegularizerConfig, TrainConfig
from gan.errors import UserError

# gamma=auto is this times the pixels of an image of the stage that trains. A D that looks at means of 2x2 pixels has a
# quarter of the squared slope that the same D of those means has, so that the penalty weighs as much when a stage
# begins as before. docs/photos.md has the runs that chose the number.
GAMMA_PER_PIXEL = 0.04
# A learning rate that is auto is this over the root of the channels of the widest stage. Adam moves each of a layer's n
# weights per output by about the rate, whatever n is; at run time they are scaled by 1 / sqrt(n) (gan/layers.py), so
# the output moves by sqrt(n) times the rate.
RATE_OF_ONE_CHANNEL = 0.08


@dataclass(frozen=True)
class Stage:
    """A stage of growth, at resolution base * 2 ** index. All lengths are in images."""

    index: int
    start: int
    fade: int  # images during which it fades in; 0 for the first


@dataclass(frozen=True)
class Schedule:
    """When stages and decays begin and end, in images seen."""

    stages: tuple[Stage, ...]
    total: int  # images at which the run ends
    batch: int
    decay_start: int
    decay_end: int
    decay_to: float

    @property
    def last(self) -> int:
        """Index of the stage at which training ends."""
        return self.stages[-1].index


@dataclass(frozen=True)
class Moment:
    """Stage, alpha and learning rate of the step that begins at `images_seen`."""

    images_seen: int
    step: int
    stage: int
    alpha: float  # in (0, 1] while the stage fades in, 1 otherwise
    lr_scale: float  # multiplies the learning rates

    @property
    def fading(self) -> bool:
        return self.alpha < 1


def moment(schedule: Schedule, images_seen: int) -> Moment:
    """Stage, alpha and learning rate at a point of the clock."""
    stage = [s for s in schedule.stages if s.start <= images_seen][-1]
    # A fade of n steps has alpha 1/(n+1), ..., n/(n+1); the step after the fade has alpha 1.
    progress = (images_seen - stage.start + schedule.batch) / (stage.fade + schedule.batch)
    return Moment(
        images_seen=images_seen,
        step=images_seen // schedule.batch,
        stage=stage.index,
        alpha=min(progress, 1.0),
        lr_scale=linear_decay(images_seen, schedule.decay_start, schedule.decay_end, schedule.decay_to),
    )


def stage_start(schedule: Schedule, index: int) -> int:
    """Images seen when a stage's parameters began to train; 0 for parameters that train from the start."""
    return max((s.start for s in schedule.stages if s.index == index), default=0)


def learning_rate(rate: float | str, widths: Sequence[int]) -> float:
    """A learning rate at the beginning of a run, as given or, if it is auto, for networks of these widths."""
    return RATE_OF_ONE_CHANNEL / math.sqrt(max(widths)) if isinstance(rate, str) else rate


def linear_decay(images_seen: int, start: int, end: int, to: float) -> float:
    """1 up to `start`, then linearly down to `to` at `end`, then constant."""
    if images_seen <= start or to == 1:
        return 1.0
    return 1.0 + (to - 1.0) * min((images_seen - start) / max(end - start, 1), 1.0)


def gamma_at(images_seen: int, config: RegularizerConfig, pixels: int, total: int) -> float:
    """The weight of the penalty. pixels: of an image of the stage that trains. total: images of the whole run.

    With t from 0 to 1 over decay_kimg, "cosine" is half a cosine wave from gamma down to decay_to * gamma (Huang et al.
    2024), and "exponential" is gamma * decay_to^t (Roth et al. 2017). After that gamma is constant.
    """
    gamma = GAMMA_PER_PIXEL * pixels if isinstance(config.gamma, str) else config.gamma
    if config.decay == "constant":
        return gamma
    t = min(images_seen / (1000 * config.decay_kimg or total), 1.0)
    if config.decay == "exponential":
        return gamma * config.decay_to**t
    return gamma * (config.decay_to + (1 - config.decay_to) * (1 + math.cos(math.pi * t)) / 2)


@dataclass(frozen=True)
class PenaltyTurns:
    """On which blocks of a batch the penalty is computed at a step: on `chosen` of them at every `every`-th step."""

    every: int
    chosen: int
    blocks: int  # of the global batch
    block: int  # samples in a block

    @property
    def weight(self) -> float:
        """What the penalty of the chosen samples is multiplied by, so that it is right on average over steps."""
        return self.every * self.blocks / self.chosen

    def due(self, step: int, block: int) -> bool:
        """Is the penalty computed on this block of the global batch, of [0, blocks)?

        The chosen blocks lie evenly spread over the batch, so that ranks share the work, and move on by one block from
        turn to turn: all blocks are chosen equally often.
        """
        turn, early = divmod(step, self.every)
        return early == 0 and (block + turn) * self.chosen % self.blocks < self.chosen


def penalty_turns(config: RegularizerConfig, batch: int, block: int) -> PenaltyTurns:
    """Blocks have `block` samples. Raises UserError for a share that is more than .001 from a whole number of them."""
    blocks = batch // block
    chosen = round(config.share * blocks)
    if chosen < 1 or abs(chosen / blocks - config.share) > 0.001:
        below = math.floor(config.share * blocks)
        near = " or ".join(f"{n / blocks:.4g}" for n in (below, below + 1) if n > 0)
        raise UserError(
            f"regularizer.share={config.share:g} of {blocks} blocks of {block} samples is no whole number of blocks; "
            f"try {near}"
        )
    return PenaltyTurns(config.every, chosen, blocks, block)


def ema_beta(images: int, since: int, half_life: float, rampup: float) -> float:
    """The weight that the old average keeps after `images` more images, `since` images after its stage began.

    The half-life, in images, is min(half_life, rampup * since): a young average forgets its random weights quickly.
    """
    life = min(half_life, rampup * since) if rampup > 0 else half_life
    return 0.5 ** (images / life) if life > 0 else 0.0


@cache
def profile_exponent(length: float) -> float:
    """gamma > 0 of the average that weighs parameters of the time tau in proportion to tau^gamma, with weights whose
    standard deviation is `length` as a share of its own time (Karras et al. 2024, section 3.1). length: up to 0.28.

    length^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) has three real roots, of which this is the largest.
    """
    inverse = length**-2
    return float(max(np.roots([1, 7, 16 - inverse, 12 - inverse]).real))


def profile_beta(images: int, since: int, length: float) -> float:
    """As `ema_beta`, of an average whose standard deviation is the share `length` of `since`. It forgets all that was
    before its stage began."""
    return max(1 - images / since, 0.0) ** (profile_exponent(length) + 1)


def build_schedule(config: TrainConfig, last: int) -> Schedule:
    """Turn shares of the run, or kimg, into images seen, rounded to whole steps. last: the final resolution's stage.

    Raises UserError if the stages do not fit into the run.
    """
    batch = config.batch
    total = math.ceil(round(config.run.kimg * 1000 / batch, 6)) * batch  # 1000 * 64.224 is a little more than 64224
    decays = config.optimizer.decay_to != 1
    return Schedule(
        stages=_stages(config, last, total),
        total=total,
        batch=batch,
        decay_start=round(total * config.optimizer.decay_from) if decays else 0,
        decay_end=total if decays else 0,
        decay_to=config.optimizer.decay_to,
    )


def _stages(config: TrainConfig, last: int, total: int) -> tuple[Stage, ...]:
    if config.growth.mode == "none":
        return (Stage(last, 0, 0),)
    lengths, fades = _lengths(config, last, total)
    _expect(
        all(fade <= length for length, fade in zip(lengths[1:-1], fades[1:-1], strict=True)),
        f"growth.fade_kimg={config.growth.fade_kimg:g} is longer than a stage of growth.kimg",
    )
    stages = []
    start = 0
    for index, (length, fade) in enumerate(zip(lengths, fades, strict=True)):
        stages.append(Stage(index, start, round(fade / config.batch) * config.batch if index else 0))
        start += max(round(length / config.batch), 1) * config.batch
    final = stages[-1]
    if final.start + final.fade >= total:
        raise UserError(
            f"a run of {total / 1000:g} kimg ends before its last stage is faded in "
            f"(at {(final.start + final.fade) / 1000:g} kimg); raise run.kimg, or shorten growth.kimg and "
            "growth.fade_kimg"
        )
    return tuple(stages)


def _lengths(config: TrainConfig, last: int, total: int) -> tuple[list[float], list[float]]:
    """Length and fade of every stage, in images."""
    growth = config.growth
    if growth.kimg:
        _expect(
            len(growth.kimg) == last, f"growth.kimg has {len(growth.kimg)} values but {last} stages precede the last"
        )
        lengths = [1000 * k for k in growth.kimg]
        return [*lengths, total - sum(lengths)], [1000 * growth.fade_kimg] * (last + 1)
    shares = growth.shares or [0.5 / max(last, 1)] * last + [0.5]
    _expect(
        len(shares) == last + 1,
        f"growth.shares has {len(shares)} values but there are {last + 1} stages; give one each, or growth.shares=[]",
    )
    lengths = [total * share / sum(shares) for share in shares]
    _expect(
        min(lengths) >= config.batch,
        f"a run of {total / 1000:g} kimg is too short for {last + 1} stages; raise run.kimg",
    )
    return lengths, [growth.fade * length for length in lengths]


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)
