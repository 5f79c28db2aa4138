"""One residual generator and one residual discriminator for every resolution, growing or not.

Stage s works at resolution base * 2**s. The modules `blocks[s]`, `to_image[s]` and `from_image[s]` belong to stage s,
and modules without an index to stage 0. `stage` is a Python integer. In training, `alpha` is a 0-dim tensor while a
stage fades in, and otherwise the number 1.

Images and activations are channels_last in memory from end to end. `compute` is the dtype of convolutions and
activations; the layers that make latents, images and logits compute in the weights' own dtype.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from gan.config import TrainConfig
from gan.errors import UserError
from gan.layers import GAIN, Conv2d, Embedding, Linear, minibatch_stddev, pixel_norm, scaled
from gan.precision import compute_dtype
from gan.recompute import recomputed
from ops import bias_leaky_relu, conv2d, downsample2d, setup_filter, upsample2d

Alpha = Tensor | float
HALF = 0.5  # of a block's variance its convolutions make, and the other half its skip connection


def size_at(base: tuple[int, int], stage: int) -> tuple[int, int]:
    """(height, width) of the images of a stage; base: those of stage 0."""
    height, width = base
    return height << stage, width << stage


@dataclass(frozen=True)
class ImageFormat:
    """What the networks must know about a dataset."""

    channels: int
    base: tuple[int, int]  # (height, width) at stage 0
    last: int  # the stage at which training ends
    class_names: tuple[str, ...]
    dataset_hash: str

    def size(self, stage: int) -> tuple[int, int]:
        """(height, width) of the images of a stage."""
        return size_at(self.base, stage)

    @property
    def pictures(self) -> bool:
        """Are they images that one can look at? Vectors are images of one row."""
        return self.size(self.last)[0] > 1

    def size_name(self, stage: int) -> str:
        """The same for people: "16x16"."""
        return "{}x{}".format(*self.size(stage))


@cache
def stage_of(name: str) -> int:
    """The stage a parameter belongs to, by its name."""
    match = re.search(r"\b(?:blocks|to_image|from_image)\.(\d+)\.", name)
    return int(match[1]) if match else 0


def is_fading(alpha: Alpha) -> bool:
    """Does the stage fade in? It does if alpha is a tensor or a number below 1."""
    return isinstance(alpha, Tensor) or alpha < 1


def fade(old: Tensor, new: Tensor, alpha: Alpha) -> Tensor:
    """(1 - alpha) * old + alpha * new."""
    return old + (new - old) * alpha


def channels_last(x: Tensor) -> Tensor:
    """x [N, C, H, W], or a copy that is channels_last in memory."""
    return x.contiguous(memory_format=torch.channels_last)


class Stem(nn.Module):
    """[N, width * h * w] -> [N, width, h, w]: the generator's stage 0."""

    def __init__(self, width: int, base: tuple[int, int]):
        super().__init__()
        self.shape = (width, *base)
        self.conv = Conv2d(width, width, 3, activate=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(bias_leaky_relu(channels_last(x.unflatten(1, self.shape))))


class ResidualBlock(nn.Module):
    """[N, width, H, W] -> the same;  sqrt(1 - r) x + sqrt(r) conv(conv(x)), of which r is `residual`."""

    def __init__(self, width: int, residual: float = HALF):
        super().__init__()
        self.conv0 = Conv2d(width, width, 3, activate=True)
        self.conv1 = Conv2d(width, width, 3, activate=True)
        self.gain, self.skip_gain = gains(residual)

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.conv1(self.conv0(x), gain=self.gain), x, alpha=self.skip_gain)


