"""A convolution that is closed under differentiation: its derivatives of every order are calls of these three ops.

    conv2d(Tensor x, Tensor weight, int[2] padding, int groups) -> Tensor
    conv2d_input_gradient(Tensor dy, Tensor weight, int[2] size, int[2] padding, int groups) -> Tensor
    conv2d_weight_gradient(Tensor dy, Tensor x, int[2] kernel, int[2] padding, int groups) -> Tensor

Each is linear in both of its tensors, and the derivative of each by either tensor is another of the three. PyTorch's
own second derivative instead computes a weight gradient as a convolution whose kernel is as large as the image, which
at 1024x1024 takes most of the time of a training step. Stride 1; a bias is added elsewhere.

Kernels are those of PyTorch's library for the device (oneDNN, cuDNN). A 1x1 convolution of channels_last tensors is a
matrix product over pixels, which is faster where there are only a few channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ops.layout import check_tensor, dense, memory_format
from ops.registry import kernels, register

Pair = int | Sequence[int]
ONE = [1, 1]
ZERO = [0, 0]
_gradients = torch.ops.aten.convolution_backward.default


def conv2d(x: Tensor, weight: Tensor, padding: Pair = 0, groups: int = 1) -> Tensor:
    """Correlate x, padded with zeros, with `weight`.

    x: [N, C, H, W], weight: [O, C / groups, Fh, Fw] of the same dtype -> [N, O, H', W'], in the memory order of x, with
    H' = H + 2 * padding - Fh + 1, W' likewise. padding: one number or [vertical, horizontal].
    Raises ValueError naming the argument that is wrong.
    """
    both = [padding, padding] if isinstance(padding, int) else list(padding)
    _check(x, weight, both, groups)
    kernels()
    return torch.ops.gan_ops.conv2d.default(x, weight, both, groups)


def _check(x: Tensor, weight: Tensor, padding: list[int], groups: int) -> None:
    """Raise ValueError unless the weight fits x and the padding, and the result is not empty."""
    check_tensor("conv2d", "x", x, planes=True)
    if weight.dim() != 4 or weight.dtype != x.dtype or weight.device != x.device or weight.numel() == 0:
        raise ValueError(
            f"conv2d: weight must be a {x.dtype} [O, C / groups, Fh, Fw] on {x.device} like x, "
            f"got {weight.dtype} {list(weight.shape)} on {weight.device}"
        )
    if groups < 1 or x.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups:
        raise ValueError(
            f"conv2d: weight {list(weight.shape)} does not fit x {list(x.shape)} in {groups} groups of channels"
        )
    if len(padding) != 2 or min(padding) < 0:
        raise ValueError(f"conv2d: padding must be one number or two, none negative, got {padding}")
    if min(_output_size(x.shape[2:], weight.shape[2:], padding)) < 1:
        raise ValueError(
            f"conv2d: weight {list(weight.shape)} does not fit into x {list(x.shape)} with padding {padding}"
        )


def _output_size(size: Sequence[int], kernel: Sequence[int], padding: Sequence[int]) -> tuple[int, int]:
    """(height, width) of the result for an x of (height, width) `size`."""
    return size[0] + 2 * padding[0] - kernel[0] + 1, size[1] + 2 * padding[1] - kernel[1] + 1


def _reads_as_channels_last(x: Tensor) -> bool:
    """Is it NHWC in memory? Tensors with one channel or one pixel are NCHW at the same time."""
    return x.is_contiguous(memory_format=torch.channels_last)


def _is_product(x: Tensor, kernel: Sequence[int], padding: Sequence[int], groups: int) -> bool:
    """Is this a matrix product over the pixels of a channels_last tensor?"""
    return list(kernel) == ONE and list(padding) == ZERO and groups == 1 and _reads_as_channels_last(x)


def _rows(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N * H * W, C]; a view if x is channels_last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _planes(rows: Tensor, n: int, size: Sequence[int]) -> Tensor:
    """[N * H * W, C] -> [N, C, H, W], channels_last; a view."""
    return rows.view(n, *size, -1).permute(0, 3, 1, 2)


def _empty(like: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format(channels_last))


def _forward_kernel(x: Tensor, weight: Tensor, padding: list[int], groups: int) -> Tensor:
    if _is_product(x, weight.shape[2:], padding, groups):
        return _planes(torch.mm(_rows(x), weight.flatten(1).t()), x.shape[0], x.shape[2:])
    y = torch.ops.aten.convolution.default(x, weight, None, ONE, padding, ONE, False, ZERO, groups)
    return dense(y, _reads_as_channels_last(x))


def _input_gradient_kernel(dy: Tensor, weight: Tensor, size: list[int], padding: list[int], groups: int) -> Tensor:
    if _is_product(dy, weight.shape[2:], padding, groups):
        return _planes(torch.mm(_rows(dy), weight.flatten(1)), dy.shape[0], size)
    channels_last = _reads_as_channels_last(dy)
    x = _empty(dy, [dy.shape[0], weight.shape[1] * groups, *size], channels_last)  # only its shape and order are read
    dx, _, _ = _gradients(dy, x, weight, None, ONE, padding, ONE, False, ZERO, groups, [True, False, False])
    return dense(dx, channels_last)


def _weight_gradient_kernel(dy: Tensor, x: Tensor, kernel: list[int], padding: list[int], groups: int) -> Tensor:
    if _is_product(dy, kernel, padding, groups):
        return _planes(torch.mm(_rows(dy).t(), _rows(x)), dy.shape[1], kernel)
    channels_last = _reads_as_channels_last(dy)
    shape = [dy.shape[1], x.shape[1] // groups, *kernel]
    weight = _empty(dy, shape, channels_last)  # only its shape and order are read
    _, dw, _ = _gradients(dy, x, weight, None, ONE, padding, ONE, False, ZERO, groups, [False, True, False])
    return dense(dw, channels_last)


def _forward_fake(x: Tensor, weight: Tensor, padding: list[int], groups: int) -> Tensor:
    size = _output_size(x.shape[2:], weight.shape[2:], padding)
    return _empty(x, [x.shape[0], weight.shape[0], *size], _reads_as_channels_last(x))


def _input_gradient_fake(dy: Tensor, weight: Tensor, size: list[int], padding: list[int], groups: int) -> Tensor:
    return _empty(dy, [dy.shape[0], weight.shape[1] * groups, *size], _reads_as_channels_last(dy))


def _weight_gradient_fake(dy: Tensor, x: Tensor, kernel: list[int], padding: list[int], groups: int) -> Tensor:
    return _empty(dy, [dy.shape[1], x.shape[1] // groups, *kernel], _reads_as_channels_last(dy))


def _save(ctx, inputs, output) -> None:
    """Save each tensor only if the derivative by the other one is wanted."""
    first, second, *_, ctx.padding, ctx.groups = inputs
    ctx.first_shape = first.shape
    ctx.second_shape = second.shape
    needs_first, needs_second, *_ = ctx.needs_input_grad
    ctx.save_for_backward(first if needs_second else None, second if needs_first else None)


def _forward_backward(ctx, dy: Tensor):
    x, weight = ctx.saved_tensors
    op = torch.ops.gan_ops
    size = ctx.first_shape[2:]
    kernel = ctx.second_shape[2:]
    dx = dweight = None
    if ctx.needs_input_grad[0]:
        dx = op.conv2d_input_gradient(dy, weight, size, ctx.padding, ctx.groups)
    if ctx.needs_input_grad[1]:
        dweight = op.conv2d_weight_gradient(dy, x, kernel, ctx.padding, ctx.groups)
    return dx, dweight, None, None


def _input_gradient_backward(ctx, ddx: Tensor):
    dy, weight = ctx.saved_tensors
    op = torch.ops.gan_ops
    ddy = dweight = None
    if ctx.needs_input_grad[0]:
        ddy = op.conv2d(ddx, weight, ctx.padding, ctx.groups)
    if ctx.needs_input_grad[1]:
        dweight = op.conv2d_weight_gradient(dy, ddx, ctx.second_shape[2:], ctx.padding, ctx.groups)
    return ddy, dweight, None, None, None


def _weight_gradient_backward(ctx, ddweight: Tensor):
    dy, x = ctx.saved_tensors
    op = torch.ops.gan_ops
    ddy = dx = None
    if ctx.needs_input_grad[0]:
        ddy = op.conv2d(x, ddweight, ctx.padding, ctx.groups)
    if ctx.needs_input_grad[1]:
        dx = op.conv2d_input_gradient(dy, ddweight, ctx.second_shape[2:], ctx.padding, ctx.groups)
    return ddy, dx, None, None, None


register(
    "conv2d(Tensor x, Tensor weight, int[2] padding, int groups) -> Tensor",
    reference=_forward_kernel,
    fake=_forward_fake,
    setup_context=_save,
    backward=_forward_backward,
)
register(
    "conv2d_input_gradient(Tensor dy, Tensor weight, int[2] size, int[2] padding, int groups) -> Tensor",
    reference=_input_gradient_kernel,
    fake=_input_gradient_fake,
    setup_context=_save,
    backward=_input_gradient_backward,
)
register(
    "conv2d_weight_gradient(Tensor dy, Tensor x, int[2] kernel, int[2] padding, int groups) -> Tensor",
    reference=_weight_gradient_kernel,
    fake=_weight_gradient_fake,
    setup_context=_save,
    backward=_weight_gradient_backward,
)
