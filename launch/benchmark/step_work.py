"""The arithmetic of a step: which convolutions and matrix products it makes, and how long these take alone.

The count comes from the calls that reach PyTorch's dispatcher, those of all backward passes included, and not from the
layers: so it holds for any network, objective and penalty.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from launch.benchmark.timing import Clock, DeviceClock, HostClock, Sampling

Arguments = Sequence[Any]
HOST_SECONDS = 50e-6  # that a CPU takes at most to start a call on a GPU


def _per_output(weight: Any) -> int:
    """Multiplications for one value of a convolution's result; of a transposed one's, for one value of its input."""
    return math.prod(weight.shape[1:])


def _convolution(args: Arguments, result: Tensor) -> int:
    x, weight, transposed = args[0], args[1], args[6]
    return (x.numel() if transposed else result.numel()) * _per_output(weight)


def _convolution_backward(args: Arguments, result: Any) -> int:
    dy, x, weight, transposed, wanted = args[0], args[1], args[2], args[7], args[10]
    return (wanted[0] + wanted[1]) * (x.numel() if transposed else dy.numel()) * _per_output(weight)


# Multiplications of a call, from its arguments and its result; each comes with an addition.
COUNTS: dict[str, Callable[[Arguments, Any], int]] = {
    "aten.mm": lambda args, result: args[0].numel() * args[1].shape[-1],
    "aten.bmm": lambda args, result: args[0].numel() * args[1].shape[-1],
    "aten.addmm": lambda args, result: args[1].numel() * args[2].shape[-1],
    "aten.baddbmm": lambda args, result: args[1].numel() * args[2].shape[-1],
    "aten.convolution": _convolution,
    "aten.convolution_backward": _convolution_backward,
    "gan_ops.conv2d": lambda args, result: result.numel() * _per_output(args[1]),
    "gan_ops.conv2d_input_gradient": lambda args, result: args[0].numel() * _per_output(args[1]),
    "gan_ops.conv2d_weight_gradient": lambda args, result: args[0].numel() * _per_output(result),
}


@dataclass(frozen=True)
class Like:
    """What a call saw of a tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def make(self) -> Tensor:
        """Another tensor like it, of noise."""
        last = sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        return torch.randn(last + 1, device=self.device).to(self.dtype).as_strided(self.shape, self.stride)


@dataclass(frozen=True)
class Product:
    """A convolution, a derivative of one, or a matrix product, for tensors of certain shapes and memory orders."""

    function: Any
    arguments: tuple[Any, ...]
    flops: int

    def call(self) -> Callable[[], Any]:
        """The same work on noise."""
        arguments = [value.make() if isinstance(value, Like) else value for value in self.arguments]
        return lambda: self.function(*arguments)


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Like(tuple(value.shape), value.stride(), value.dtype, value.device)
    return tuple(value) if isinstance(value, list) else value


class Work(TorchDispatchMode, AbstractContextManager):
    """Counts the products of what runs within: `with Work() as work: ...`."""

    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[Product] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        count = COUNTS.get(str(func.overloadpacket))
        if count:
            self.products[Product(func, tuple(map(_described, args)), 2 * count(args, result))] += 1
        return result


def flops_of(products: Mapping[Product, int]) -> int:
    """Additions and multiplications of all."""
    return sum(product.flops * times for product, times in products.items())


def seconds_alone(products: Mapping[Product, int], device: torch.device) -> float:
    """How long they take one after the other and nothing else, once. One is made ready at a time, untimed."""
    clock: Clock = DeviceClock(keep=0) if device.type == "cuda" else HostClock(torch.get_num_threads())
    total = 0.0
    with torch.no_grad():
        for product, times in products.items():
            call = product.call()
            call()
            total += times * clock.sample(call, Sampling(times, HOST_SECONDS))
    return total