class GrowBlock(nn.Module):
    """[N, in, H, W] -> [N, out, 2H, 2W];  sqrt(1 - r) up(x) + sqrt(r) conv(conv(up(x))), then further blocks."""

    def __init__(self, inputs: int, outputs: int, residual: float = HALF, depth: int = 1):
        super().__init__()
        self.conv0 = Conv2d(inputs, outputs, 3, activate=True)
        self.conv1 = Conv2d(outputs, outputs, 3, activate=True)
        self.skip = skip_connection(inputs, outputs, residual)
        self.gain, self.skip_gain = gains(residual)
        self.more = nn.Sequential(*(ResidualBlock(outputs, residual) for _ in range(depth - 1)))

    def forward(self, x: Tensor, filter: Tensor) -> Tensor:
        # A 1x1 convolution commutes with upsampling, and costs less before it.
        skip = None if self.skip is None else upsample2d(self.skip(x), filter, gain=self.skip_gain)
        y = self.conv1(self.conv0(upsample2d(x, filter)), gain=self.gain)
        return self.more(y if skip is None else skip + y)


class ShrinkBlock(nn.Module):
    """[N, in, 2H, 2W] -> [N, out, H, W];  further blocks, then sqrt(1 - r) down(x) + sqrt(r) down(conv(conv(x)))."""

    def __init__(self, inputs: int, outputs: int, residual: float = HALF, depth: int = 1):
        super().__init__()
        hidden = min(inputs, outputs)
        self.conv0 = Conv2d(inputs, hidden, 3, activate=True)
        self.conv1 = Conv2d(hidden, outputs, 3, activate=True)
        self.skip = skip_connection(inputs, outputs, residual)
        self.gain, self.skip_gain = gains(residual)
        self.more = nn.Sequential(*(ResidualBlock(inputs, residual) for _ in range(depth - 1)))

    def forward(self, x: Tensor, filter: Tensor) -> Tensor:
        x = self.more(x)
        skip = None if self.skip is None else self.skip(downsample2d(x, filter, gain=self.skip_gain))
        y = downsample2d(self.conv1(self.conv0(x), gain=self.gain), filter)
        return y if skip is None else skip + y


def gains(residual: float) -> tuple[float, float]:
    """Of the last leaky ReLU of a block's convolutions, and of what goes round them."""
    return GAIN * math.sqrt(residual), math.sqrt(1 - residual)


def skip_connection(inputs: int, outputs: int, residual: float) -> nn.Module | None:
    """What a block's input passes on its way round the convolutions; None if these make all of the output."""
    if residual == 1:
        return None
    return Conv2d(inputs, outputs, 1, bias=False) if inputs != outputs else nn.Identity()


