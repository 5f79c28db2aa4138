"""The network of a variational autoencoder: encoder, posterior, decoder and likelihood, as one module.

The decoder is the GAN's generator, or layers that see all pixels at once. To everything that makes images of latents
the module looks like a generator: it maps draws of the prior to the likelihood's mean.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from gan.config import TrainConfig
from gan.layers import Conv2d, Embedding, Linear
from gan.methods.rows import look_up
from gan.networks import (
    Alpha,
    Head,
    ImageFormat,
    ResNetGenerator,
    ShrinkBlock,
    channels_last,
    image_classes,
    network_widths,
    run_block,
)
from gan.precision import compute_dtype
from gan.vae.gaussians import normal_log_density
from gan.vae.likelihoods import LIKELIHOODS, Likelihood
from gan.vae.posteriors import POSTERIORS, stopped_log_density
from ops import setup_filter

FIRST_SCALE = 0.5  # of pixels in [-1, 1], before one is learned


@dataclass(frozen=True)
class Evidence:
    """What k latents of each of N images say of log p(x)."""

    z: Tensor  # [k, N, d]
    log_likelihood: Tensor  # log p(x | z), [k, N]
    log_prior: Tensor  # log p(z), [k, N]
    log_q: Tensor  # log q(z | x), [k, N]
    divergence: Tensor  # KL(q || p) [N]: exact where that is known, else a mean over the k latents
    squared_error: Tensor  # of the likelihood's mean, per number of an image, over the latents; 0 without a scale: [N]
    features: Tensor  # what the posterior knew of the images, [N, F]
    stopped: bool  # does log_q's gradient reach z only?

    @property
    def log_weights(self) -> Tensor:
        """log p(x, z) - log q(z | x), [k, N]."""
        return self.log_likelihood + self.log_prior - self.log_q


class ConvEncoder(nn.Module):
    """The discriminator's blocks: images [N, C, H, W] -> features [N, widths[0]]."""

    filter: Tensor
    recompute = 0  # as of the discriminator

    def __init__(
        self,
        widths: Sequence[int],
        channels: int,
        base: tuple[int, int],
        filter: Sequence[float],
        residual: float,
        depth: int,
    ):
        super().__init__()
        self.features = widths[0]
        self.blocks = nn.ModuleList([Head(widths[0], base, stddev_group=0)])
        self.blocks.extend(ShrinkBlock(b, a, residual, depth) for a, b in pairwise(widths))
        self.from_image = Conv2d(channels, widths[-1], 1, activate=True)
        self.register_buffer("filter", setup_filter(filter), persistent=False)
        self.compute: torch.dtype | None = None

    def forward(self, images: Tensor) -> Tensor:
        x = self.from_image(channels_last(images.to(self.compute or self.filter.dtype)))
        for index in range(len(self.blocks) - 1, 0, -1):
            x = run_block(self, index, x)
        return self.blocks[0](x).to(self.filter.dtype)


