"""How fast a device is, measured in about a second, and how long a step would take on it: an estimate."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from gan.rehearsal import Cost, Operation
from ops import conv2d

WORK = {"cpu": 3e8, "cuda": 3e10}  # FLOPs of one timed convolution ...
MOVED = {"cpu": 2**25, "cuda": 2**29}  # ... and bytes of one timed copy
SIDE = 32  # of the timed convolution's images
ROUNDS = 3  # the best of them counts


@dataclass(frozen=True)
class Pace:
    """What a device does per second."""

    flops: dict[int, float]  # by width, of a 3x3 convolution with as many channels on both sides
    bandwidth: float  # bytes read and written by a copy
    launch: float  # seconds of the smallest operation

    def seconds(self, cost: Cost) -> float:
        """Of a step: each operation is limited by arithmetic or by memory, and by nothing else."""
        return sum(times * self._of(operation) for times, operation in cost.operations)

    def _of(self, operation: Operation) -> float:
        moving = operation.moved / self.bandwidth
        nearest = min(self.flops, key=lambda width: abs(width - operation.width))
        return self.launch + max(moving, operation.flops / self.flops[nearest])


def measure_pace(device: torch.device, dtype: torch.dtype, widths: Iterable[int]) -> Pace:
    """The device's pace at convolutions of these widths, in this dtype."""
    flops = {width: _convolution_flops(device, dtype, width) for width in sorted(set(widths))}
    source = torch.ones(MOVED[device.type] // 4, device=device)
    target = torch.empty_like(source)
    copied = 2 * MOVED[device.type] / _seconds(device, lambda: target.copy_(source))
    one = torch.ones((), device=device)
    return Pace(flops, copied, _seconds(device, lambda: [one + 1 for _ in range(100)]) / 100)


def _convolution_flops(device: torch.device, dtype: torch.dtype, width: int) -> float:
    work = 2 * SIDE**2 * 9 * width**2  # of one image
    count = max(round(WORK[device.type] / work), 1)
    last = torch.channels_last
    x = torch.randn(count, width, SIDE, SIDE, device=device).to(dtype).contiguous(memory_format=last)
    weight = torch.randn(width, width, 3, 3, device=device).to(dtype).contiguous(memory_format=last)
    return count * work / _seconds(device, lambda: conv2d(x, weight, 1))


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    """The shortest of some rounds: the first one also warms up."""
    rounds = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        rounds.append(time.perf_counter() - begin)
    return min(rounds)
