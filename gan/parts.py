"""A rank's share of a batch, converted for the networks and cut into parts: each part is one backward pass."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gan.draws import Draws
from gan.networks import Alpha, fade
from gan.schedules import Moment, PenaltyTurns
from gan.state import StepInputs, Task
from ops import downsample2d, upsample2d


@dataclass(frozen=True)
class Part:
    """The samples of one backward pass: whole blocks of this rank's share, and their random draws."""

    real: Tensor  # [n, C, H, W]
    labels: Tensor | None  # [n]
    draws: Draws
    due: bool = False  # is a penalty computed on it?

    def latents(self, purpose: str, z_dim: int) -> Tensor:
        """[n, z_dim], standard normal, one per real."""
        return self.draws.latents(purpose, z_dim).to(self.real.device)

    def only(self, groups: Sequence[int], due: bool) -> "Part":
        """The part that consists of some of this part's coupling groups, given by their positions in it."""
        if len(groups) == len(self.draws.groups):
            return replace(self, due=due)
        size = self.draws.size

        def take(x: Tensor) -> Tensor:  # by slices, as a GPU would have to wait for a list of indices
            return torch.cat([x[g * size : (g + 1) * size] for g in groups])

        draws = replace(self.draws, groups=[self.draws.groups[g] for g in groups])
        return Part(take(self.real), None if self.labels is None else take(self.labels), draws, due)


def fade_weight(now: Moment, inputs: StepInputs) -> Alpha:
    """alpha as a 0-dim tensor while the stage fades in; otherwise the number 1."""
    return inputs.numbers["alpha"] if now.fading else 1.0


def cut_batch(inputs: StepInputs, task: Task, alpha: Alpha, G: Any) -> list[Part]:
    """Cut this rank's share of a batch into parts."""
    parts = []
    size = task.config.distributed.group
    for groups in task.parts:
        first = groups.start - task.groups.start
        last = groups.stop - task.groups.start
        mine = slice(first * size, last * size)
        draws = replace(inputs.draws, groups=inputs.draws.groups[first:last])
        real = prepare_reals(inputs.images[mine], draws if task.config.data.mirror else None, alpha, G)
        parts.append(Part(real, None if inputs.labels is None else inputs.labels[mine], draws))
    return parts


def split_by_turn(parts: Sequence[Part], turns: PenaltyTurns, step: int, images_seen: int) -> list[Part]:
    """Split each part into the blocks on which the penalty is due at this step and the others; not into empty ones.

    So the other images are shown to D without what a penalty needs. No loss couples samples of different blocks.
    images_seen: when the step began, which is the number of its batch's first sample.
    """
    split = []
    for part in parts:
        blocks = [(group * part.draws.size - images_seen) // turns.block for group in part.draws.groups]
        for due in (True, False):
            mine = [position for position, block in enumerate(blocks) if turns.due(step, block) == due]
            if mine:
                split.append(part.only(mine, due))
    return split


def prepare_reals(images: Tensor, mirror: Draws | None, alpha: Alpha, G: Any) -> Tensor:
    """uint8 [n, H, W, C] -> [n, C, H, W] in [-1, 1], channels_last in memory; float32 numbers of vectors are kept.

    They are flipped at random if `mirror` is given, and blended with their lower resolution while the stage fades in,
    as the generator's images are.
    """
    real = images.permute(0, 3, 1, 2).to(G.filter.dtype)
    if not images.is_floating_point():
        real = real / 127.5 - 1
    if mirror is not None:
        flipped = mirror.coins("mirror").to(real.device).view(-1, 1, 1, 1)
        real = torch.where(flipped, real.flip(3), real)
    if isinstance(alpha, Tensor):
        real = fade(upsample2d(downsample2d(real, G.box), G.box), real, alpha)
    return real