class CReLU(nn.Module):
    """[N, in] -> [N, 2 out]: the positive and the negative part of a linear map, side by side (Shang et al. 2016)."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.linear = Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return both_parts(self.linear(x))


def both_parts(x: Tensor) -> Tensor:
    """[N, n] -> [N, 2 n]: positive and negative parts, with a gain that keeps the mean square."""
    return torch.cat([x, -x], 1).relu() * math.sqrt(2)


class DenseEncoder(nn.Module):
    """Layers of CReLU that see all numbers of an image at once: [N, ...] -> [N, 2 hidden[-1]]."""

    def __init__(self, hidden: Sequence[int], numbers: int):
        super().__init__()
        sizes = [numbers, *(2 * size for size in hidden)]
        self.features = sizes[-1]
        self.layers = nn.Sequential(*(CReLU(a, b) for a, b in zip(sizes, hidden, strict=False)))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images.flatten(1))


class DenseDecoder(nn.Module):
    """The same the other way, with the interface of a generator: latents [N, z_dim] -> [N, *shape]."""

    filter: Tensor

    def __init__(
        self, z_dim: int, hidden: Sequence[int], shape: tuple[int, int, int], base: tuple[int, int], classes: int
    ):
        super().__init__()
        self.z_dim = z_dim
        self.shape = shape
        self.base = base
        self.classes = classes
        self.embedding = Embedding(classes, z_dim) if classes else None
        self.first = CReLU(z_dim * (2 if classes else 1), hidden[0])
        self.layers = nn.Sequential(*(CReLU(2 * a, b) for a, b in pairwise(hidden)))
        self.last = Linear(2 * hidden[-1], math.prod(shape))
        self.register_buffer("filter", setup_filter([1, 1]), persistent=False)
        self.register_buffer("latent_mean", torch.zeros(z_dim), persistent=False)
        self.compute: torch.dtype | None = None

    def first_layer(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        if self.embedding is not None:
            z = torch.cat([z, self.embedding(labels)], 1)
        return self.first.linear(z.to(self.filter.dtype))

    def mean_first_layer(self, labels: Tensor | None = None) -> Tensor:
        return self.first_layer(self.filter.new_zeros(1 if labels is None else len(labels), self.z_dim), labels)

    def synthesize(self, w: Tensor, stage: int, alpha: Alpha = 1.0) -> Tensor:
        return self.last(self.layers(both_parts(w))).unflatten(1, self.shape)


class VAE(nn.Module):
    """Encoder, posterior and decoder. It looks like a generator: latents [N, z_dim] -> images [N, channels, H, W]."""

    encoder: Any
    posterior: Any
    decoder: Any

    def __init__(
        self,
        encoder: Any,
        posterior: Any,
        decoder: Any,
        likelihood: Likelihood,
        channels: int,
        stage: int,
        log_scale: float,
        learns_scale: bool,
    ):
        super().__init__()
        self.encoder = encoder
        self.posterior = posterior
        self.decoder = decoder
        self.likelihood = likelihood
        self.channels = channels
        self.stage = stage
        self.log_scale = nn.Parameter(torch.tensor(log_scale))
        self.learns_scale = learns_scale  # by gradient; else it stays, or `gan.vae.trainer.follow_error` moves it
        self.embedding = Embedding(decoder.classes, decoder.z_dim) if decoder.classes else None

    # What a generator has.

    @property
    def z_dim(self) -> int:
        return self.decoder.z_dim

    @property
    def base(self) -> tuple[int, int]:
        return self.decoder.base

    @property
    def classes(self) -> int:
        return self.decoder.classes

    @property
    def filter(self) -> Tensor:
        return self.decoder.filter

    @property
    def latent_mean(self) -> Tensor:
        return self.decoder.latent_mean

    @property
    def compute(self) -> torch.dtype | None:
        return self.decoder.compute

    @compute.setter
    def compute(self, dtype: torch.dtype | None) -> None:
        self.encoder.compute = dtype
        self.decoder.compute = dtype

    def first_layer(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.decoder.first_layer(z, labels)

    def mean_first_layer(self, labels: Tensor | None = None) -> Tensor:
        return self.decoder.mean_first_layer(labels)

    def synthesize(self, w: Tensor, stage: int, alpha: Alpha = 1.0) -> Tensor:
        return self.likelihood.mean(self.decoder.synthesize(w, stage, alpha), self.channels)

    def forward(self, z: Tensor, stage: int, alpha: Alpha = 1.0, labels: Tensor | None = None) -> Tensor:
        return self.synthesize(self.first_layer(z, labels), stage, alpha)

    # What a likelihood model has.

    def features(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """What the posterior knows of images [N, C, H, W]: [N, F]."""
        h = self.encoder(images)
        return h if self.embedding is None else torch.cat([h, self.embedding(labels)], 1)

    @torch.no_grad()
    def encode(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """The codes [N, d] of images [N, C, H, W]: the latents that a noise of 0 makes."""

        def joint(z: Tensor) -> Tensor:
            return normal_log_density(z) + self.log_likelihood(z, images, labels)

        noise = images.new_zeros(1, len(images), self.posterior.noise)
        return self.posterior(noise, self.features(images, labels), joint=joint)[0][0]

    def outputs(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """What the likelihood takes, for latents [n, d]."""
        return self.decoder.synthesize(self.decoder.first_layer(z, labels), self.stage)

    def log_likelihood(self, z: Tensor, images: Tensor, labels: Tensor | None = None, masses: bool = False) -> Tensor:
        """log p(x | z) of images [N, ...] for latents [k, N, d]: [k, N]. masses: probabilities of levels."""
        return self._judge(z, images, labels, masses)[0]

    def _judge(self, z: Tensor, images: Tensor, labels: Tensor | None, masses: bool) -> tuple[Tensor, Tensor]:
        k = len(z)
        outputs = self.outputs(z.flatten(0, 1), None if labels is None else labels.repeat(k))
        x = images.repeat(k, 1, 1, 1)
        log_prob = self.likelihood.log_mass if masses else self.likelihood.log_prob
        log_scale = self.log_scale if self.learns_scale else self.log_scale.detach()
        values = log_prob(outputs, x, log_scale.to(x.dtype))
        values = values.unflatten(0, (k, -1))
        if not self.likelihood.scale:
            return values, torch.zeros_like(values[0])
        error = (self.likelihood.mean(outputs.detach(), self.channels) - x).square().flatten(1).mean(1)
        return values, error.unflatten(0, (k, -1)).mean(0)

    def evidence(
        self, images: Tensor, noise: Tensor, labels: Tensor | None = None, stopped: bool = False, masses: bool = False
    ) -> Evidence:
        """What latents made of noise [k, N, posterior.noise] say of images [N, C, H, W].

        stopped: the posterior's parameters count as constants where they enter its density
        (`gan.vae.bounds.doubly_reparameterized`). masses: probabilities of levels in place of densities.
        """
        h = self.features(images, labels)

        def joint(z: Tensor) -> Tensor:
            return normal_log_density(z) + self.log_likelihood(z, images, labels, masses)

        z, log_q = self.posterior(noise, h, joint=joint)
        if stopped:
            log_q = stopped_log_density(self.posterior, z, h)
        log_likelihood, error = self._judge(z, images, labels, masses)
        log_prior = normal_log_density(z)
        known = getattr(self.posterior, "divergence", lambda h: None)(h)
        return Evidence(
            z=z,
            log_likelihood=log_likelihood,
            log_prior=log_prior,
            log_q=log_q,
            divergence=(log_q - log_prior).mean(0) if known is None else known,
            squared_error=error,
            features=h,
            stopped=stopped,
        )


def build_vae(config: TrainConfig, images: ImageFormat) -> VAE:
    """The network with random weights, drawn from torch's global generator. Raises UserError for settings that do not
    fit together."""
    options = config.vae
    z_dim = config.network.z_dim
    classes = image_classes(config, images)
    likelihood = LIKELIHOODS[options.likelihood]
    outputs = likelihood.outputs(images.channels)
    size = images.size(images.last)
    encoder: Any
    decoder: Any
    if options.hidden:
        encoder = DenseEncoder(options.hidden, images.channels * math.prod(size))
        decoder = DenseDecoder(z_dim, options.hidden[::-1], (outputs, *size), images.base, classes)
    else:
        widths = network_widths(config, images)
        n = config.network
        encoder = ConvEncoder(widths, images.channels, images.base, n.filter, n.residual, n.depth)
        decoder = ResNetGenerator(
            z_dim,
            widths,
            outputs,
            images.base,
            classes,
            filter=n.filter,
            class_gain=n.class_gain,
            normalize=False,
            residual=n.residual,
            depth=n.depth,
        )
        encoder.recompute = decoder.recompute = n.recompute
    features = encoder.features + (z_dim if classes else 0)
    posterior = look_up(
        "vae.posterior", options.posterior, POSTERIORS, features=features, d=z_dim, group=config.distributed.group
    )
    scale = FIRST_SCALE if isinstance(options.scale, str) else options.scale
    learns_scale = options.scale == "learned"
    G = VAE(encoder, posterior, decoder, likelihood, images.channels, images.last, math.log(scale), learns_scale)
    G.compute = compute_dtype(config)
    return G
