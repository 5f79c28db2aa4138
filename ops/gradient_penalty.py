"""What gradient penalties are made of: per-sample squared norms, their derivatives, and points between two batches.

    sample_squared_norm(Tensor x) -> Tensor      y[n]      = sum of x[n, ...]^2
    sample_dot(Tensor a, Tensor b) -> Tensor     y[n]      = sum of a[n, ...] * b[n, ...]
    sample_scale(Tensor x, Tensor w) -> Tensor   y[n, ...] = w[n] * x[n, ...]
    sample_lerp(Tensor a, Tensor b, Tensor w) -> Tensor
                                                 y[n, ...] = w[n] * a[n, ...] + (1 - w[n]) * b[n, ...]

The four are closed under differentiation: the derivatives of each are sums of the others. Numbers per sample are
float64 for float64 and float32 for everything else. Sums are taken in float64; on a GPU those over 16 bytes of x at a
time are taken in the dtype of numbers per sample first.
"""

import torch
from torch import Tensor

from ops.layout import check_tensor, dense, is_channels_last
from ops.registry import kernels, register


def gradient_penalty(gradient: Tensor, center: float = 0.0, one_sided: bool = False) -> Tensor:
    """(|g| - center)^2 per sample, or with `one_sided` only where |g| exceeds center.

    gradient: [N, ...] -> [N], in float32, or float64 for float64. center 0 is the zero-centered penalty of Mescheder et
    al. 2018 (eq. 9), 1 that of WGAN-GP (Gulrajani et al. 2017, eq. 3), one-sided of WGAN-LP (Petzka et al. 2018).
    Where g is zero, |g| has no derivative: there it counts as zero, so that nothing becomes infinite. Raises ValueError
    for anything but a dense, floating [N, ...].
    """
    squared = squared_norm(gradient)
    if center == 0:
        return squared
    excess = root(squared) - center
    return (excess.clamp(min=0) if one_sided else excess).square()


def squared_norm(x: Tensor) -> Tensor:
    """Sum of squares per sample.  x: [N, ...] -> [N], differentiable as often as wanted."""
    check_tensor("squared_norm", "x", x)
    kernels()
    return torch.ops.gan_ops.sample_squared_norm(x)


def root(squared: Tensor) -> Tensor:
    """sqrt of squared norms [N], with a derivative of zero where a norm vanishes (below about 3e-10 in float32)."""
    vanishes = squared < torch.finfo(squared.dtype).tiny ** 0.5
    return torch.where(vanishes, 1, squared).sqrt().masked_fill(vanishes, 0)


def interpolate_samples(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """weight[n] * a[n] + (1 - weight[n]) * b[n]: one point per sample on the line between two batches, as WGAN-GP
    wants.  a, b: [N, ...], weight: [N] in float32 (float64 for float64) -> [N, ...], in the memory order of a."""
    check_tensor("interpolate_samples", "a", a)
    if b.shape != a.shape or b.dtype != a.dtype or b.device != a.device:
        raise ValueError(
            f"interpolate_samples: b must be {a.dtype} {list(a.shape)} on {a.device} like a, "
            f"got {b.dtype} {list(b.shape)} on {b.device}"
        )
    if weight.shape != a.shape[:1] or weight.dtype != wide(a) or weight.device != a.device:
        raise ValueError(
            f"interpolate_samples: weight must be {wide(a)} [{len(a)}] on {a.device}, "
            f"got {weight.dtype} {list(weight.shape)} on {weight.device}"
        )
    kernels()
    return torch.ops.gan_ops.sample_lerp(a, b, weight)


def wide(x: Tensor) -> torch.dtype:
    """The dtype of numbers per sample: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _each(weight: Tensor, x: Tensor) -> Tensor:
    return weight.view(-1, *[1] * (x.dim() - 1))


def _like_first(x: Tensor, *others: Tensor) -> Tensor:
    return torch.empty_like(dense(x, is_channels_last(x)))


def _save_inputs(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _dot_reference(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() * b.double()).flatten(1).sum(1).to(wide(a))


def _dot_fake(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[:1], dtype=wide(a))


def _dot_backward(ctx, dy: Tensor):
    a, b = ctx.saved_tensors
    scale = torch.ops.gan_ops.sample_scale
    return tuple(
        scale(other, dy) if needed else None for other, needed in zip((b, a), ctx.needs_input_grad, strict=True)
    )


def _norm_reference(x: Tensor) -> Tensor:
    return _dot_reference(x, x)


def _norm_fake(x: Tensor) -> Tensor:
    return _dot_fake(x, x)


def _norm_backward(ctx, dy: Tensor):
    (x,) = ctx.saved_tensors
    return torch.ops.gan_ops.sample_scale(x, 2 * dy)


def _scale_reference(x: Tensor, weight: Tensor) -> Tensor:
    x = dense(x, is_channels_last(x))
    return (x.to(wide(x)) * _each(weight, x)).to(x.dtype)


def _scale_backward(ctx, dy: Tensor):
    x, weight = ctx.saved_tensors
    dx = torch.ops.gan_ops.sample_scale(dy, weight) if ctx.needs_input_grad[0] else None
    return dx, torch.ops.gan_ops.sample_dot(dy, x) if ctx.needs_input_grad[1] else None


def _lerp_reference(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    a = dense(a, is_channels_last(a))
    each = _each(weight, a)
    return (each * a.to(wide(a)) + (1 - each) * b.to(wide(a))).to(a.dtype)


def _lerp_backward(ctx, dy: Tensor):
    a, b, weight = ctx.saved_tensors
    scale = torch.ops.gan_ops.sample_scale
    dot = torch.ops.gan_ops.sample_dot
    da = scale(dy, weight) if ctx.needs_input_grad[0] else None
    db = scale(dy, 1 - weight) if ctx.needs_input_grad[1] else None
    return da, db, dot(dy, a) - dot(dy, b) if ctx.needs_input_grad[2] else None


register(
    "sample_squared_norm(Tensor x) -> Tensor",
    reference=_norm_reference,
    fake=_norm_fake,
    setup_context=_save_inputs,
    backward=_norm_backward,
)
register(
    "sample_dot(Tensor a, Tensor b) -> Tensor",
    reference=_dot_reference,
    fake=_dot_fake,
    setup_context=_save_inputs,
    backward=_dot_backward,
)
register(
    "sample_scale(Tensor x, Tensor w) -> Tensor",
    reference=_scale_reference,
    fake=_like_first,
    setup_context=_save_inputs,
    backward=_scale_backward,
)
register(
    "sample_lerp(Tensor a, Tensor b, Tensor w) -> Tensor",
    reference=_lerp_reference,
    fake=_like_first,
    setup_context=_save_inputs,
    backward=_lerp_backward,
)
