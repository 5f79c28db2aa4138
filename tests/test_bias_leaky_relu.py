"""bias_leaky_relu against torch's own leaky ReLU, to the second derivative, in every layout and ragged shape."""

import itertools
import math

import pytest
import torch
from devices import DEVICES, TOLERANCES, in_layout
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from ops import bias_leaky_relu

SHAPES = [(3, 5), (2, 3, 4), (2, 3, 5, 7), (1, 1, 1, 1), (2, 4, 4, 4)]


def plain(x, bias=None):
    shifted = x if bias is None else x + bias.view(-1, *[1] * (x.dim() - 2))
    return F.leaky_relu(shifted, 0.2) * math.sqrt(2)


def tensors(shape, channels_last=False, dtype=torch.float64, device="cpu"):
    torch.manual_seed(1)
    x = in_layout(torch.randn(shape).to(dtype), channels_last).to(device)
    return x.requires_grad_(), torch.randn(shape[1]).to(device, dtype).requires_grad_()


def layouts(shape):
    return [False, True] if len(shape) == 4 else [False]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_value_and_derivatives(shape, with_bias, device):
    for channels_last in layouts(shape):
        x, bias = tensors(shape, channels_last, device=device)
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


LARGER = [(3, 5), (70, 8, 3, 3), (2, 16, 33, 33), (3, 12, 40, 40), (1, 3, 200, 200), (4, 513), (1, 7, 1, 1), (300, 24)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", LARGER)
def test_every_dtype_and_layout_agrees_with_float64(shape, dtype, device):
    """Planes and pixels of every length, more than one chunk of a sum, and the bias gradient's sum over all of them."""
    tolerance = TOLERANCES[dtype]
    for channels_last, with_bias in itertools.product(layouts(shape), (False, True)):
        x, bias = tensors(shape, channels_last, dtype, device)
        inputs = (x, bias) if with_bias else (x,)
        y = bias_leaky_relu(*inputs)
        wide = [t.detach().cpu().double().requires_grad_() for t in inputs]
        want = plain(*wide)
        torch.testing.assert_close(y.cpu().double(), want, rtol=tolerance, atol=tolerance)
        assert y.stride() == x.stride()
        dy = torch.randn(shape).to(dtype)
        got = torch.autograd.grad(y, inputs, dy.to(device))
        for a, b in zip(got, torch.autograd.grad(want, wide, dy.double()), strict=True):
            assert a.dtype == dtype
            torch.testing.assert_close(a.cpu().double(), b, rtol=3 * tolerance, atol=30 * tolerance)


@pytest.mark.parametrize("channels_last", [False, True])
def test_sums_do_not_depend_on_the_threads(channels_last):
    x, bias = tensors((4, 24, 60, 60), channels_last, torch.float32)
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(torch.autograd.grad(bias_leaky_relu(x, bias).square().sum(), (x, bias)))
    torch.set_num_threads(before)
    for dx, dbias in results[1:]:
        assert torch.equal(dx, results[0][0]) and torch.equal(dbias, results[0][1])


@pytest.mark.parametrize("device", DEVICES)
def test_bits_in_memory_order(device):
    """A bit is set where x + bias is positive, and none beyond the last element."""
    for shape, channels_last in itertools.product([(1, 3, 5, 7), (2, 8, 3, 3), (3, 5)], (False, True)):
        x, bias = (t.detach() for t in tensors(shape, channels_last, torch.float32, device))
        y, bits = torch.ops.gan_ops.bias_leaky_relu(x, bias, 0.2, 1.0)
        order = (0, 2, 3, 1) if y.dim() == 4 and not y.is_contiguous() else tuple(range(y.dim()))
        flat = (x + bias.view(-1, *[1] * (x.dim() - 2))).permute(order).flatten().cpu() > 0
        packed = [sum(int(bit) << i for i, bit in enumerate(flat[at : at + 8])) for at in range(0, len(flat), 8)]
        assert bits.tolist() == packed


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
        ({"x": torch.zeros(2, 3).to_sparse()}, "x must be"),
        ({"x": torch.zeros(0, 3)}, "x must be"),
        ({"bias": torch.zeros(3, device="meta")}, "bias must be"),
        ({"bias": torch.zeros(4)}, "bias must be"),
        ({"bias": torch.zeros(3, dtype=torch.float64)}, "bias must be"),
        ({"slope": 0.0}, "slope must be"),
        ({"gain": math.inf}, "gain finite"),
    ],
)
def test_bad_arguments_are_named(change, named):
    with pytest.raises(ValueError, match=named):
        bias_leaky_relu(**{"x": torch.zeros(2, 3), "bias": torch.zeros(3)} | change)
