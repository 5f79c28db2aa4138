"""The per-sample maps of gradient penalties against plain torch, to the second derivative, and at a zero gradient."""

import pytest
import torch
from devices import DEVICES, TOLERANCES, in_layout
from torch.autograd import gradcheck, gradgradcheck

from ops import gradient_penalty, interpolate_samples, root, squared_norm
from ops.gradient_penalty import wide

SHAPES = [(3, 5), (2, 3, 5, 7), (1, 1), (4, 3, 32, 32), (2, 3, 150, 150)]


def pair(shape, channels_last=False, dtype=torch.float64, device="cpu"):
    torch.manual_seed(0)
    a, b = (in_layout(torch.randn(shape).to(dtype), channels_last).to(device) for _ in range(2))
    weight = torch.rand(shape[0]).to(device, wide(a))
    return a.requires_grad_(), b.requires_grad_(), weight.requires_grad_()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_plain_torch_in_float64(shape, channels_last, dtype, device):
    a, b, weight = pair(shape, channels_last, dtype, device)
    x, y, w = (t.detach().cpu().double() for t in (a, b, weight))
    sums = {"rtol": 1e-12 if dtype == torch.float64 else 1e-6, "atol": 0}
    got = squared_norm(a)
    assert got.dtype == wide(a)
    torch.testing.assert_close(got.cpu().double(), x.square().flatten(1).sum(1), **sums)
    got = gradient_penalty(a, 1.0)
    norm = x.flatten(1).norm(dim=1)
    torch.testing.assert_close(got.cpu().double(), (norm - 1).square(), rtol=1e-5, atol=1e-6)
    center = norm.mean().item()  # some norms above it and, of several, some below
    got = gradient_penalty(a, center, one_sided=True)
    torch.testing.assert_close(got.cpu().double(), (norm - center).clamp(min=0).square(), rtol=1e-3, atol=1e-4)
    dots = torch.ops.gan_ops.sample_dot(a, b).cpu().double()
    torch.testing.assert_close(dots, (x * y).flatten(1).sum(1), rtol=0, atol=1e-5 * x[0].numel() ** 0.5)
    tolerance = {"rtol": 3 * TOLERANCES[dtype], "atol": TOLERANCES[dtype]}
    each = w.view(-1, *[1] * (x.dim() - 1))
    between = interpolate_samples(a, b, weight)
    assert between.dtype == dtype and between.stride() == a.stride()
    torch.testing.assert_close(between.cpu().double(), each * x + (1 - each) * y, **tolerance)
    scaled = torch.ops.gan_ops.sample_scale(a, weight)
    assert scaled.dtype == dtype and scaled.stride() == a.stride()
    torch.testing.assert_close(scaled.cpu().double(), each * x, **tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 2, 3)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_derivatives_of_both_orders(shape, channels_last, device):
    a, b, weight = pair(shape, channels_last, device=device)
    ops = torch.ops.gan_ops
    for function, inputs in [
        (squared_norm, (a,)),
        (lambda a: gradient_penalty(a, 1.0), (a,)),
        (ops.sample_dot, (a, b)),
        (ops.sample_scale, (a, weight)),
        (interpolate_samples, (a, b, weight)),
    ]:
        assert gradcheck(function, inputs)
        assert gradgradcheck(lambda *inputs: function(*inputs) ** 3, inputs)  # noqa: B023


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_are_rounded_to_nearest_as_torch_does(dtype, device):
    """Every 16-bit number, infinities and NaN among them, times weights that leave ties and all sorts of rests."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).expand(4, -1).contiguous()
    weight = torch.tensor([1.0, 1.5, 1 / 3, 1 + 2**-9])
    got = torch.ops.gan_ops.sample_scale(x.to(device), weight.to(device)).cpu()
    torch.testing.assert_close(got, (x.float() * weight.view(-1, 1)).to(dtype), rtol=0, atol=0, equal_nan=True)


def test_each_input_alone_may_want_a_gradient():
    a, b, weight = pair((2, 3))
    for wanted in (a, b, weight):
        inputs = [t if t is wanted else t.detach() for t in (a, b, weight)]
        (got,) = torch.autograd.grad(interpolate_samples(*inputs).square().sum(), wanted)
        lerp = torch.lerp(b, a, weight.view(-1, 1)).square().sum()
        torch.testing.assert_close(got, torch.autograd.grad(lerp, wanted)[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-14, 1e-6])
@pytest.mark.parametrize("center", [0.0, 1.0])
def test_a_vanishing_gradient_gives_finite_derivatives(center, scale, device):
    """Through a critic whose input gradient vanishes, as it does at its start or where it saturates."""
    x = torch.zeros(2, 4, device=device, requires_grad=True)
    w = torch.full((4,), scale, device=device, requires_grad=True)
    (gradient,) = torch.autograd.grad((x @ w).sum(), x, create_graph=True)
    penalty = gradient_penalty(gradient, center)
    (dw,) = torch.autograd.grad(penalty.sum(), w, create_graph=True)
    assert torch.isfinite(penalty).all() and torch.isfinite(dw).all()
    if dw.requires_grad:
        (ddw,) = torch.autograd.grad(dw.sum(), w)
        assert torch.isfinite(ddw).all()
    if scale == 0:
        assert dw.eq(0).all() and penalty.eq(center).all()


def test_root_of_ordinary_numbers_is_sqrt():
    squared = torch.tensor([1e-12, 0.25, 4.0, 1e12], requires_grad=True)
    torch.testing.assert_close(root(squared), squared.sqrt())
    ours, theirs = (torch.autograd.grad(f(squared).sum(), squared)[0] for f in (root, torch.sqrt))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("device", DEVICES)
def test_sums_are_wider_than_float32(device):
    """A million ones and one number that float32 has no room for beside them."""
    x = torch.ones(1, 2**20 + 1, device=device)
    x[0, 0] = 4096.0
    assert squared_norm(x).item() == 2**24 + 2**20


def test_sums_do_not_depend_on_the_threads():
    x, before, results = torch.randn(2, 3, 200, 200), torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(squared_norm(x))
    torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results)


@pytest.mark.parametrize("device", DEVICES)
def test_registration(device):
    ops = torch.ops.gan_ops
    for channels_last in (False, True):
        a, b, weight = pair((2, 3, 2, 2), channels_last, device=device)
        torch.library.opcheck(ops.sample_squared_norm.default, (a,))
        torch.library.opcheck(ops.sample_dot.default, (a, b))
        torch.library.opcheck(ops.sample_scale.default, (a, weight))
        torch.library.opcheck(ops.sample_lerp.default, (a, b, weight))


@pytest.mark.parametrize(
    "change,named",
    [
        ({"a": torch.zeros(2, 3, dtype=torch.int64)}, "a must be"),
        ({"a": torch.zeros(6)}, "a must be"),
        ({"a": torch.zeros(0, 3)}, "a must be"),
        ({"b": torch.zeros(2, 4)}, "b must be"),
        ({"b": torch.zeros(2, 3, dtype=torch.float64)}, "b must be"),
        ({"b": torch.zeros(2, 3, device="meta")}, "b must be"),
        ({"weight": torch.zeros(3)}, "weight must be"),
        ({"weight": torch.zeros(2, dtype=torch.float64)}, "weight must be"),
    ],
)
def test_bad_arguments_are_named(change, named):
    with pytest.raises(ValueError, match=named):
        interpolate_samples(**{"a": torch.zeros(2, 3), "b": torch.zeros(2, 3), "weight": torch.zeros(2)} | change)


def test_a_gradient_of_a_kind_that_no_kernel_takes_is_refused():
    with pytest.raises(ValueError, match="x must be"):
        gradient_penalty(torch.zeros(2, 3, dtype=torch.complex64))
