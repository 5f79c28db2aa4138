"""D as a method sees it: a function of images and of the purpose for which they are shown."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from gan.draws import Draws
from gan.methods.augment import augment


@dataclass(frozen=True)
class Critic:
    """Shows images to D as they are, changed at random, or under noise.

    Calling it maps (images [N, ...], purpose of the random draws) to D's outputs, [N] or [N, outputs].
    """

    D: Callable[[Tensor], Tensor]
    draws: Draws
    augment: bool = False  # change images at random first (gan/methods/augment.py)
    mirror: bool = False  # flipped images belong to the data, so flips are among such changes
    noise: float = 0.0  # standard deviation of Gaussian noise that is added

    def __call__(self, images: Tensor, purpose: str) -> Tensor:
        if self.augment:
            images = augment(images, self.draws, purpose, self.mirror)
        if self.noise:
            images = images + self.noise * self.draws.noise(f"instance noise: {purpose}", images)
        return self.D(images)


def no_critic(images: Tensor) -> Tensor:
    """In D's place where an objective compares the images themselves: [N, ...] -> [N, features]."""
    return images.flatten(1)
