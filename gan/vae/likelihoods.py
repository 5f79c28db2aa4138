"""Likelihoods p(x | z): what the decoder's outputs say of an image, pixel by pixel.

An image x is [N, C, H, W] with 256 levels in [-1, 1]; outputs are [N, outputs(C), H, W]. Training maximizes `log_prob`,
which for `gaussian` is a density; `log_mass` is the probability of the levels, which can be given in bits per number.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

HALF_LEVEL = 1 / 255
TINY = 1e-12
MIXTURES = 10  # logistic distributions that a pixel's colors are a mixture of (Salimans et al. 2017)
SHARPEST = -7.0  # lower bound of the logarithm of a logistic's scale (Salimans et al. 2017)


def binarized(images: Tensor, coins: Tensor) -> Tensor:
    """Images in [-1, 1] -> black and white, -1 and 1: white with a probability that is the brightness. coins: uniform
    on [0, 1), of that shape."""
    return torch.where(coins < (images + 1) / 2, 1.0, -1.0).to(images)


def per_image(values: Tensor) -> Tensor:
    """The sum over all but the first axis."""
    return values.flatten(1).sum(1)


def gaussian_log_density(outputs: Tensor, x: Tensor, log_scale: Tensor) -> Tensor:
    """log N(x; outputs, scale²) of pixels in [-1, 1]: [N]."""
    error = (x - outputs).square() * torch.exp(-2 * log_scale)
    return -0.5 * per_image(error + (2 * log_scale + math.log(2 * math.pi)))


def gaussian_log_mass(outputs: Tensor, x: Tensor, log_scale: Tensor) -> Tensor:
    """The log probability that N(outputs, scale²) falls within half a level of x; the lowest and the highest level have
    all beyond: [N]."""
    return per_image(log_mass(x, outputs, torch.exp(-log_scale), torch.special.log_ndtr))


def log_mass(x: Tensor, mean: Tensor, sharpness: Tensor, log_cdf: Callable[[Tensor], Tensor]) -> Tensor:
    """log P(level x) under a symmetric distribution with this mean and 1 / scale, `log_cdf` being that of mean 0 and
    scale 1.

    The difference of the distribution function at both edges is taken in its lower tail, where it keeps its digits.
    """
    distance = (x - mean).abs()
    near = log_cdf((HALF_LEVEL - distance) * sharpness)
    far = log_cdf((-HALF_LEVEL - distance) * sharpness)
    inside = near + log1mexp(far - near)
    lowest = log_cdf((x + HALF_LEVEL - mean) * sharpness)
    highest = log_cdf((mean - x + HALF_LEVEL) * sharpness)
    return torch.where(x < -1 + HALF_LEVEL, lowest, torch.where(x > 1 - HALF_LEVEL, highest, inside))


def log1mexp(a: Tensor) -> Tensor:
    """log(1 - exp(a)) for a < 0, without loss of digits."""
    a = a.clamp(max=-TINY)
    return torch.where(a > -math.log(2), torch.log(-torch.expm1(a)), torch.log1p(-torch.exp(a)))


def bernoulli_log_prob(outputs: Tensor, x: Tensor, log_scale: Tensor) -> Tensor:
    """log P(x) of black and white pixels, -1 and 1, of which outputs are the logits: [N]."""
    return -per_image(F.softplus(-x * outputs))


@dataclass(frozen=True)
class Mixture:
    """For each pixel a mixture of logistic distributions of its colors; the mean of a color moves with those before it
    (Salimans et al. 2017, section 2.2)."""

    log_weights: Tensor  # [N, M, 1, H, W]
    means: Tensor  # [N, M, C, H, W]
    log_scales: Tensor  # [N, M, C, H, W]
    links: Tensor  # [N, M, C (C - 1) / 2, H, W]: of color c to each color before it

    @staticmethod
    def of(outputs: Tensor, channels: int) -> "Mixture":
        """From the decoder's outputs [N, mixture_outputs(C), H, W]."""
        pairs = channels * (channels - 1) // 2
        weights, rest = outputs.split([MIXTURES, outputs.shape[1] - MIXTURES], 1)
        rest = rest.unflatten(1, (MIXTURES, 2 * channels + pairs))
        means, log_scales, links = rest.split([channels, channels, pairs], 2)
        return Mixture(weights.log_softmax(1).unsqueeze(2), means, log_scales.clamp(min=SHARPEST), links.tanh())

    def moved(self, x: Tensor) -> Tensor:
        """The means, given the colors x [N, 1 or M, C, H, W]: each depends on those before it only."""
        moved = []
        for c in range(self.means.shape[2]):
            first = c * (c - 1) // 2
            links = self.links[:, :, first : first + c]
            moved.append(self.means[:, :, c] + (links * x[:, :, :c]).sum(2))
        return torch.stack(moved, 2)


def mixture_outputs(channels: int) -> int:
    """How many numbers a pixel's mixture has."""
    return MIXTURES * (1 + 2 * channels + channels * (channels - 1) // 2)


def mixture_log_prob(outputs: Tensor, x: Tensor, log_scale: Tensor) -> Tensor:
    """log P(levels x) under the mixtures: [N]."""
    mixture = Mixture.of(outputs, x.shape[1])
    x = x.unsqueeze(1)
    means = mixture.moved(x)
    values = log_mass(x.expand_as(means), means, torch.exp(-mixture.log_scales), F.logsigmoid)
    return per_image((mixture.log_weights + values.sum(2, keepdim=True)).logsumexp(1))


def mixture_mean(outputs: Tensor, channels: int) -> Tensor:
    """The colors [N, C, H, W] that the means of the mixture's parts have on average."""
    mixture = Mixture.of(outputs, channels)
    colors: list[Tensor] = []
    for c in range(channels):
        first = c * (c - 1) // 2
        color = mixture.means[:, :, c]
        for before, link in zip(colors, mixture.links[:, :, first : first + c].unbind(2), strict=True):
            color = color + link * before
        colors.append(color.clamp(-1, 1))
    return (mixture.log_weights.exp() * torch.stack(colors, 2)).sum(1)


@dataclass(frozen=True)
class Likelihood:
    """One row. All take the decoder's outputs, and the logarithm of a scale, which only `gaussian` uses."""

    outputs: Callable[[int], int]  # channels of the images -> of the decoder's last layer
    log_prob: Callable[[Tensor, Tensor, Tensor], Tensor]  # (outputs, images, log_scale) -> [N], for training
    log_mass: Callable[[Tensor, Tensor, Tensor], Tensor]  # the same, probabilities of levels, for evaluation
    mean: Callable[[Tensor, int], Tensor]  # (outputs, channels) -> images
    scale: bool = False  # is there a scale?
    binary: bool = False  # are images black and white?


LIKELIHOODS = {
    "gaussian": Likelihood(
        lambda channels: channels, gaussian_log_density, gaussian_log_mass, lambda outputs, _: outputs, scale=True
    ),
    "bernoulli": Likelihood(
        lambda channels: channels,
        bernoulli_log_prob,
        bernoulli_log_prob,
        lambda outputs, _: 2 * outputs.sigmoid() - 1,
        binary=True,
    ),
    "logistic": Likelihood(mixture_outputs, mixture_log_prob, mixture_log_prob, mixture_mean),
}
