"""bias_leaky_relu against torch's own leaky ReLU, to the second derivative, in every layout and ragged shape."""

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from ops import bias_leaky_relu

SHAPES = [(3, 5), (2, 3, 4), (2, 3, 5, 7), (1, 1, 1, 1), (2, 4, 4, 4)]


def plain(x, bias=None):
    shifted = x if bias is None else x + bias.view(-1, *[1] * (x.dim() - 2))
    return F.leaky_relu(shifted, 0.2) * math.sqrt(2)


def tensors(shape, channels_last=False, dtype=torch.float64):
    torch.manual_seed(1)
    x = torch.randn(shape, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    return x.requires_grad_(), torch.randn(shape[1], dtype=dtype, requires_grad=True)


def layouts(shape):
    return [False, True] if len(shape) == 4 else [False]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_value_and_derivatives(shape, with_bias):
    for channels_last in layouts(shape):
        x, bias = tensors(shape, channels_last)
        inputs = (x, bias) if with_bias else (x,)
        torch.testing.assert_close(bias_leaky_relu(*inputs), plain(*inputs), rtol=0, atol=0)
        assert gradcheck(bias_leaky_relu, inputs)
        # Piecewise linear: a cube behind it gives the second derivative something to find.
        assert gradgradcheck(lambda *inputs: bias_leaky_relu(*inputs) ** 3, inputs)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_equal_autograd_of_the_plain_composition(shape):
    for channels_last in layouts(shape):
        x, bias = tensors(shape, channels_last)
        ours = torch.autograd.grad(bias_leaky_relu(x, bias).square().sum(), (x, bias))
        theirs = torch.autograd.grad(plain(x, bias).square().sum(), (x, bias))
        torch.testing.assert_close(ours, theirs)


def test_layout_is_kept_and_gradients_of_any_layout_are_taken():
    x, bias = tensors((2, 3, 4, 4), channels_last=True)
    y = bias_leaky_relu(x, bias)
    assert y.is_contiguous(memory_format=torch.channels_last)
    for dy in (torch.ones(()).expand(y.shape), torch.randn(y.shape), torch.randn(2, 4, 4, 3).permute(0, 3, 1, 2)):
        dy = dy.to(y.dtype)
        ours = torch.autograd.grad(y, (x, bias), dy, retain_graph=True)
        torch.testing.assert_close(ours, torch.autograd.grad(plain(x, bias), (x, bias), dy))


def test_the_derivative_at_zero_is_torchs():
    x = torch.zeros(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    (ours,) = torch.autograd.grad(bias_leaky_relu(x).sum(), x)
    (theirs,) = torch.autograd.grad(plain(x, None).sum(), x)
    torch.testing.assert_close(ours, theirs)


def test_one_bit_is_kept_per_element():
    x = torch.tensor([[1.0, -1.0, 2.0, -3.0, -1.0, -1.0, 0.0, 5.0, 7.0, -1.0]])
    _, bits = torch.ops.gan_ops.bias_leaky_relu(x, None, 0.2, 1.0)
    assert bits.dtype == torch.uint8 and bits.tolist() == [0b10000101, 0b00000001]


def test_a_backward_keeps_no_activation():
    saved = []
    x = torch.randn(4, 8, 16, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
        bias_leaky_relu(x, torch.zeros(8, requires_grad=True))
    assert sum(saved) == x.numel() // 8


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_lower_precisions_agree_with_float64(dtype, tolerance):
    x, bias = tensors((2, 8, 5, 5))
    x, bias = (t.detach().to(dtype).requires_grad_() for t in (x, bias))
    y = bias_leaky_relu(x, bias)
    wide = plain(x.double(), bias.double())
    torch.testing.assert_close(y.double(), wide, rtol=tolerance, atol=tolerance)
    dx, dbias = torch.autograd.grad(y.sum(), (x, bias))
    assert dx.dtype == dbias.dtype == dtype


def test_registration():
    for channels_last in (False, True):
        x, bias = tensors((2, 3, 4, 4), channels_last)
        torch.library.opcheck(torch.ops.gan_ops.bias_leaky_relu.default, (x, bias, 0.2, 1.4))
        _, bits = torch.ops.gan_ops.bias_leaky_relu(x, bias, 0.2, 1.4)
        backward = torch.ops.gan_ops.bias_leaky_relu_backward.default
        torch.library.opcheck(backward, (x, bits, channels_last, True, 0.2, 1.4))


@pytest.mark.parametrize(
    "change,named",
    [
        ({"x": torch.zeros(4)}, "x must be"),
        ({"x": torch.zeros(2, 3, dtype=torch.int64)}, "x must be"),
        ({"bias": torch.zeros(4)}, "bias must be"),
        ({"bias": torch.zeros(3, dtype=torch.float64)}, "bias must be"),
        ({"slope": 0.0}, "slope must be"),
        ({"gain": math.inf}, "gain finite"),
    ],
)
def test_bad_arguments_are_named(change, named):
    with pytest.raises(ValueError, match=named):
        bias_leaky_relu(**{"x": torch.zeros(2, 3), "bias": torch.zeros(3)} | change)
