"""The GAN: its training step, on one screen, and its row in the table of families. `gan.run.loop` repeats the step.

The weights are a function of (configuration, seed, dataset, images seen) and of nothing else. They do not depend on the
number of ranks, on interruptions, or on how often the run logs or saves.
"""

import math
from functools import partial

import torch
from torch import Tensor, nn

from gan.average import update_average
from gan.config import TrainConfig
from gan.methods.critic import Critic, no_critic
from gan.methods.pairs import (
    configured,
    coupled_samples,
    critic_loss,
    generator_loss,
    method_names,
    remarks,
)
from gan.networks import Alpha, ImageFormat, build_discriminator, build_generator
from gan.parts import Part, cut_batch, fade_weight, split_by_turn
from gan.ranks.statistics import Statistics
from gan.schedules import Moment, penalty_turns
from gan.state import Family, Task, TrainState
from gan.undo import copy_before_step, frozen, undo_step, with_equal_buffers


def train_step(
    state: TrainState,
    task: Task,
    now: Moment,
    images: Tensor,
    labels: Tensor | None,
    stats: Statistics,
    stopping: float = 0.0,
) -> None:
    """One update of D, and on every n_critic-th step also one of G and its average; arguments as in `gan.state.Step`.

    The losses are summed over samples, part by part; their gradients are summed over ranks and divided by the global
    batch. If a gradient of D or G is not finite, the step is void: it only advances the clock and counts as skipped.
    """
    config = task.config
    objective, regularizer = configured(config)
    G = state.networks["G"]
    D = state.networks["D"]
    d_optimizer = state.optimizers["d_optimizer"]
    gamma = task.gamma(now.images_seen)
    alpha = fade_weight(now, task)
    parts = cut_batch(images, labels, task, now, alpha, G)
    before = copy_before_step(D, d_optimizer)
    void = torch.zeros_like(state.skipped[0])

    if objective.discriminator:
        turns = penalty_turns(config.regularizer, config.batch, task.block)
        gradients = task.sum_gradients(D.parameters(), stopping)
        for part in with_equal_buffers(D, split_by_turn(parts, turns, now.step, now.images_seen)):
            with torch.no_grad():
                z = part.latents("latents of the D step", G.z_dim)
                fake = G(z, now.stage, alpha, part.labels)
            critic = show(D, part, task, now, alpha, gamma)
            d_loss = critic_loss(objective, regularizer, critic, part.real, fake, part.due)
            stats.add(d_loss.statistics(config.regularizer.name))
            gradients.add(d_loss.total(gamma / 2 * turns.weight))
        void = gradients.step(d_optimizer, config.optimizer.d_lr * now.lr_scale, void)
        state.stop = gradients.stop
        if regularizer.constrain:
            regularizer.constrain(D, gamma)

    if (now.step + 1) % config.optimizer.n_critic == 0:
        with frozen(D):
            gradients = task.sum_gradients(G.parameters(), stopping)
            for part in with_equal_buffers(D, parts):
                z = part.latents("latents of the G step", G.z_dim)
                fake = G(z, now.stage, alpha, part.labels)
                critic = show(D, part, task, now, alpha, gamma)
                g_loss = generator_loss(objective, critic, part.real, fake)
                stats.add(g_loss.statistics())
                gradients.add(g_loss.total())
            void = gradients.step(state.optimizers["g_optimizer"], config.optimizer.g_lr * now.lr_scale, void)
            state.stop = gradients.stop
        update_average(state.networks["G_ema"], G, config, task.schedule, now, void)

    undo_step(before, D, d_optimizer, void)
    state.finish_step(now.images_seen + config.batch, void)


def show(D: nn.Module, part: Part, task: Task, now: Moment, alpha: Alpha, gamma: float) -> Critic:
    """D as the losses call it for a part's images: at this stage, with its labels, augmentation and noise."""
    objective, regularizer = configured(task.config)
    return Critic(
        partial(D, stage=now.stage, alpha=alpha, labels=part.labels) if objective.discriminator else no_critic,
        part.draws,
        augment=task.config.data.aug == "diff",
        mirror=task.config.data.mirror,
        noise=math.sqrt(gamma) if regularizer.noise else 0.0,
    )


def start_discriminator(config: TrainConfig, images: ImageFormat) -> nn.Module:
    """D with random weights, with as many outputs as the objective needs, changed as the regularizer needs it."""
    objective, regularizer = configured(config)
    D = build_discriminator(config, images, objective.outputs)
    if regularizer.prepare:
        regularizer.prepare(D)
    return D


GAN = Family(
    networks={"G": build_generator, "D": start_discriminator},
    generator="G",
    optimizers={"g_optimizer": ("G", "g_lr"), "d_optimizer": ("D", "d_lr")},
    step=train_step,
    check=configured,
    remarks=remarks,
    coupled=coupled_samples,
    named_by=method_names,
    status={"loss/D": "Loss/D/loss", "loss/G": "Loss/G/loss"},
)
