"""Estimates of log p(x) of images by a trained model: a table of estimators, and what they say in bits per number."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gan.errors import UserError
from gan.methods.rows import Entry, look_up
from gan.vae.annealing import annealed_log_weights
from gan.vae.bounds import elbo, iwae, jackknife
from gan.vae.groups import Grouped
from gan.vae.model import VAE
from gan.vae.posteriors import Implicit, at_least_one

AT_A_TIME = 1 << 22  # numbers that the decoder makes at a time


@dataclass(frozen=True)
class Scene:
    """A model, images [N, C, H, W] in [-1, 1] with their labels, and where random numbers come from."""

    G: VAE
    images: Tensor
    labels: Tensor | None
    generator: torch.Generator
    levels: bool = True  # are numbers levels, which have probabilities? Vectors have densities

    def log_weights(self, draws: int) -> Tensor:
        """[draws, N], float64."""
        channels = self.images.shape[1]
        numbers = self.images.numel() // channels * self.G.likelihood.outputs(channels)
        step = max(AT_A_TIME // numbers, 1)
        return torch.cat([self._some_log_weights(min(step, draws - first)) for first in range(0, draws, step)])

    @torch.no_grad()
    def _some_log_weights(self, draws: int) -> Tensor:
        noise = self.normal(draws, self.G.posterior.noise)
        evidence = self.G.evidence(self.images, noise, self.labels, masses=self.levels)
        return evidence.log_weights.double()

    def normal(self, draws: int, size: int) -> Tensor:
        """Standard normal [draws, N, size]."""
        like = self.images
        shape = (draws, len(like), size)
        return torch.randn(shape, generator=self.generator, dtype=like.dtype, device=like.device)


Estimator = Callable[[Scene], Tensor]  # -> log p(x) of each image [N], in nats


def _of_weights(draws: int, estimate: Callable[[Tensor], Tensor]) -> Estimator:
    draws = at_least_one("draws", draws)

    def estimator(scene: Scene) -> Tensor:
        if isinstance(scene.G.posterior, Implicit | Grouped):
            raise UserError(
                "an implicit posterior's density is its adversary's guess, and a grouped one's is of no single image: "
                "they bound nothing; ask for ais"
            )
        return estimate(scene.log_weights(draws))

    return estimator


def _jackknife(draws: int, order: int) -> Estimator:
    if not 0 <= order < draws:
        raise UserError(f"order={order} needs more than {order} draws")
    return _of_weights(draws, lambda log_weights: jackknife(log_weights, order))


def _annealed(steps: int, chains: int) -> Estimator:
    at_least_one("steps", steps)
    at_least_one("chains", chains)

    def estimator(scene: Scene) -> Tensor:
        def log_likelihood(z: Tensor) -> Tensor:
            return scene.G.log_likelihood(z, scene.images, scene.labels, masses=scene.levels)

        start = scene.normal(chains, scene.G.z_dim)
        return iwae(annealed_log_weights(log_likelihood, start, steps, scene.generator).double())

    return estimator


ESTIMATORS: dict[str, Entry[Estimator]] = {
    "elbo": Entry("the evidence lower bound", lambda draws: _of_weights(draws, elbo), {"draws": 16}),
    "iwae": Entry("log of the mean weight, a tighter bound", lambda draws: _of_weights(draws, iwae), {"draws": 5000}),
    "jackknife": Entry("that, with most of its bias removed: no bound", _jackknife, {"draws": 64, "order": 1}),
    "ais": Entry("annealed importance sampling: a bound without a posterior", _annealed, {"steps": 500, "chains": 16}),
}


def find_estimator(name: str) -> Estimator:
    """The estimator of a name such as `iwae:draws=100`. Raises UserError for what does not exist or cannot be."""
    return look_up("--likelihood", name, ESTIMATORS)


def bits_per_number(log_prob: float, numbers: int) -> float:
    """Nats per image -> bits per number of an image, which are comparable between sizes."""
    return -log_prob / (numbers * math.log(2))
