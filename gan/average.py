"""The moving averages of the generator's weights: they make better images than the generator that trains."""

from collections.abc import Mapping

import torch
from torch import Tensor

from gan.flat import Flat
from gan.schedules import Moment, ema_beta, profile_beta, stage_start
from gan.state import Task


def average_weights(task: Task, now: Moment) -> dict[str, float]:
    """1 - beta in this step, of each average and for the parameters of each stage that trains, as `AVERAGE/STAGE`; beta
    ramps up from the stage's beginning."""
    config = task.config
    images = config.batch * config.optimizer.n_critic
    weights = {}
    for stage in range(now.stage + 1):
        since = now.images_seen + config.batch - stage_start(task.schedule, stage)
        beta = ema_beta(images, since, 1000 * config.ema.kimg, config.ema.rampup)
        weights[f"{task.family.average}/{stage}"] = 1 - beta
        for name, length in task.posthoc.items():
            weights[f"{name}/{stage}"] = 1 - profile_beta(images, since, length)
    return weights


@torch.no_grad()
def update_averages(networks: Mapping[str, Flat], model: Flat, numbers: Mapping[str, Tensor], void: Tensor) -> None:
    """average <- beta * average + (1 - beta) * model for the parameters of the stages that train, unless `void` is 1.

    numbers: holds 1 - beta as `average_weights` names it; the networks that it names are the averages.
    """
    sound = 1 - void.to(model.data.dtype)
    for name, average in networks.items():
        for stage, part in average.stages.items():
            if f"{name}/{stage}" in numbers:
                average.data[part].lerp_(model.data[part], numbers[f"{name}/{stage}"] * sound)
