"""The moving average of the generator's weights: it makes better images than the generator that trains."""

import torch
from torch import Tensor

from gan.config import TrainConfig
from gan.flat import Flat
from gan.schedules import Moment, Schedule, ema_beta, stage_start


@torch.no_grad()
def update_average(
    average: Flat, model: Flat, config: TrainConfig, schedule: Schedule, now: Moment, void: Tensor
) -> None:
    """average <- beta * average + (1 - beta) * model for the parameters of the stages that train, unless `void` is 1.

    beta ramps up from the beginning of each parameter's own stage.
    """
    images = config.batch * config.optimizer.n_critic
    end_of_step = now.images_seen + config.batch
    sound = 1 - void.to(average.data.dtype)
    for stage, part in average.stages.items():
        if stage <= now.stage:
            since = end_of_step - stage_start(schedule, stage)
            beta = ema_beta(images, since, 1000 * config.ema.kimg, config.ema.rampup)
            average.data[part].lerp_(model.data[part], (1 - beta) * sound)