class Head(nn.Module):
    """[N, width, h, w] -> features [N, width]: the discriminator's stage 0."""

    def __init__(self, width: int, base: tuple[int, int], stddev_group: int):
        super().__init__()
        self.stddev_group = stddev_group
        self.conv = Conv2d(width + (stddev_group > 0), width, 3, activate=True)
        self.linear = Linear(width * math.prod(base), width, activate=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear((self._with_deviation(x) if self.stddev_group else self.conv(x)).flatten(1))

    def _with_deviation(self, x: Tensor) -> Tensor:
        """`conv` of x with one more channel, which holds the same standard deviation everywhere. That channel's share
        is the deviation times a convolution of ones, so it needs no copy of x, nor an odd number of channels."""
        weight = self.conv.weight
        ones = torch.ones_like(x[:1, :1])
        share = conv2d(ones, scaled(weight[:, -1:], self.conv.scale, x.dtype), self.conv.padding)
        deviation = minibatch_stddev(x.to(weight.dtype), self.stddev_group).to(x.dtype).view(-1, 1, 1, 1)
        y = conv2d(x, scaled(weight[:, :-1], self.conv.scale, x.dtype), self.conv.padding)
        return self.conv.finish(torch.addcmul(y, deviation, share))


def run_block(network: Any, index: int, x: Tensor) -> Tensor:
    """The block of a stage after the first; its activations are kept for the backward pass, or computed again there."""
    block = network.blocks[index]
    again = 0 < network.recompute <= index and torch.is_grad_enabled()
    return recomputed(block, x, network.filter) if again else block(x, network.filter)


class ResNetGenerator(nn.Module):
    """Latents [N, z_dim] (and labels [N] if classes > 0) -> images [N, channels, H, W], about in [-1, 1]."""

    filter: Tensor
    box: Tensor
    latent_mean: Tensor
    compute: torch.dtype | None = None  # of convolutions and activations; None: that of the weights
    recompute = 0  # blocks of this stage and later ones are computed again in the backward pass; 0: none

    def __init__(
        self,
        z_dim: int,
        widths: Sequence[int],
        channels: int = 3,
        base: tuple[int, int] = (4, 4),
        classes: int = 0,
        filter: Sequence[float] = (1, 3, 3, 1),
        class_gain: float = 1.0,
        normalize: bool = True,
        residual: float = HALF,
        depth: int = 1,
    ):
        super().__init__()
        self.z_dim = z_dim
        self.normalize = pixel_norm if normalize else nn.Identity()  # what is done to latents first
        self.channels = channels
        self.base = base
        self.classes = classes
        self.embedding = Embedding(classes, z_dim) if classes else None
        self.class_gain = class_gain  # root mean square of the class's part of the input; that of z's part is 1
        self.first = Linear(z_dim * (2 if classes else 1), widths[0] * math.prod(base))
        self.blocks = nn.ModuleList([Stem(widths[0], base)])
        self.blocks.extend(GrowBlock(a, b, residual, depth) for a, b in pairwise(widths))
        self.to_image = nn.ModuleList(Conv2d(width, channels, 1) for width in widths)
        self.register_buffer("filter", setup_filter(filter), persistent=False)
        self.register_buffer("box", setup_filter([1, 1]), persistent=False)  # images fade by 2x2 means, as the data
        # Part of the snapshot format. Older snapshots hold a mean over 10 000 latents here, which is off by 1 %.
        self.register_buffer("latent_mean", torch.zeros(z_dim), persistent=False)

    def first_layer(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """z: [N, z_dim], labels: int64 [N] if the network has classes -> [N, F]. Truncation moves this output."""
        return self._first(self.normalize(z.to(self.first.weight.dtype)), labels)

    def mean_first_layer(self, labels: Tensor | None = None) -> Tensor:
        """Mean of `first_layer` over all latents, for each label: [N, F], or [1, F] without labels. The layer is
        linear, so this is its output for the mean latent, which is 0, as z and -z are equally likely."""
        return self._first(self.first.weight.new_zeros(1 if labels is None else len(labels), self.z_dim), labels)

    def _first(self, z: Tensor, labels: Tensor | None) -> Tensor:
        if (labels is None) == bool(self.classes):
            raise ValueError(
                f"ResNetGenerator: {'needs' if self.classes else 'takes no'} labels ({self.classes} classes)"
            )
        if self.embedding is not None:
            z = torch.cat([z, pixel_norm(self.embedding(labels)) * self.class_gain], 1)
        return self.first(z)

    def synthesize(self, w: Tensor, stage: int, alpha: Alpha = 1.0) -> Tensor:
        """w: [N, F] from `first_layer` -> [N, channels, H, W] of the stage; alpha < 1 blends in the stage before."""
        old = x = self.blocks[0](w.to(self.compute or w.dtype))
        for index in range(1, stage + 1):
            old, x = x, run_block(self, index, x)
        image = self.to_image[stage](x)
        if stage == 0 or not is_fading(alpha):
            return image
        return fade(upsample2d(self.to_image[stage - 1](old), self.box), image, alpha)

    def forward(self, z: Tensor, stage: int, alpha: Alpha = 1.0, labels: Tensor | None = None) -> Tensor:
        return self.synthesize(self.first_layer(z, labels), stage, alpha)


class ResNetDiscriminator(nn.Module):
    """Images [N, channels, H, W] (and labels [N] if classes > 0) -> logits [N]. Labels enter by projection
    (Miyato & Koyama 2018)."""

    filter: Tensor
    box: Tensor
    compute: torch.dtype | None = None  # as of the generator, as is the next
    recompute = 0

    def __init__(
        self,
        widths: Sequence[int],
        channels: int = 3,
        base: tuple[int, int] = (4, 4),
        classes: int = 0,
        filter: Sequence[float] = (1, 3, 3, 1),
        stddev_group: int = 4,
        outputs: int = 1,
        residual: float = HALF,
        depth: int = 1,
    ):
        super().__init__()
        self.classes = classes
        self.outputs = outputs
        self.blocks = nn.ModuleList([Head(widths[0], base, stddev_group)])
        self.blocks.extend(ShrinkBlock(b, a, residual, depth) for a, b in pairwise(widths))
        self.from_image = nn.ModuleList(Conv2d(channels, width, 1, activate=True) for width in widths)
        self.logit = Linear(widths[0], outputs)
        self.embedding = Embedding(classes, widths[0]) if classes else None
        self.register_buffer("filter", setup_filter(filter), persistent=False)
        self.register_buffer("box", setup_filter([1, 1]), persistent=False)

    def forward(
        self,
        images: Tensor,
        stage: int,
        alpha: Alpha = 1.0,
        labels: Tensor | None = None,
        compute: torch.dtype | None = None,
    ) -> Tensor:
        """images: [N, channels, H, W] of the stage -> logits [N], or [N, outputs] for several outputs; alpha < 1 blends
        in the stage before. compute: the dtype for this pass, instead of the network's own."""
        if (labels is None) == bool(self.classes):
            raise ValueError(f"ResNetDiscriminator: {'needs' if self.classes else 'takes no'} labels")
        weights = self.filter.dtype
        images = channels_last(images.to(compute or self.compute or weights))
        x = self.from_image[stage](images)
        for index in range(stage, 0, -1):
            x = run_block(self, index, x)
            if index == stage and is_fading(alpha):
                x = fade(self.from_image[stage - 1](downsample2d(images, self.box)), x, alpha)
        x = self.blocks[0](x).to(weights)
        logits = self.logit(x)
        if self.embedding is not None:
            logits = logits + (self.embedding(labels) * x).sum(1, keepdim=True) / math.sqrt(x.shape[1])
        return logits.squeeze(1) if self.outputs == 1 else logits


def default_widths(base: tuple[int, int], last: int, channel_base: int, channel_max: int) -> tuple[int, ...]:
    """Channels per stage: min(channel_base / longer side, channel_max), coarsest first."""
    return tuple(max(min(channel_base // (max(base) * 2**s), channel_max), 1) for s in range(last + 1))


def network_widths(config: TrainConfig, images: ImageFormat) -> tuple[int, ...]:
    """Channels per stage, as configured or by default. Raises UserError if there is not one number per stage."""
    n = config.network
    widths = n.widths or default_widths(images.base, images.last, n.channel_base, n.channel_max)
    if len(widths) != images.last + 1 or min(widths) < 1:
        raise UserError(f"network.widths {list(widths)} must be {images.last + 1} positive numbers, one per stage")
    return widths


def build_generator(config: TrainConfig, images: ImageFormat) -> ResNetGenerator:
    """G with random weights, drawn from torch's global generator. Raises UserError for widths that do not fit."""
    G = ResNetGenerator(
        config.network.z_dim,
        network_widths(config, images),
        images.channels,
        images.base,
        classes=image_classes(config, images),
        filter=config.network.filter,
        class_gain=config.network.class_gain,
        residual=config.network.residual,
        depth=config.network.depth,
    )
    G.compute = compute_dtype(config)
    G.recompute = config.network.recompute
    return G


def build_discriminator(config: TrainConfig, images: ImageFormat, outputs: int = 1) -> ResNetDiscriminator:
    """D with random weights and `outputs` logits per image; random state and errors are as in `build_generator`."""
    D = ResNetDiscriminator(
        network_widths(config, images),
        images.channels,
        images.base,
        classes=image_classes(config, images),
        filter=config.network.filter,
        stddev_group=config.distributed.group if config.network.minibatch_stddev else 0,
        outputs=outputs,
        residual=config.network.residual,
        depth=config.network.depth,
    )
    D.compute = compute_dtype(config)
    D.recompute = config.network.recompute
    return D


def image_classes(config: TrainConfig, images: ImageFormat) -> int:
    """How many classes the networks are told of: none unless the run is conditional."""
    return len(images.class_names) if config.data.cond else 0
