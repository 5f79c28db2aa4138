"""The GAN: its training step, on one screen, and its row in the table of families. `gan.run.loop` repeats the step.

The weights are a function of (configuration, seed, dataset, images seen) and of nothing else. They do not depend on the
number of ranks, on interruptions, or on how often the run logs or saves.
"""

from collections.abc import Hashable
from functools import partial

import torch
from torch import Tensor, nn

from gan.average import update_averages
from gan.config import TrainConfig, refuse_others
from gan.methods.augment import AUGMENTATIONS, adapt
from gan.methods.critic import Critic, no_critic, with_labels
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
from gan.precision import penalty_dtype
from gan.ranks.statistics import Statistics
from gan.schedules import Moment, penalty_turns
from gan.state import Family, StepInputs, Task, TrainState
from gan.undo import frozen, undo_step, with_equal_buffers


def train_step(state: TrainState, task: Task, now: Moment, inputs: StepInputs, stats: Statistics) -> None:
    """One update of D, and on every n_critic-th step also one of G and its average; see `gan.state.Step`.

    The losses are summed over samples, part by part; their gradients are summed over ranks and divided by the global
    batch. If a gradient of D or G is not finite, the step is void: it only advances the clock and counts as skipped.
    """
    config = task.config
    objective, regularizer = configured(config)
    G = state.networks["G"]
    D = state.networks["D"]
    d_optimizer = state.optimizers["d_optimizer"]
    numbers = inputs.numbers
    alpha = fade_weight(now, inputs)
    parts = cut_batch(inputs, task, alpha, G)
    changed = [*state.changed_by("d_optimizer"), state.augmentation]
    before = [tensor.clone() for tensor in changed]
    void = torch.zeros_like(state.skipped[0])

    if objective.discriminator:
        turns = penalty_turns(config.regularizer, config.batch, task.block)
        gradients = task.sum_gradients(D.parameters(), numbers["stopping"])
        for part in with_equal_buffers(D, split_by_turn(parts, turns, now.step, now.images_seen)):
            with torch.no_grad():
                z = part.latents("latents of the D step", G.z_dim)
                fake = G(z, now.stage, alpha, part.labels)
            critic = show(D, part, task, now, alpha, numbers["gamma"], state.augmentation[0])
            d_loss = critic_loss(objective, regularizer, critic, part.real, fake, part.due)
            stats.add(d_loss.statistics(config.regularizer.name))
            verdicts = d_loss.verdicts(objective.boundary).sum()
            gradients.add(d_loss.total(numbers["gamma"] * (turns.weight / 2)), verdicts)
        void = gradients.step(d_optimizer, numbers["d_optimizer"], void)
        state.stop.copy_(gradients.stop)
        if regularizer.constrain:
            regularizer.constrain(D, numbers["gamma"])
        adapt(state.augmentation, gradients.along / config.batch, config)

    if (now.step + 1) % config.optimizer.n_critic == 0:
        with frozen(D):
            gradients = task.sum_gradients(G.parameters(), numbers["stopping"])
            for part in with_equal_buffers(D, parts):
                z = part.latents("latents of the G step", G.z_dim)
                fake = G(z, now.stage, alpha, part.labels)
                critic = show(D, part, task, now, alpha, numbers["gamma"], state.augmentation[0])
                g_loss = generator_loss(objective, critic, part.real, fake)
                stats.add(g_loss.statistics())
                gradients.add(g_loss.total())
            void = gradients.step(state.optimizers["g_optimizer"], numbers["g_optimizer"], void)
            state.stop.copy_(gradients.stop)
        update_averages(state.flat, state.flat["G"], numbers, void)

    undo_step(before, changed, void)
    state.finish_step(now.images_seen + config.batch, void)


def check(config: TrainConfig) -> None:
    """Raises UserError for settings of another kind of model, and for methods that do not go together."""
    refuse_others(config, ("vae.",))
    configured(config)


def kind_of_step(task: Task, now: Moment) -> Hashable:
    """What decides which operations a step has: its stage, whether it fades, which penalties and updates are due."""
    config = task.config
    turns = penalty_turns(config.regularizer, config.batch, task.block)
    due = tuple(turns.due(now.step, block) for block in range(task.blocks))
    return now.stage, now.fading, due, (now.step + 1) % config.optimizer.n_critic == 0


def show(D: nn.Module, part: Part, task: Task, now: Moment, alpha: Alpha, gamma: Tensor, strength: Tensor) -> Critic:
    """D as the losses call it for a part's images: at this stage, with its labels, augmentation and noise.

    strength: 0-dim, of an adaptive augmentation.
    """
    objective, regularizer = configured(task.config)
    judge = partial(with_labels, D=D, labels=part.labels, stage=now.stage, alpha=alpha)
    compute = penalty_dtype(task.config, regularizer.precise)
    return Critic(
        judge if objective.discriminator else no_critic,
        part.draws,
        augmentation=AUGMENTATIONS[task.config.data.aug],
        strength=strength,
        mirror=task.config.data.mirror,
        noise=gamma.sqrt() if regularizer.noise else None,
        D_for_penalties=partial(judge, compute=compute) if objective.discriminator else None,
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
    numbers=lambda task, now: {"gamma": task.gamma(now)},
    kind=kind_of_step,
    check=check,
    remarks=remarks,
    coupled=coupled_samples,
    named_by=method_names,
    status={"loss/D": "Loss/D/loss", "loss/G": "Loss/G/loss"},
    remedy="lower the learning rates (optimizer.*_lr), or raise regularizer.gamma",
    collapses=True,
)
