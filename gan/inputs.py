"""What a step gets from the host, as tensors on its device: images, labels, the numbers of its schedules, random draws.

Nothing else differs between two steps of one kind, that is with the same stage, fading or not, and the same penalties
and updates due. So a step of that kind can be captured once as a CUDA graph and run again with other inputs.
"""

import torch
from torch import Tensor

from gan.average import average_weights
from gan.draws import send
from gan.schedules import Moment
from gan.state import StepInputs, Task


def step_inputs(task: Task, now: Moment, images: Tensor, labels: Tensor | None, stopping: float = 0.0) -> StepInputs:
    """The inputs of one step. images: uint8 [n, H, W, C] and labels: int64 [n] or None, this rank's share of the
    samples from `now.images_seen` on. stopping: 1 if this rank was asked to stop, else 0."""
    numbers = step_numbers(task, now, stopping)
    values = send(torch.tensor(list(numbers.values()), dtype=task.dtype), task.ranks.device)
    return StepInputs(images, labels, dict(zip(numbers, values.unbind(), strict=True)), task.draws(now.images_seen))


def step_numbers(task: Task, now: Moment, stopping: float) -> dict[str, float]:
    """By name: alpha, stopping, the learning rate of each optimizer, the share of the generator's weights that its
    averages take, for each stage that trains (`G_ema/0`, ...), and what the family adds."""
    rates = {name: task.rate(name) * now.lr_scale for name in task.family.optimizers}
    shares = average_weights(task, now)
    return {"alpha": now.alpha, "stopping": stopping, **task.family.numbers(task, now), **rates, **shares}
