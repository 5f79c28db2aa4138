"""The training step as one would write it in plain PyTorch: float32, NCHW, stock functions, eager, Adam and EMA.

It computes the step that `gan.trainer.train_step` computes, with the same networks and nothing of ours but the losses,
so `saddle benchmark step` can say what our ops and our step are worth.
"""

import copy
import math
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gan.config import TrainConfig
from gan.methods.pairs import configured
from gan.networks import HALF, ImageFormat, network_widths
from gan.schedules import ema_beta, gamma_at, learning_rate

PENALTIES = {"none": (), "r1": ("real",), "r2": ("fake",), "r1_r2": ("real", "fake")}  # where the gradient is squared


def obstacle(config: TrainConfig) -> str:
    """The setting for which there is no plain loop, or nothing."""
    lacking = {
        f"regularizer.name={config.regularizer.name}": config.regularizer.name not in PENALTIES,
        f"objective.name={config.objective.name}": configured(config)[0].discriminator is None,
        f"network.filter={list(config.network.filter)}": len(config.network.filter) % 2 == 1,
        f"network.depth={config.network.depth}": config.network.depth > 1,
        f"network.residual={config.network.residual:g}": config.network.residual != HALF,
        f"regularizer.share={config.regularizer.share:g}": config.regularizer.share < 1,
        "data.cond=1": config.data.cond,
        "data.mirror=1": config.data.mirror,
        f"data.aug={config.data.aug}": config.data.aug != "none",
    }
    return next((setting for setting, lacks in lacking.items() if lacks), "")


