"""Upsample by zero insertion, pad or crop, FIR-filter, downsample: the resampling of StyleGAN-family networks.

    upfirdn2d(Tensor x, Tensor filter, int[2] up, int[2] down, int[4] padding, bool flip, float gain) -> Tensor

Factors are [vertical, horizontal], padding is [top, bottom, left, right]. The op is linear in x and its adjoint is
itself, with up and down swapped and the filter turned round, so derivatives of every order are calls of the same op.
The result has the memory order of x, NCHW or channels_last.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ops.layout import LARGEST, check_tensor, dense, is_channels_last, memory_format
from ops.registry import kernels, register

Pair = int | Sequence[int]


def setup_filter(taps: Sequence[float], device=None, dtype: torch.dtype = torch.float32) -> Tensor:
    """1-D taps, normalized to sum one -> [F]: a separable filter, the same in both directions."""
    filter = torch.tensor(taps, dtype=torch.float64)
    # The numbers are read from `taps`: a tensor has none while memory is estimated (gan/rehearsal.py).
    if filter.dim() != 1 or filter.numel() == 0 or not all(map(math.isfinite, taps)) or sum(taps) == 0:
        raise ValueError(f"setup_filter: taps must be a non-empty list of finite numbers with a sum, got {taps}")
    return (filter / filter.sum()).to(device=device, dtype=dtype)


def upfirdn2d(
    x: Tensor,
    filter: Tensor,
    up: Pair = 1,
    down: Pair = 1,
    padding: Pair = 0,
    gain: float = 1.0,
    flip: bool = False,
) -> Tensor:
    """x: [N, C, H, W] -> [N, C, H', W'] with H' = (H * up + top + bottom - Fh) // down + 1, W' likewise.

    filter: [F] (separable, applied in both directions) or [Fh, Fw]; a constant, of any floating type.
    up, down: factors, one number or [vertical, horizontal]. padding: in upsampled pixels, one number or
    [top, bottom, left, right]; negative crops. flip: correlate instead of convolve. gain multiplies the result.
    Raises ValueError naming the argument that is wrong.
    """
    arguments = _check(x, filter, up, down, padding)
    kernels()
    return torch.ops.gan_ops.upfirdn2d.default(x, filter, *arguments, flip, float(gain))


def upsample2d(x: Tensor, filter: Tensor, up: int = 2, gain: float = 1.0) -> Tensor:
    """[N, C, H, W] -> [N, C, up * H, up * W], the mean times gain: taps [1, 1] give nearest neighbor."""
    padding = []
    for taps in _filter_size(filter.shape):
        padding += [(taps + up - 1) // 2, (taps - up) // 2]
    return upfirdn2d(x, filter, up=up, padding=padding, gain=up * up * gain)


def downsample2d(x: Tensor, filter: Tensor, down: int = 2, gain: float = 1.0) -> Tensor:
    """[N, C, H, W] -> [N, C, H // down, W // down], times gain: taps [1, 1] give the mean of 2x2."""
    padding = []
    for taps in _filter_size(filter.shape):
        padding += [(taps - down + 1) // 2, (taps - down) // 2]
    return upfirdn2d(x, filter, down=down, padding=padding, gain=gain)


def _check(
    x: Tensor, filter: Tensor, up: Pair, down: Pair, padding: Pair
) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
    """(up, down, padding) in full. Raises ValueError naming the argument that is wrong."""
    check_tensor("upfirdn2d", "x", x, planes=True)
    up = _integers("up", up, 2)
    down = _integers("down", down, 2)
    padding = _integers("padding", padding, 4)
    for name, factors in (("up", up), ("down", down)):
        if min(factors) < 1:
            raise ValueError(f"upfirdn2d: {name} must be a positive integer or a pair of them, got {factors}")
    if filter.dim() not in (1, 2) or filter.numel() == 0 or not filter.is_floating_point() or filter.requires_grad:
        raise ValueError(
            f"upfirdn2d: filter must be a floating, constant [F] or [Fh, Fw], got {filter.dtype} {list(filter.shape)}, "
            f"requires_grad={filter.requires_grad}"
        )
    if filter.device != x.device:
        raise ValueError(f"upfirdn2d: filter must be on {x.device} like x, got {filter.device}")
    n, channels, *size = x.shape
    height, width = _output_size(size, filter.shape, up, down, padding)
    if height < 1 or width < 1:
        raise ValueError(
            f"upfirdn2d: filter {list(filter.shape)} does not fit into x {list(x.shape)} with up {up} and "
            f"padding {padding}: it leaves no output"
        )
    if n * channels * height * width * x.element_size() > LARGEST:
        raise ValueError(
            f"upfirdn2d: up {up} and padding {padding} make an output that is too large: {[height, width]}"
        )
    return up, down, padding


def _integers(name: str, value: Pair, count: int) -> list[int]:
    numbers = list(value) if isinstance(value, Sequence) else [value] * count
    if len(numbers) != count or not all(isinstance(n, int) and abs(n) < 2**31 for n in numbers):
        raise ValueError(f"upfirdn2d: {name} must be one integer or {count} of them, below 2**31, got {value}")
    return numbers


def _filter_size(shape: Sequence[int]) -> tuple[int, int]:
    """(height, width) of a filter [F] or [Fh, Fw]."""
    return shape[0], shape[-1]


def _output_size(
    size: Sequence[int], filter_shape: Sequence[int], up: Sequence[int], down: Sequence[int], padding: Sequence[int]
) -> tuple[int, int]:
    top, bottom, left, right = padding
    height = (size[0] * up[0] + top + bottom - filter_shape[0]) // down[0] + 1
    width = (size[1] * up[1] + left + right - filter_shape[-1]) // down[1] + 1
    return height, width


def upfirdn2d_reference(
    x: Tensor, filter: Tensor, up: list[int], down: list[int], padding: list[int], flip: bool, gain: float
) -> Tensor:
    """The definition, step by step, in torch's own functions: insert zeros, pad or crop, correlate with the turned
    filter, keep every down-th. What the kernels are held against; arguments as in the schema above."""
    n, c, h, w = x.shape
    channels_last = is_channels_last(x)
    if up != [1, 1]:
        x = F.pad(x.reshape(n, c, h, 1, w, 1), (0, up[1] - 1, 0, 0, 0, up[0] - 1)).reshape(n, c, h * up[0], w * up[1])
    top, bottom, left, right = padding
    x = F.pad(x, [max(p, 0) for p in (left, right, top, bottom)])
    x = x[:, :, max(-top, 0) : x.shape[2] - max(-bottom, 0), max(-left, 0) : x.shape[3] - max(-right, 0)]
    taps = filter.to(torch.promote_types(filter.dtype, x.dtype))
    taps = taps if flip else taps.flip(list(range(taps.dim())))
    if taps.dim() == 1:
        root = math.sqrt(abs(gain))
        rows = (taps * root).to(x.dtype).view(1, 1, -1, 1)
        columns = (taps * math.copysign(root, gain)).to(x.dtype).view(1, 1, 1, -1)
        x = F.conv2d(x, rows.expand(c, -1, -1, -1), stride=(down[0], 1), groups=c)
        return dense(F.conv2d(x, columns.expand(c, -1, -1, -1), stride=(1, down[1]), groups=c), channels_last)
    return dense(F.conv2d(x, (taps * gain).to(x.dtype).expand(c, 1, -1, -1), stride=down, groups=c), channels_last)


def _fake(x: Tensor, filter: Tensor, up: list[int], down: list[int], padding: list[int], flip: bool, gain: float):
    size = [*x.shape[:2], *_output_size(x.shape[2:], filter.shape, up, down, padding)]
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory_format(is_channels_last(x)))


def _setup(ctx, inputs, output) -> None:
    x, filter, ctx.up, ctx.down, ctx.padding, ctx.flip, ctx.gain = inputs
    ctx.size = x.shape[2:]
    ctx.output_size = output.shape[2:]
    ctx.save_for_backward(filter)


def _backward(ctx, dy: Tensor):
    """The adjoint. Its padding makes it as large as x again, with element 0 of x meeting the same taps as before."""
    (filter,) = ctx.saved_tensors
    padding = []
    for i, length in enumerate(_filter_size(filter.shape)):
        before = length - 1 - ctx.padding[2 * i]
        after = ctx.size[i] * ctx.up[i] - ctx.output_size[i] * ctx.down[i] + ctx.padding[2 * i] - ctx.up[i] + 1
        padding += [before, after]
    dx = torch.ops.gan_ops.upfirdn2d(dy, filter, ctx.down, ctx.up, padding, not ctx.flip, ctx.gain)
    return dx, None, None, None, None, None, None


register(
    "upfirdn2d(Tensor x, Tensor filter, int[2] up, int[2] down, int[4] padding, bool flip, float gain) -> Tensor",
    reference=upfirdn2d_reference,
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
)
