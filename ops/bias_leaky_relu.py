"""y = gain * leaky_relu(x + bias), keeping one bit per element for the backward instead of an activation.

    bias_leaky_relu(Tensor x, Tensor? bias, float slope, float gain) -> (Tensor y, Tensor sign_bits)
    bias_leaky_relu_backward(Tensor dy, Tensor sign_bits, bool channels_last, bool with_bias, float slope, float gain)
        -> (Tensor dx, Tensor dbias)

`sign_bits` is uint8 [ceil(numel / 8)]: bit i % 8 of byte i // 8 says whether element i of x + bias is positive, in
the memory order of y (channels_last where y is, else row-major). The backward is linear in dy, so its own derivative
is the same op applied to the incoming gradients: the pair is closed under differentiation.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ops.layout import check_tensor, dense, is_channels_last
from ops.registry import kernels, register

_BYTE_OF_EACH_BIT = 0x0102040810204080  # multiplying eight 0/1 bytes by it gathers them in the highest byte
_COPY_TO_EACH_BYTE = 0x0101010101010101
_ONE_BIT_PER_BYTE = -0x7FBFDFEFF7FBFDFF  # 0x8040201008040201 as a signed 64-bit number: bit k of byte k


def bias_leaky_relu(x: Tensor, bias: Tensor | None = None, slope: float = 0.2, gain: float = math.sqrt(2)) -> Tensor:
    """gain * leaky_relu(x + bias, slope).  x: [N, C, ...], bias: [C] -> [N, C, ...], same dtype and layout.

    The derivative at exactly zero is slope * gain, as in torch. Raises ValueError naming the argument that is wrong.
    """
    _check(x, bias, slope, gain)
    kernels()
    return torch.ops.gan_ops.bias_leaky_relu.default(x, bias, slope, gain)[0]


def _check(x: Tensor, bias: Tensor | None, slope: float, gain: float) -> None:
    """Raise ValueError unless bias is None or one number per channel of x, and slope and gain are usable."""
    check_tensor("bias_leaky_relu", "x", x)
    if bias is not None and (bias.shape != x.shape[1:2] or bias.dtype != x.dtype or bias.device != x.device):
        raise ValueError(
            f"bias_leaky_relu: bias must be {x.dtype} [{x.shape[1]}] on {x.device} like x, "
            f"got {bias.dtype} {list(bias.shape)} on {bias.device}"
        )
    if not slope > 0 or not math.isfinite(slope) or not math.isfinite(gain):
        raise ValueError(f"bias_leaky_relu: slope must be positive and finite, gain finite, got {slope} and {gain}")


def bias_leaky_relu_reference(
    x: Tensor, bias: Tensor | None = None, slope: float = 0.2, gain: float = math.sqrt(2)
) -> Tensor:
    """The same as a composition of torch's own functions: what the benchmark compares the kernels with."""
    shifted = x if bias is None else x + bias.view(-1, *[1] * (x.dim() - 2))
    return F.leaky_relu(shifted, slope) * gain


def _pack(mask: Tensor, channels_last: bool) -> Tensor:
    """0 or 1 [...], dense -> uint8 [ceil(numel / 8)], in memory order."""
    flat = (mask.permute(0, 2, 3, 1) if channels_last else mask).reshape(-1).to(torch.uint8)
    flat = F.pad(flat, (0, -flat.numel() % 8)) if flat.numel() % 8 else flat
    return ((flat.view(torch.int64) * _BYTE_OF_EACH_BIT) >> 56).to(torch.uint8)


def _unpack(bits: Tensor, like: Tensor, channels_last: bool) -> Tensor:
    """uint8 [ceil(numel / 8)] -> the shape and dtype of `like`: positive where the bit is set, else 0."""
    spread = (bits.to(torch.int64) * _COPY_TO_EACH_BYTE) & _ONE_BIT_PER_BYTE
    flat = spread.view(torch.uint8)[: like.numel()].to(like.dtype)
    if not channels_last:
        return flat.view(like.shape)
    n, c, h, w = like.shape
    return flat.view(n, h, w, c).permute(0, 3, 1, 2)


