"""Gradient penalties, as rows that say where each one applies. A penalty maps (logits [N], images) to [N].

No weight and no mean here: the step adds gamma / 2 * every * penalty. `r1` is E_P |grad D|^2 and `r1_r2` adds
E_Q |grad D|^2 (Mescheder et al. 2018, eq. 9 and 10); the square is summed over channels and pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ops import squared_norm

Penalty = Callable[[Tensor, Tensor], Tensor]


def zero_centered(logits: Tensor, images: Tensor) -> Tensor:
    """|grad_x D(x)|^2 per sample.  logits: [N], images: [N, C, H, W] that require grad -> [N], differentiable.

    Where D couples samples (minibatch standard deviation) this is the gradient of the sum over a coupling group.
    """
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return squared_norm(gradient)


@dataclass(frozen=True)
class Regularizer:
    """Where a penalty is taken; None where it is not."""

    summary: str
    on_real: Penalty | None = None
    on_fake: Penalty | None = None


REGULARIZERS = {
    "none": Regularizer("no regularizer"),
    "r1": Regularizer("squared gradient at the reals (Mescheder et al. 2018, eq. 9)", on_real=zero_centered),
    "r1_r2": Regularizer(
        "squared gradient at reals and fakes (Mescheder et al. 2018, eq. 9 and 10)",
        on_real=zero_centered,
        on_fake=zero_centered,
    ),
}
