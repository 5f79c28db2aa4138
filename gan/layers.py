"""The layers of both networks. Weights are drawn from N(0, 1) and multiplied by 1 / sqrt(fan-in) at run time: the
equalized learning rate of Karras et al. 2018, section 4.1. The leaky ReLU's gain of sqrt(2) keeps the variance.

A layer computes in the dtype of its input: weights are converted to it, after they were scaled in their own. Where no
leaky ReLU follows, the bias is added in the weights' dtype, and so is the result.
"""

import math
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ops import bias_leaky_relu, conv2d

GAIN = math.sqrt(2)


def scaled(weight: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """weight * scale, computed in the weight's dtype and rounded to `dtype`."""
    return (weight * constant(scale, weight.dtype)).to(dtype)


@cache
def constant(value: float, dtype: torch.dtype) -> Tensor:
    """A number as a 0-dim tensor on the CPU. Tensors on any device can be multiplied by it, in one call where a number
    takes five: torch would make such a tensor of the number in float64, and convert it, each time."""
    with torch.inference_mode(False):  # whoever asks first
        return torch.tensor(value, dtype=dtype, device="cpu")


class Linear(nn.Module):
    """[N, in] -> [N, out], with a bias, and a leaky ReLU after it if `activate`."""

    def __init__(self, inputs: int, outputs: int, activate: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.scale = 1 / math.sqrt(inputs)
        self.activate = activate

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, scaled(self.weight, self.scale, x.dtype))
        return bias_leaky_relu(x, self.bias.to(x.dtype)) if self.activate else x + self.bias


class Conv2d(nn.Module):
    """[N, in, H, W] -> [N, out, H, W], for an odd kernel size, with zero padding; bias and leaky ReLU are optional."""

    def __init__(self, inputs: int, outputs: int, kernel: int, activate: bool = False, bias: bool = True):
        super().__init__()
        weight = torch.randn(outputs, inputs, kernel, kernel)
        self.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.scale = 1 / math.sqrt(inputs * kernel**2)
        self.padding = kernel // 2
        self.activate = activate

    def forward(self, x: Tensor, gain: float = GAIN) -> Tensor:
        """gain: of the leaky ReLU, if there is one."""
        return self.finish(conv2d(x, scaled(self.weight, self.scale, x.dtype), self.padding), gain)

    def finish(self, x: Tensor, gain: float = GAIN) -> Tensor:
        """What follows the convolution: bias and leaky ReLU, [N, out, H, W] -> the same."""
        if self.bias is None:
            return x
        if self.activate:
            return bias_leaky_relu(x, self.bias.to(x.dtype), gain=gain)
        return x + self.bias.view(-1, 1, 1)


class Embedding(nn.Module):
    """Class labels [N] -> [N, dim]; initial entries have variance one."""

    def __init__(self, classes: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, dim))

    def forward(self, labels: Tensor) -> Tensor:
        return self.weight[labels]


def pixel_norm(x: Tensor) -> Tensor:
    """Scale each row of [N, C] to mean square one (Karras et al. 2018, section 4.2)."""
    return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-8)


def minibatch_stddev(x: Tensor, group: int) -> Tensor:
    """The standard deviation over a coupling group, averaged over channels and pixels: [N, C, H, W] -> [N].

    Karras et al. 2018, section 3. A group is `group` consecutive samples, so that the result does not depend on how the
    global batch is divided among ranks. Raises ValueError if N is not a multiple of the group.
    """
    if len(x) % group:
        raise ValueError(f"minibatch_stddev: a batch of {len(x)} is not made of groups of {group}")
    deviation = (x.unflatten(0, (-1, group)).var(1, correction=0) + 1e-8).sqrt().mean((1, 2, 3))
    return deviation.repeat_interleave(group)