def _forward_reference(x: Tensor, bias: Tensor | None, slope: float, gain: float) -> tuple[Tensor, Tensor]:
    channels_last = is_channels_last(x)
    x = dense(x, channels_last)
    shifted = x if bias is None else x + bias.view(-1, *[1] * (x.dim() - 2))
    y = F.leaky_relu(shifted, slope).mul_(gain)
    positive = torch.gt(shifted, 0, out=torch.empty_like(shifted))  # in x's dtype: several times faster than to bool
    return y, _pack(positive, channels_last)


def _forward_fake(x: Tensor, bias: Tensor | None, slope: float, gain: float) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(dense(x, is_channels_last(x)))
    return y, x.new_empty([(x.numel() + 7) // 8], dtype=torch.uint8)


def _forward_setup(ctx, inputs, output) -> None:
    _, bias, ctx.slope, ctx.gain = inputs
    y, bits = output
    ctx.channels_last = is_channels_last(y)
    ctx.with_bias = bias is not None
    ctx.mark_non_differentiable(bits)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(bits)


def _forward_backward(ctx, dy: Tensor | None, _bits):
    if dy is None:
        return None, None, None, None
    with_bias = ctx.with_bias and ctx.needs_input_grad[1]
    dx, dbias = torch.ops.gan_ops.bias_leaky_relu_backward(
        dy, *ctx.saved_tensors, ctx.channels_last, with_bias, ctx.slope, ctx.gain
    )
    return dx, dbias if with_bias else None, None, None


def _backward_reference(dy: Tensor, bits: Tensor, channels_last: bool, with_bias: bool, slope: float, gain: float):
    dy = dense(dy, channels_last)
    positive = _unpack(bits, dy, channels_last)
    dx = torch.ops.aten.leaky_relu_backward(dy, positive, slope, False).mul_(gain)
    over = [d for d in range(dx.dim()) if d != 1]
    return dx, dx.sum(over) if with_bias else dx.new_empty([0])


def _backward_fake(dy: Tensor, bits: Tensor, channels_last: bool, with_bias: bool, slope: float, gain: float):
    return torch.empty_like(dense(dy, channels_last)), dy.new_empty([dy.shape[1] if with_bias else 0])


def _backward_setup(ctx, inputs, output) -> None:
    dy, bits, ctx.channels_last, ctx.with_bias, ctx.slope, ctx.gain = inputs
    ctx.shape = dy.shape
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(bits)


def _backward_backward(ctx, ddx: Tensor | None, ddbias: Tensor | None):
    total = ddx
    if ddbias is not None and ctx.with_bias:
        broadcast = ddbias.view(-1, *[1] * (len(ctx.shape) - 2)).expand(ctx.shape)
        total = broadcast if ddx is None else ddx + broadcast
    if total is None:
        return None, None, None, None, None, None
    ddy, _ = torch.ops.gan_ops.bias_leaky_relu_backward(
        total, *ctx.saved_tensors, ctx.channels_last, False, ctx.slope, ctx.gain
    )
    return ddy, None, None, None, None, None


register(
    "bias_leaky_relu(Tensor x, Tensor? bias, float slope, float gain) -> (Tensor y, Tensor sign_bits)",
    reference=_forward_reference,
    fake=_forward_fake,
    setup_context=_forward_setup,
    backward=_forward_backward,
)
register(
    "bias_leaky_relu_backward(Tensor dy, Tensor sign_bits, bool channels_last, bool with_bias, float slope, float gain)"
    " -> (Tensor dx, Tensor dbias)",
    reference=_backward_reference,
    fake=_backward_fake,
    setup_context=_backward_setup,
    backward=_backward_backward,
)
