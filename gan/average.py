"""The moving average of the generator's weights: it makes better images than the generator that trains."""

import torch
from torch import Tensor, nn

from gan.config import TrainConfig
from gan.networks import stage_of
from gan.schedules import Moment, Schedule, ema_beta, stage_start


@torch.no_grad()
def update_average(
    average: nn.Module, model: nn.Module, config: TrainConfig, schedule: Schedule, now: Moment, void: Tensor
) -> None:
    """average <- beta * average + (1 - beta) * model for the parameters of the stages that train, unless `void` is 1.

    beta ramps up from the beginning of each parameter's own stage.
    """
    images = config.batch * config.optimizer.n_critic
    end_of_step = now.images_seen + config.batch
    sound = 1 - void.to(next(average.parameters()).dtype)
    weights = {}
    for stage in range(now.stage + 1):
        since = end_of_step - stage_start(schedule, stage)
        beta = ema_beta(images, since, 1000 * config.ema.kimg, config.ema.rampup)
        weights[stage] = (1 - beta) * sound
    for (name, averaged), parameter in zip(average.named_parameters(), model.parameters(), strict=True):
        stage = stage_of(name)
        if stage <= now.stage:
            averaged.lerp_(parameter, weights[stage])