class Layer(nn.Module):
    """A linear layer or, with a kernel size, a convolution, with equalized learning rate; leaky ReLU is optional."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 0, activate: bool = False, bias: bool = True) -> None:
        super().__init__()
        shape = (outputs, inputs, kernel, kernel) if kernel else (outputs, inputs)
        self.weight = nn.Parameter(torch.randn(shape))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.scale = 1 / math.sqrt(inputs * max(kernel, 1) ** 2)
        self.kernel = kernel
        self.activate = activate

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * self.scale
        linear = partial(F.conv2d, padding=self.kernel // 2) if self.kernel else F.linear
        x = linear(x, weight, self.bias)
        return F.leaky_relu(x, 0.2) * math.sqrt(2) if self.activate else x


class Block(nn.Module):
    """G's block: (up(skip(x)) + convs(up(x))) / sqrt(2). D's: (skip(down(x)) + down(convs(x))) / sqrt(2)."""

    filter: Tensor

    def __init__(self, inputs: int, outputs: int, taps: tuple[float, ...], up: bool) -> None:
        super().__init__()
        hidden = outputs if up else min(inputs, outputs)
        self.conv0 = Layer(inputs, hidden, 3, activate=True)
        self.conv1 = Layer(hidden, outputs, 3, activate=True)
        self.skip = Layer(inputs, outputs, 1, bias=False) if inputs != outputs else nn.Identity()
        self.up = up
        line = torch.tensor(taps) / sum(taps)
        filter = torch.outer(line, line)[None, None]
        self.register_buffer("filter", 4 * filter if up else filter.flip(2, 3))

    def resample(self, x: Tensor) -> Tensor:
        """Twice or half the size, by a depthwise convolution."""
        function = F.conv_transpose2d if self.up else F.conv2d
        channels = x.shape[1]
        padding = self.filter.shape[-1] // 2 - 1
        return function(x, self.filter.expand(channels, -1, -1, -1), stride=2, padding=padding, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        if self.up:
            y = self.resample(self.skip(x)) + self.conv1(self.conv0(self.resample(x)))
        else:
            y = self.skip(self.resample(x)) + self.resample(self.conv1(self.conv0(x)))
        return y * math.sqrt(0.5)


class Generator(nn.Module):
    """[N, z_dim] -> [N, channels, H, W]."""

    def __init__(self, config: TrainConfig, images: ImageFormat, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = (widths[0], *images.base)
        self.first = Layer(config.network.z_dim, math.prod(self.shape))
        self.stem = Layer(widths[0], widths[0], 3, activate=True)
        self.blocks = nn.Sequential(*(Block(a, b, config.network.filter, up=True) for a, b in pairwise(widths)))
        self.to_image = Layer(widths[-1], images.channels, 1)

    def forward(self, z: Tensor) -> Tensor:
        z = z * torch.rsqrt(z.square().mean(1, keepdim=True) + 1e-8)
        x = F.leaky_relu(self.first(z).unflatten(1, self.shape), 0.2) * math.sqrt(2)
        return self.to_image(self.blocks(self.stem(x)))


class Discriminator(nn.Module):
    """[N, channels, H, W] -> logits [N], or [N, outputs]."""

    def __init__(self, config: TrainConfig, images: ImageFormat, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.group = config.distributed.group if config.network.minibatch_stddev else 0
        self.from_image = Layer(images.channels, widths[-1], 1, activate=True)
        self.blocks = nn.Sequential(*(Block(a, b, config.network.filter, up=False) for a, b in pairwise(widths[::-1])))
        self.conv = Layer(widths[0] + (self.group > 0), widths[0], 3, activate=True)
        self.linear = Layer(widths[0] * math.prod(images.base), widths[0], activate=True)
        self.logit = Layer(widths[0], configured(config)[0].outputs)

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks(self.from_image(images))
        if self.group:
            n, _, h, w = x.shape
            deviation = (x.unflatten(0, (-1, self.group)).var(1, correction=0) + 1e-8).sqrt().mean((1, 2, 3))
            x = torch.cat([x, deviation.repeat_interleave(self.group).view(n, 1, 1, 1).expand(n, 1, h, w)], 1)
        logits = self.logit(self.linear(self.conv(x).flatten(1)))
        return logits.squeeze(1) if logits.shape[1] == 1 else logits


class PlainLoop:
    """Networks at one stage and their training. Needs a configuration without an `obstacle`."""

    def __init__(self, config: TrainConfig, images: ImageFormat, stage: int, device: torch.device) -> None:
        self.config = config
        self.objective = configured(config)[0]
        self.gamma = gamma_at(0, config.regularizer, math.prod(images.size(stage)), 1)
        widths = network_widths(config, images)[: stage + 1]
        self.G = Generator(config, images, widths).to(device)
        self.D = Discriminator(config, images, widths).to(device)
        self.G_ema = copy.deepcopy(self.G).requires_grad_(False)
        adam: dict[str, Any] = {"betas": config.optimizer.betas, "eps": config.optimizer.eps}
        self.g_optimizer = torch.optim.Adam(
            self.G.parameters(), lr=learning_rate(config.optimizer.g_lr, widths), **adam
        )
        self.d_optimizer = torch.optim.Adam(
            self.D.parameters(), lr=learning_rate(config.optimizer.d_lr, widths), **adam
        )
        self.steps = 0

    def step(self, images: Tensor, d_latents: Tensor, g_latents: Tensor) -> None:
        """images: uint8 [N, H, W, C]; latents: [N, z_dim]."""
        like = next(self.G.parameters())
        real = images.permute(0, 3, 1, 2).to(like.dtype, memory_format=torch.contiguous_format) / 127.5 - 1
        self.train_discriminator(real, d_latents.to(like))
        if (self.steps + 1) % self.config.optimizer.n_critic == 0:
            self.train_generator(real, g_latents.to(like))
            self.average()
        self.steps += 1

    def train_discriminator(self, real: Tensor, z: Tensor) -> None:
        """One update of D, with the penalties that are due."""
        every = self.config.regularizer.every
        where = PENALTIES[self.config.regularizer.name] if self.steps % every == 0 else ()
        with torch.no_grad():
            fake = self.G(z)
        shown = {"real": real.detach().requires_grad_("real" in where), "fake": fake.requires_grad_("fake" in where)}
        outputs = {name: self.D(x) for name, x in shown.items()}
        assert self.objective.discriminator is not None  # see `obstacle`
        loss = self.objective.discriminator(outputs["real"], outputs["fake"]).mean()
        for name in where:
            score = self.objective.score(outputs[name], outputs["real"], outputs["fake"])
            (gradient,) = torch.autograd.grad(score.sum(), shown[name], create_graph=True)
            loss = loss + self.gamma / 2 * every * gradient.square().sum((1, 2, 3)).mean()
        self.d_optimizer.zero_grad()
        loss.backward()
        self.d_optimizer.step()

    def train_generator(self, real: Tensor, z: Tensor) -> None:
        """One update of G."""
        self.D.requires_grad_(False)
        fakes = self.D(self.G(z))
        reals = self.D(real) if self.objective.paired else fakes
        loss = self.objective.generator(reals, fakes).mean()
        self.g_optimizer.zero_grad()
        loss.backward()
        self.g_optimizer.step()
        self.D.requires_grad_(True)

    @torch.no_grad()
    def average(self) -> None:
        """G_ema <- beta * G_ema + (1 - beta) * G."""
        batch = self.config.batch
        ema = self.config.ema
        images = batch * self.config.optimizer.n_critic
        beta = ema_beta(images, (self.steps + 1) * batch, 1000 * ema.kimg, ema.rampup)
        for averaged, p in zip(self.G_ema.parameters(), self.G.parameters(), strict=True):
            averaged.lerp_(p, 1 - beta)
