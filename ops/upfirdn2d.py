"""Upsample by zero insertion, pad or crop, FIR-filter, downsample: the resampling of StyleGAN-family networks.

    upfirdn2d(Tensor x, Tensor filter, int[2] up, int[2] down, int[4] padding, bool flip, float gain) -> Tensor

Factors are [vertical, horizontal], padding is [top, bottom, left, right]. The op is linear in x and its adjoint is
itself, with up and down swapped and the filter turned round, so derivatives of every order are calls of the same op.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ops.registry import register

Pair = int | Sequence[int]


def setup_filter(taps: Sequence[float], device=None, dtype: torch.dtype = torch.float32) -> Tensor:
    """1-D taps, normalized to sum one -> [F]: a separable filter, the same in both directions."""
    filter = torch.tensor(taps, dtype=torch.float64)
    if filter.dim() != 1 or filter.numel() == 0 or not torch.isfinite(filter).all() or filter.sum() == 0:
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

    filter: [F] (separable, applied in both directions) or [Fh, Fw]; a constant, in float32 or x's dtype.
    up, down: factors, one number or [vertical, horizontal]. padding: in upsampled pixels, one number or
    [top, bottom, left, right]; negative crops. flip: correlate instead of convolve. gain multiplies the result.
    Raises ValueError naming the argument that is wrong.
    """
    up, down = _factors("up", up), _factors("down", down)
    padding = [padding] * 4 if isinstance(padding, int) else list(padding)
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"upfirdn2d: x must be a floating [N, C, H, W] tensor, got {x.dtype} {list(x.shape)}")
    if filter.dim() not in (1, 2) or filter.numel() == 0 or filter.device != x.device or filter.requires_grad:
        raise ValueError(
            f"upfirdn2d: filter must be a constant [F] or [Fh, Fw] on {x.device}, got {list(filter.shape)} "
            f"on {filter.device}, requires_grad={filter.requires_grad}"
        )
    if len(padding) != 4:
        raise ValueError(f"upfirdn2d: padding must be one number or [top, bottom, left, right], got {padding}")
    if min(_output_size(x.shape[2:], filter, up, down, padding)) < 1 or x.numel() == 0:
        raise ValueError(f"upfirdn2d: padding {padding} leaves no output for x {list(x.shape)}, {list(filter.shape)}")
    return torch.ops.gan_ops.upfirdn2d(x, filter, up, down, padding, flip, float(gain))


def filter2d(x: Tensor, filter: Tensor, gain: float = 1.0) -> Tensor:
    """Filter without changing the size: [N, C, H, W] -> [N, C, H, W]. Even filters shift by half a pixel up-left."""
    height, width = _filter_size(filter)
    return upfirdn2d(x, filter, padding=[height // 2, (height - 1) // 2, width // 2, (width - 1) // 2], gain=gain)


def upsample2d(x: Tensor, filter: Tensor, up: int = 2) -> Tensor:
    """[N, C, H, W] -> [N, C, up * H, up * W], keeping the mean: taps [1, 1] give nearest neighbor."""
    pads = [(size + up - 1) // 2 for size in _filter_size(filter)], [(size - up) // 2 for size in _filter_size(filter)]
    padding = [pads[0][0], pads[1][0], pads[0][1], pads[1][1]]
    return upfirdn2d(x, filter, up=up, padding=padding, gain=up * up)


def downsample2d(x: Tensor, filter: Tensor, down: int = 2) -> Tensor:
    """[N, C, H, W] -> [N, C, H // down, W // down]: taps [1, 1] give the mean of 2x2."""
    pads = (
        [(size - down + 1) // 2 for size in _filter_size(filter)],
        [(size - down) // 2 for size in _filter_size(filter)],
    )
    padding = [pads[0][0], pads[1][0], pads[0][1], pads[1][1]]
    return upfirdn2d(x, filter, down=down, padding=padding)


def _factors(name: str, value: Pair) -> list[int]:
    factors = [value, value] if isinstance(value, int) else list(value)
    if len(factors) != 2 or any(not isinstance(f, int) or f < 1 for f in factors):
        raise ValueError(f"upfirdn2d: {name} must be a positive integer or a pair of them, got {value}")
    return factors


def _filter_size(filter: Tensor) -> tuple[int, int]:
    return filter.shape[0], filter.shape[-1]


def _output_size(size: Sequence[int], filter: Tensor, up: list[int], down: list[int], padding: list[int]) -> list[int]:
    total = [padding[0] + padding[1], padding[2] + padding[3]]
    return [(size[i] * up[i] + total[i] - _filter_size(filter)[i]) // down[i] + 1 for i in (0, 1)]


def _reference(x: Tensor, filter: Tensor, up: list[int], down: list[int], padding: list[int], flip: bool, gain: float):
    """The definition, step by step: insert zeros, pad or crop, correlate with the turned filter, keep every down-th."""
    n, c, h, w = x.shape
    if up != [1, 1]:
        x = F.pad(x.reshape(n, c, h, 1, w, 1), (0, up[1] - 1, 0, 0, 0, up[0] - 1)).reshape(n, c, h * up[0], w * up[1])
    top, bottom, left, right = padding
    x = F.pad(x, [max(p, 0) for p in (left, right, top, bottom)])
    x = x[:, :, max(-top, 0) : x.shape[2] - max(-bottom, 0), max(-left, 0) : x.shape[3] - max(-right, 0)]
    taps = filter.to(torch.promote_types(filter.dtype, x.dtype))
    taps = taps if flip else taps.flip(list(range(taps.dim())))
    if taps.dim() == 1:
        root = math.sqrt(abs(gain))
        rows, columns = (
            (taps * root).to(x.dtype).view(1, 1, -1, 1),
            (taps * math.copysign(root, gain)).to(x.dtype).view(1, 1, 1, -1),
        )
        x = F.conv2d(x, rows.expand(c, -1, -1, -1), stride=(down[0], 1), groups=c)
        return F.conv2d(x, columns.expand(c, -1, -1, -1), stride=(1, down[1]), groups=c).contiguous()
    return F.conv2d(x, (taps * gain).to(x.dtype).expand(c, 1, -1, -1), stride=down, groups=c).contiguous()


def _fake(x: Tensor, filter: Tensor, up: list[int], down: list[int], padding: list[int], flip: bool, gain: float):
    return x.new_empty([*x.shape[:2], *_output_size(x.shape[2:], filter, up, down, padding)])


def _setup(ctx, inputs, output) -> None:
    x, filter, ctx.up, ctx.down, ctx.padding, ctx.flip, ctx.gain = inputs
    ctx.size, ctx.output_size = x.shape[2:], output.shape[2:]
    ctx.save_for_backward(filter)


def _backward(ctx, dy: Tensor):
    """The adjoint. The padding is what makes it as large as x again, element 0 of x meeting the same taps as before."""
    (filter,) = ctx.saved_tensors
    adjoint = []
    for i, length in enumerate(_filter_size(filter)):
        before = length - 1 - ctx.padding[2 * i]
        after = ctx.size[i] * ctx.up[i] - ctx.output_size[i] * ctx.down[i] + ctx.padding[2 * i] - ctx.up[i] + 1
        adjoint += [before, after]
    dx = torch.ops.gan_ops.upfirdn2d(dy, filter, ctx.down, ctx.up, adjoint, not ctx.flip, ctx.gain)
    return dx, None, None, None, None, None, None


register(
    "upfirdn2d(Tensor x, Tensor filter, int[2] up, int[2] down, int[4] padding, bool flip, float gain) -> Tensor",
    reference=_reference,
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
)
