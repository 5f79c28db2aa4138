"""conv2d against torch's own convolution, to the second derivative, in every memory order, dtype and grouping."""

import itertools

import pytest
import torch
from devices import CUDA, DEVICES, TOLERANCES, in_layout
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from ops import conv2d
from ops.layout import is_channels_last

CASES = [  # shape of x, shape of the weight, padding, groups
    ((2, 3, 5, 4), (4, 3, 3, 3), 1, 1),
    ((2, 3, 5, 4), (2, 3, 1, 1), 0, 1),
    ((1, 1, 4, 4), (3, 1, 1, 1), 0, 1),
    ((2, 4, 3, 3), (1, 4, 1, 1), 0, 1),
    ((2, 4, 4, 5), (6, 2, 3, 3), 1, 2),
    ((2, 4, 4, 5), (4, 1, 3, 1), (2, 0), 4),
    ((2, 4, 3, 4), (4, 2, 1, 1), 0, 2),
    ((1, 2, 2, 2), (2, 2, 2, 3), (0, 3), 1),
]
ORDERS = list(itertools.product([False, True], repeat=2))


def tensors(shape, weight_shape, orders=(False, False), dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(s, generator=generator, dtype=torch.float64) for s in (shape, weight_shape)]
    return [in_layout(t.to(dtype), order).to(device).requires_grad_() for t, order in zip(made, orders, strict=True)]


def all_derivatives(convolve, x, weight):
    """The result, its derivatives, and those of the squared norm of its input gradient, as a penalty takes them."""
    y = convolve(x, weight)
    dx, dweight = torch.autograd.grad(y.float().square().sum(), (x, weight), create_graph=True)
    penalty = dx.float().square().sum() + dweight.float().square().sum()
    return y, dx, dweight, *torch.autograd.grad(penalty, (x, weight))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES)
def test_first_and_second_derivatives(case, device):
    shape, weight_shape, padding, groups = case
    on_gpu = device == "cuda"
    # By a random projection, as hundreds of small calls take a GPU long. cuDNN may sum weight gradients in any order.
    how = {"fast_mode": on_gpu, "nondet_tol": 1e-10 if on_gpu else 0.0}
    for orders in ORDERS:
        inputs = tensors(shape, weight_shape, orders, device=device)
        assert gradcheck(lambda x, w: conv2d(x, w, padding, groups), inputs, **how)
        assert gradgradcheck(lambda x, w: conv2d(x, w, padding, groups) ** 2, inputs, **how)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_equals_torch_in_float64(case, dtype, device):
    shape, weight_shape, padding, groups = case
    for orders in ORDERS:
        inputs = tensors(shape, weight_shape, orders, dtype, device)
        ours = all_derivatives(lambda x, w: conv2d(x, w, padding, groups), *inputs)
        exact = [t.detach().double().requires_grad_() for t in inputs]
        theirs = all_derivatives(lambda x, w: F.conv2d(x, w, padding=padding, groups=groups), *exact)
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == dtype
            scale = b.abs().max().item()
            # The penalty's derivatives go through five rounded products in bfloat16.
            torch.testing.assert_close(a.double(), b, rtol=0, atol=4 * TOLERANCES[dtype] * scale)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernel", [1, 3])
def test_results_and_gradients_have_the_memory_order_of_x(kernel, device):
    for channels_last in (False, True):
        x, weight = tensors((2, 3, 4, 4), (4, 3, kernel, kernel), (channels_last, channels_last), device=device)
        y, dx, dweight, ddx, ddweight = all_derivatives(lambda x, w: conv2d(x, w, kernel // 2), x, weight)
        assert [is_channels_last(t) for t in (y, dx, ddx)] == [channels_last] * 3
        if kernel == 3:
            assert [is_channels_last(t) for t in (dweight, ddweight)] == [channels_last] * 2


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_of_any_order_are_taken(device):
    x, weight = tensors((2, 3, 4, 4), (4, 3, 3, 3), device=device)
    y = conv2d(x, weight, 1)
    theirs = F.conv2d(x, weight, padding=1)
    for dy in (torch.ones(()).expand(y.shape), torch.randn(2, 4, 4, 4).permute(0, 3, 1, 2)):
        dy = dy.to(y)
        ours = torch.autograd.grad(y, (x, weight), dy, retain_graph=True)
        torch.testing.assert_close(ours, torch.autograd.grad(theirs, (x, weight), dy, retain_graph=True))


@pytest.mark.parametrize(
    ("case", "device"),
    [*((case, "cpu") for case in CASES), pytest.param(CASES[0], "cuda", marks=CUDA.marks)],
)
def test_ops_are_registered_as_torch_asks(case, device):
    shape, weight_shape, padding, groups = case
    both = [padding, padding] if isinstance(padding, int) else list(padding)
    for orders in ORDERS if device == "cpu" else [(True, True)]:  # registered once for all devices
        x, weight = tensors(shape, weight_shape, orders, device=device)
        dy = torch.randn_like(conv2d(x, weight, padding, groups)).requires_grad_()
        ops = torch.ops.gan_ops
        torch.library.opcheck(ops.conv2d.default, (x, weight, both, groups))
        torch.library.opcheck(ops.conv2d_input_gradient.default, (dy, weight, list(shape[2:]), both, groups))
        torch.library.opcheck(ops.conv2d_weight_gradient.default, (dy, x, list(weight_shape[2:]), both, groups))


def test_second_derivative_never_calls_torch_own():
    """A gradient penalty's backward pass is made of the three ops alone."""
    x, weight = tensors((2, 3, 4, 4), (4, 3, 3, 3))
    with torch.profiler.profile() as profile:
        all_derivatives(lambda x, w: conv2d(x, w, 1), x, weight)
    names = {event.name for event in profile.events()}
    assert "gan_ops::conv2d_weight_gradient" in names
    assert not [name for name in names if "double_backward" in name or "ConvolutionBackward" in name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 3, 4), torch.zeros(4, 3, 3, 3)), "x must be"),
        ((torch.zeros(2, 3, 4, 4), torch.zeros(4, 3, 3, 3).double()), "weight must be"),
        ((torch.zeros(2, 3, 4, 4), torch.zeros(4, 2, 3, 3)), "does not fit x"),
        ((torch.zeros(2, 4, 4, 4), torch.zeros(3, 2, 3, 3), 1, 2), "2 groups"),
        ((torch.zeros(2, 3, 4, 4), torch.zeros(4, 3, 3, 3), -1), "padding"),
        ((torch.zeros(2, 3, 2, 4), torch.zeros(4, 3, 3, 3)), "does not fit into x"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        conv2d(*arguments)
