"""Training: the step, on one screen, and the state it changes. `gan.run.loop` goes round it.

The weights are a function of (configuration, seed, dataset, images seen) and of nothing else: not of the ranks, not of
interruptions, not of how often the run logs or saves.
"""

import copy
import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gan.checkpoint import ImageFormat, build_networks, flat_optimizer, load_flat_optimizer
from gan.config import TrainConfig
from gan.draws import Draws
from gan.methods.augment import augment
from gan.methods.objectives import Objective
from gan.methods.pairs import configured, critic_loss
from gan.methods.regularizers import Regularizer
from gan.networks import Alpha, ResNetDiscriminator, ResNetGenerator, fade, stage_of
from gan.ranks.distributed import Ranks, share
from gan.ranks.gradients import sum_gradients
from gan.ranks.statistics import Statistics
from gan.schedules import Moment, Schedule, ema_beta, gamma_at, stage_start
from gan.undo import frozen, kept, put_back, rewinding
from ops import downsample2d, upsample2d

Request = tuple[int, int, int]  # (first global sample, how many, stage)
Batch = tuple[np.ndarray, np.ndarray | None]  # uint8 [n, H, W, C], int64 [n]
Feed = Callable[[Iterator[Request]], Generator[Batch, None, None]]


@dataclass(frozen=True)
class Task:
    """What does not change during a run."""

    config: TrainConfig
    schedule: Schedule
    images: ImageFormat
    ranks: Ranks
    objective: Objective
    regularizer: Regularizer

    @property
    def block(self) -> int:
        """Samples that must stay together: whole coupling groups, and whole groups of what the objective couples."""
        return math.lcm(self.config.distributed.group, self.objective.group)

    @property
    def groups(self) -> range:
        """This rank's coupling groups, counted inside a batch, in whole blocks."""
        mine, each = share(self.config.batch // self.block, self.ranks), self.block // self.config.distributed.group
        return range(mine.start * each, mine.stop * each)

    @property
    def parts(self) -> list[range]:
        """This rank's coupling groups, one backward after the other: all at once, or as many as are asked for."""
        how, mine = self.config.distributed, self.groups
        samples = self.block if how.exact else how.micro or len(mine) * how.group
        step = max(samples // self.block, 1) * self.block // how.group
        return [mine[i : i + step] for i in range(0, len(mine), step)]

    def gamma(self, images_seen: int) -> float:
        """The regularizer's weight at a point of the clock."""
        pixels = math.prod(side * 2**self.images.last for side in self.images.base)
        return gamma_at(images_seen, self.config.regularizer, pixels, self.config.batch)

    def draws(self, images_seen: int, groups: range | None = None) -> Draws:
        """The draws of this rank's groups, or of some of them, for the step that begins at `images_seen`."""
        size, groups = self.config.distributed.group, self.groups if groups is None else groups
        return Draws(
            self.config.seed, range(images_seen // size + groups.start, images_seen // size + groups.stop), size
        )

    def samples(self, images_seen: int) -> tuple[int, int]:
        """(first, count) of this rank's share of the global samples [images_seen, images_seen + batch)."""
        size = self.config.distributed.group
        return images_seen + self.groups.start * size, len(self.groups) * size


def build_task(config: TrainConfig, schedule: Schedule, images: ImageFormat, ranks: Ranks) -> Task:
    """Everything a step needs. Raises UserError for names that do not exist and pairs that cannot be."""
    return Task(config, schedule, images, ranks, *configured(config))


@dataclass
class TrainState:
    """Everything that changes, and nothing else."""

    G: ResNetGenerator
    D: ResNetDiscriminator
    G_ema: ResNetGenerator
    g_optimizer: torch.optim.Optimizer
    d_optimizer: torch.optim.Optimizer
    skipped: Tensor  # [2] steps voided by non-finite values: in all, and in a row
    stop: Tensor  # 0-dim, a new one of each step: how many ranks were asked to stop when it began; not saved
    images_seen: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """A flat copy for a training state, by name."""
        flat = {f"{name}/{k}": v for name in ("G", "D", "G_ema") for k, v in getattr(self, name).state_dict().items()}
        flat |= flat_optimizer(self.g_optimizer, self.G, "g_optimizer")
        flat |= flat_optimizer(self.d_optimizer, self.D, "d_optimizer")
        return flat | {"skipped": self.skipped}

    def load_tensors(self, tensors: dict[str, Tensor], images_seen: int) -> None:
        """The inverse of `tensors`, in place."""
        for name in ("G", "D", "G_ema"):
            getattr(self, name).load_state_dict(
                {k.removeprefix(name + "/"): v for k, v in tensors.items() if k.startswith(name + "/")}
            )
        load_flat_optimizer(self.g_optimizer, self.G, "g_optimizer", tensors)
        load_flat_optimizer(self.d_optimizer, self.D, "d_optimizer", tensors)
        self.skipped.copy_(tensors["skipped"])
        self.images_seen = images_seen


def initial_state(task: Task) -> TrainState:
    """Networks at their random start on the task's device, equal on all ranks."""
    config, device = task.config, task.ranks.device
    dtype = getattr(torch, config.precision.dtype)
    G, D = build_networks(config, task.images, task.objective.outputs, task.regularizer.prepare)
    G.to(device, dtype), D.to(device, dtype)
    G_ema = copy.deepcopy(G).requires_grad_(False)
    options: dict[str, Any] = {"betas": config.optimizer.betas, "eps": config.optimizer.eps, "fused": True}
    return TrainState(
        G,
        D,
        G_ema,
        torch.optim.Adam(G.parameters(), lr=torch.tensor(config.optimizer.g_lr, device=device), **options),
        torch.optim.Adam(D.parameters(), lr=torch.tensor(config.optimizer.d_lr, device=device), **options),
        torch.zeros(2, device=device),
        torch.zeros((), device=device),
    )


# ---------------------------------------------------------------------------------------------------------------------


def train_step(
    state: TrainState,
    task: Task,
    now: Moment,
    images: Tensor,
    labels: Tensor | None,
    stats: Statistics,
    stopping: float = 0.0,
) -> None:
    """One D update, and after every n_critic-th one G update and one of the average.

    images: uint8 [n, H, W, C], labels: int64 [n] or None: this rank's share of the samples from `now.images_seen`.
    The losses are summed over samples, part by part, and divided by the global batch after the sum over ranks.
    A gradient that is not finite, of D or of G, voids the whole step: it changes nothing but the clock and the count.
    stopping: 1 if this rank was asked to stop, else 0; `state.stop` becomes the sum over ranks, which comes with the
    gradients.
    """
    G, D, config, objective = state.G, state.D, task.config, task.objective
    alpha: Alpha = torch.full((), now.alpha, device=state.skipped.device) if now.fading else 1.0
    gamma, bad, before = task.gamma(now.images_seen), torch.zeros_like(state.skipped[0]), kept(D, state.d_optimizer)
    parts = cut(images, labels, state, task, now, alpha, gamma)

    def d_total(part: Part) -> Tensor:
        with torch.no_grad():
            z = part.draws.latents("latents of the D step", G.z_dim).to(images.device)
            fake = G(z, now.stage, alpha, part.labels)
        due = now.step % config.regularizer.every == 0
        d = critic_loss(objective, task.regularizer, part.critic, part.real, fake, part.draws, due)
        stats.add({"Loss/scores/real": d.real_scores, "Loss/scores/fake": d.fake_scores, "Loss/D/loss": d.loss})
        stats.add({"Loss/signs/real": d.real_scores.sign(), "Loss/signs/fake": d.fake_scores.sign()})
        if d.penalties:
            name = config.regularizer.name.partition(":")[0]
            stats.add({f"Loss/{name}_penalty": torch.stack(d.penalties).sum(0)})
        weight = gamma / 2 * config.regularizer.every
        return total_over_samples(d.loss, len(fake)) + sum(weight * penalty.sum() for penalty in d.penalties)

    def g_total(part: Part) -> Tensor:
        z = part.draws.latents("latents of the G step", G.z_dim).to(images.device)
        real = part.critic(part.real.detach(), "reals of the G step") if objective.paired else None
        fake = part.critic(G(z, now.stage, alpha, part.labels), "fakes of the G step")
        loss = objective.generator(fake if real is None else real, fake)  # where not paired it looks at no reals
        stats.add({"Loss/G/loss": loss})
        return total_over_samples(loss, len(z))

    if objective.discriminator:
        lr, totals = config.optimizer.d_lr * now.lr_scale, map(d_total, rewinding(D, parts))
        bad, state.stop = update(D, state.d_optimizer, lr, totals, task, bad, stopping)
        if task.regularizer.constrain:
            task.regularizer.constrain(D, gamma)
    if (now.step + 1) % config.optimizer.n_critic == 0:
        with frozen(D):
            lr, totals = config.optimizer.g_lr * now.lr_scale, map(g_total, rewinding(D, parts))
            bad, state.stop = update(G, state.g_optimizer, lr, totals, task, bad, stopping)
        update_average(state.G_ema, G, task, now, bad)

    put_back(before, D, state.d_optimizer, bad)
    state.skipped.copy_(torch.stack([state.skipped[0] + bad, (state.skipped[1] + 1) * bad]))
    state.images_seen = now.images_seen + config.batch


# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """What one backward sees: whole blocks of this rank's share."""

    real: Tensor  # [n, C, H, W]
    labels: Tensor | None  # [n]
    draws: Draws
    critic: Callable[[Tensor, str], Tensor]  # (images [n, C, H, W], purpose of draws) -> D's outputs


def cut(
    images: Tensor, labels: Tensor | None, state: TrainState, task: Task, now: Moment, alpha: Alpha, gamma: float
) -> list[Part]:
    """A rank's share of a batch, cut into its parts."""
    parts, size = [], task.config.distributed.group
    for groups in task.parts:
        mine = slice((groups.start - task.groups.start) * size, (groups.stop - task.groups.start) * size)
        draws, some = task.draws(now.images_seen, groups), None if labels is None else labels[mine]
        real = prepare_reals(images[mine], draws if task.config.data.mirror else None, alpha, state.G)
        parts.append(Part(real, some, draws, build_critic(state.D, task, now, alpha, some, draws, gamma)))
    return parts


def build_critic(
    D: ResNetDiscriminator, task: Task, now: Moment, alpha: Alpha, labels: Tensor | None, draws: Draws, gamma: float
) -> Callable[[Tensor, str], Tensor]:
    """(images [n, C, H, W], purpose) -> D's outputs for them as D is shown them: changed at random, with noise, or as
    they are. Without a critic, the flattened images themselves."""

    def critic(images: Tensor, purpose: str) -> Tensor:
        if task.config.data.aug == "diff":
            images = augment(images, draws, purpose)
        if task.regularizer.noise:
            images = images + math.sqrt(gamma) * draws.noise(f"instance noise: {purpose}", images)
        return D(images, now.stage, alpha, labels) if task.objective.discriminator else images.flatten(1)

    return critic


def prepare_reals(images: Tensor, mirror: Draws | None, alpha: Alpha, G: ResNetGenerator) -> Tensor:
    """uint8 [n, H, W, C] -> [n, C, H, W] in [-1, 1], flipped by the draws, faded as the generator's images are."""
    real = images.permute(0, 3, 1, 2).to(G.filter.dtype, memory_format=torch.contiguous_format) / 127.5 - 1
    if mirror is not None:
        real = torch.where(mirror.coins("mirror").to(real.device).view(-1, 1, 1, 1), real.flip(3), real)
    if isinstance(alpha, Tensor):
        real = fade(upsample2d(downsample2d(real, G.box), G.box), real, alpha)
    return real


def total_over_samples(loss: Tensor, samples: int) -> Tensor:
    """Sum of a loss over samples, whether it comes as [samples] or as [groups]."""
    return loss.sum() * (samples / len(loss))


def update(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    lr: float,
    totals: Iterator[Tensor],
    task: Task,
    bad: Tensor,
    stopping: float,
) -> tuple[Tensor, Tensor]:
    """Backward of each part's loss, sum over ranks, step. -> 0-dim: 1 where a gradient (or `bad` before it) was not
    finite, else 0; and the sum over ranks of `stopping`.

    A bad update changes nothing: the fused Adam reads `found_inf` on the device, so nobody waits for the answer.
    """
    config, blocks = task.config, task.config.batch // task.block
    found, stop = sum_gradients(
        list(module.parameters()), totals, config.batch, task.ranks, config.distributed, blocks, stopping
    )
    found = torch.maximum(found, bad)
    for group in optimizer.param_groups:
        group["lr"].fill_(lr)
    optimizer.found_inf, optimizer.grad_scale = found, None  # type: ignore[attr-defined]
    optimizer.step()
    return found, stop


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, task: Task, now: Moment, bad: Tensor) -> None:
    """average <- beta * average + (1 - beta) * model for the parameters of the stages that train, unless `bad`.

    beta ramps up from the beginning of each parameter's own stage.
    """
    images = task.config.batch * task.config.optimizer.n_critic
    weights = {}
    for stage in range(now.stage + 1):
        since = now.images_seen + task.config.batch - stage_start(task.schedule, stage)
        beta = ema_beta(images, since, 1000 * task.config.ema.kimg, task.config.ema.rampup)
        weights[stage] = (1 - beta) * (1 - bad)
    for (name, a), p in zip(average.named_parameters(), model.parameters(), strict=True):
        if stage_of(name) <= now.stage:
            a.lerp_(p, weights[stage_of(name)].to(a.dtype))
