"""The moving average of the generator's weights: it makes better images than the generator that trains."""

from collections.abc import Mapping

import torch
from torch import Tensor

from gan.flat import Flat
from gan.schedules import Moment, ema_beta, stage_start
from gan.state import Task


def average_weights(task: Task, now: Moment) -> dict[int, float]:
    """For each stage that trains, 1 - beta of its parameters in this step; beta ramps up from the stage's beginning."""
    config = task.config
    images = config.batch * config.optimizer.n_critic
    weights = {}
    for stage in range(now.stage + 1):
        since = now.images_seen + config.batch - stage_start(task.schedule, stage)
        weights[stage] = 1 - ema_beta(images, since, 1000 * config.ema.kimg, config.ema.rampup)
    return weights


@torch.no_grad()
def update_average(average: Flat, model: Flat, numbers: Mapping[str, Tensor], void: Tensor) -> None:
    """average <- beta * average + (1 - beta) * model for the parameters of the stages that train, unless `void` is 1.

    numbers: holds 1 - beta of each such stage, as `average/STAGE` (`gan.inputs.step_numbers`).
    """
    sound = 1 - void.to(average.data.dtype)
    for stage, part in average.stages.items():
        if f"average/{stage}" in numbers:
            average.data[part].lerp_(model.data[part], numbers[f"average/{stage}"] * sound)
