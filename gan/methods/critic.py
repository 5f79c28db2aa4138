"""D as a method sees it: a function of images and of the purpose for which they are shown."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gan.draws import Draws
from gan.methods.augment import AUGMENTATIONS, Augmentation


@dataclass(frozen=True)
class Critic:
    """Shows images to D as they are, changed at random, or under noise.

    Calling it maps (images [N, ...], purpose of the random draws) to D's outputs, [N] or [N, outputs].
    """

    D: Callable[[Tensor], Tensor]
    draws: Draws
    augmentation: Augmentation = AUGMENTATIONS["none"]  # how images are changed at random first
    strength: Tensor | float = 0.0  # of an adaptive augmentation
    mirror: bool = False  # flipped images belong to the data, so flips are among such changes
    noise: Tensor | float | None = None  # standard deviation of Gaussian noise that is added
    D_for_penalties: Callable[[Tensor], Tensor] | None = None  # computes more precisely than D; None: D itself

    def __call__(self, images: Tensor, purpose: str) -> Tensor:
        return self.D(self._change(images, purpose))

    def both(self, first: Tensor, second: Tensor, purposes: tuple[str, str]) -> tuple[Tensor, Tensor]:
        """The same for two batches of equal length, shown to D as one."""
        images = [self._change(batch, purpose) for batch, purpose in zip((first, second), purposes, strict=True)]
        outputs = self.D(torch.cat(images))
        return outputs[: len(first)], outputs[len(first) :]

    def penalized(self) -> "Critic":
        """The same for images by which a penalty differentiates D."""
        return replace(self, D=self.D_for_penalties or self.D)

    def _change(self, images: Tensor, purpose: str) -> Tensor:
        if self.augmentation.change:
            images = self.augmentation.change(images, self.draws, purpose, self.mirror, self.strength)
        if self.noise is not None:
            images = images + self.noise * self.draws.noise(f"instance noise: {purpose}", images)
        return images


def with_labels(images: Tensor, D: nn.Module, labels: Tensor | None, **how: Any) -> Tensor:
    """D's outputs for images [k * n, ...] that have the labels [n] k times over, if they have labels. how: passed to
    D."""
    repeated = None if labels is None else labels.repeat(len(images) // len(labels))
    return D(images, labels=repeated, **how)


def no_critic(images: Tensor) -> Tensor:
    """In D's place where an objective compares the images themselves: [N, ...] -> [N, features]."""
    return images.flatten(1)
