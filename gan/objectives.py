"""Losses, as rows of pure functions: (real logits [N], fake logits [N]) -> [N], for D and for G; both are minimized.

A function may return [groups] instead, one value per coupling group. sp is softplus.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import softplus

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Objective:
    """`paired`: the generator's loss looks at real logits too, so the G step shows D the reals of the D step again."""

    summary: str
    discriminator: Loss
    generator: Loss
    paired: bool = False


OBJECTIVES = {
    "nonsaturating": Objective(
        "logistic D, G minimizes -log D(fake) (Goodfellow et al. 2014, section 3)",
        discriminator=lambda real, fake: softplus(-real) + softplus(fake),
        generator=lambda real, fake: softplus(-fake),
    ),
    "relativistic": Objective(
        "relativistic pairing: each real against one fake (Jolicoeur-Martineau 2019; Huang et al. 2024, eq. 2)",
        discriminator=lambda real, fake: softplus(fake - real),
        generator=lambda real, fake: softplus(real - fake),
        paired=True,
    ),
}
