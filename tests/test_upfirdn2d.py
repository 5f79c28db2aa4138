"""upfirdn2d against its definition written as loops, its adjoint, autograd, and torch's own resampling.

Whichever kernels are loaded: test_ops.py runs this file with the reference kernels as well.
"""

import itertools

import pytest
import torch
from devices import DEVICES, TOLERANCES, in_layout
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from ops import downsample2d, setup_filter, upfirdn2d, upsample2d
from ops.upfirdn2d import upfirdn2d_reference

SHAPES = [(2, 3, 5, 7), (1, 2, 4, 4), (1, 1, 1, 1)]
FILTERS = [[1.0], [1.0, 3.0, 3.0, 1.0], [0.5, -1.0, 2.0]]


def by_definition(x, filter, up, down, padding, gain, flip):
    """Every output pixel as a sum over taps, in Python."""
    taps = torch.outer(filter, filter) if filter.dim() == 1 else filter
    taps = taps if flip else taps.flip([0, 1])
    n, c, h, w = x.shape
    top, bottom, left, right = padding

    def at(i, j):
        inside = 0 <= i < h * up[0] and 0 <= j < w * up[1] and i % up[0] == 0 and j % up[1] == 0
        return x[:, :, i // up[0], j // up[1]] if inside else torch.zeros(n, c, dtype=x.dtype)

    rows = (h * up[0] + top + bottom - taps.shape[0]) // down[0] + 1
    columns = (w * up[1] + left + right - taps.shape[1]) // down[1] + 1
    y = torch.zeros(n, c, rows, columns, dtype=x.dtype)
    for i, j in itertools.product(range(rows), range(columns)):
        for a, b in itertools.product(range(taps.shape[0]), range(taps.shape[1])):
            y[:, :, i, j] += gain * taps[a, b] * at(i * down[0] + a - top, j * down[1] + b - left)
    return y


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("up,down", [((1, 1), (1, 1)), ((2, 2), (1, 1)), ((1, 1), (2, 2)), ((3, 2), (2, 3))])
@pytest.mark.parametrize("padding", [(2, 2, 2, 2), (3, 1, 4, 2), (4, -1, -1, 4)])
@pytest.mark.parametrize("flip", [False, True])
def test_equals_the_definition_and_its_derivatives_are_exact(up, down, padding, flip, device):
    torch.manual_seed(0)
    filters = [torch.tensor(f, dtype=torch.float64) for f in FILTERS] + [torch.rand(2, 3, dtype=torch.float64)]
    for index, (shape, filter) in enumerate(itertools.product(SHAPES, filters)):
        x = in_layout(torch.randn(shape, dtype=torch.float64), index % 2 == 1)

        def op(x):
            return upfirdn2d(x, filter.to(device), up, down, padding, 1.7, flip)  # noqa: B023

        try:
            y = op(x.to(device))
        except ValueError as error:
            assert "leaves no output" in str(error)
            continue
        torch.testing.assert_close(y.cpu(), by_definition(x, filter, up, down, padding, 1.7, flip))
        x = x.to(device).requires_grad_()
        assert gradcheck(op, (x,), fast_mode=True)
        # The op is linear: a cube behind it gives the second derivative something to find.
        assert gradgradcheck(lambda x: op(x) ** 3, (x,), fast_mode=True)


# One for every way through the kernels: taps 1 to 4 and more, even and odd; full filters; both strides and phases that
# have code of their own, and others.
TAPS = [(1,), (1, 2), (1, 2, -1), (1, 3, 3, 1), (1, 4, 6, 4, 1), tuple(range(1, 10))]
FACTORS = [((1, 1), (1, 1)), ((2, 2), (1, 1)), ((1, 1), (2, 2)), ((3, 2), (2, 3)), ((1, 2), (2, 1)), ((4, 1), (1, 5))]
PLANES = [(1, 3, 17, 37), (2, 8, 12, 24), (1, 9, 8, 40), (1, 8, 16, 16), (3, 8, 8, 8), (1, 2, 1, 3), (1, 32, 7, 40)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", PLANES)
def test_every_dtype_layout_factor_and_filter_agrees_with_float64(shape, channels_last, dtype, device):
    torch.manual_seed(1)
    x = in_layout(torch.randn(shape).to(dtype), channels_last).to(device)
    filters = [torch.tensor(taps, dtype=torch.float32) / sum(taps) for taps in TAPS]
    filters += [torch.rand(2, 3) / 3, torch.rand(4, 4) / 8]
    paddings = itertools.cycle([(0, 0, 0, 0), (2, 1, 2, 1), (-1, 2, 3, -1), (5, 4, 9, 8), (8, 9, 9, 8)])
    cases = 0
    for ((up, down), filter), padding in zip(itertools.product(FACTORS, filters), paddings, strict=False):
        flip = cases % 2 == 1
        arguments = (list(up), list(down), list(padding), flip, -1.7)
        try:
            y = upfirdn2d(x, filter.to(device), up, down, padding, -1.7, flip)
        except ValueError:
            continue
        want = upfirdn2d_reference(x.cpu().double(), filter.double(), *arguments)
        close(y, want, dtype)
        assert y.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        cases += 1
    assert cases > 25


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_filter_of_the_networks_at_every_width_and_padding(channels_last, dtype, device):
    """Its kernels take sixteen columns or channels, or twice that, and several rows at a time."""
    torch.manual_seed(4)
    filter = setup_filter([1, 3, 3, 1])
    margins = itertools.cycle([(2, 1), (1, 2), (0, 0), (3, 3), (-1, 4), (6, -2), (19, 0), (0, 23), (40, 40)])
    factors, channels = [([1, 1], [1, 1]), ([1, 1], [2, 2]), ([2, 2], [1, 1])], itertools.cycle([16, 32, 48, 16, 64])
    for width, height, (up, down) in itertools.product([*range(15, 36), 64, 65, 97], [1, 2, 5, 8], factors):
        x = in_layout(torch.randn(1, next(channels), height, width).to(dtype), channels_last).to(device)
        padding = [*next(margins), *next(margins)]
        if height * up[0] + sum(padding[:2]) < 4:
            continue
        y = upfirdn2d(x, filter.to(device), up, down, padding)
        close(y, upfirdn2d_reference(x.cpu().double(), filter.double(), up, down, padding, False, 1.0), dtype)


def close(got, want, dtype):
    """Equal to the precision of a dtype, in units of the largest number: sums cancel."""
    assert got.dtype == dtype and got.shape == want.shape
    error = (got.cpu().double() - want).abs().max()
    assert error <= TOLERANCES[dtype] * max(1, want.abs().max()), error


@pytest.mark.parametrize("device", DEVICES)
def test_an_output_that_outgrows_the_cache(device):
    """It is written past it: from 8 MB on with a CPU."""
    x, filter = torch.randn(2, 16, 256, 384), setup_filter([1, 3, 3, 1])
    for channels_last in (False, True):
        y = upsample2d(in_layout(x, channels_last).to(device), filter.to(device))
        close(y, upfirdn2d_reference(x, filter, [2, 2], [1, 1], [2, 1, 2, 1], False, 4.0).double(), torch.float32)


def test_box_taps_are_nearest_neighbor_and_mean():
    x, box = torch.randn(2, 3, 6, 8, dtype=torch.float64), setup_filter([1, 1], dtype=torch.float64)
    torch.testing.assert_close(upsample2d(x, box), F.interpolate(x, scale_factor=2))
    torch.testing.assert_close(downsample2d(x, box), F.avg_pool2d(x, 2))


@pytest.mark.parametrize("taps", [[1], [1, 1], [1, 2, 1], [1, 3, 3, 1], [1, 4, 6, 4, 1]])
def test_resampling_keeps_size_rules_and_constants(taps):
    filter = setup_filter(taps, dtype=torch.float64)
    x = torch.ones(1, 1, 16, 12, dtype=torch.float64)
    assert upsample2d(x, filter).shape == (1, 1, 32, 24)
    assert downsample2d(x, filter).shape == (1, 1, 8, 6)
    inside = (..., slice(4, -4), slice(4, -4))
    if len(taps) % 2 == 0:  # odd filters do not give both phases of an upsampled plane the same weight
        torch.testing.assert_close(upsample2d(x, filter)[inside], torch.ones(1, 1, 24, 16, dtype=torch.float64))
    torch.testing.assert_close(downsample2d(x, filter)[..., 2:-2, 2:-2], torch.ones(1, 1, 4, 2, dtype=torch.float64))


@pytest.mark.parametrize("device", DEVICES)
def test_registration(device):
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, device=device, requires_grad=True)
    filter = setup_filter([1, 3, 3, 1], device=device)
    for channels_last in (False, True):
        y = in_layout(x.detach(), channels_last).requires_grad_()
        arguments = (y, filter, [2, 2], [1, 1], [2, 1, 2, 1], False, 4.0)
        torch.library.opcheck(torch.ops.gan_ops.upfirdn2d.default, arguments)


@pytest.mark.parametrize(
    "change,named",
    [
        ({"x": torch.zeros(3, 4, 4)}, "x must be"),
        ({"x": torch.zeros(1, 3, 4, 4, dtype=torch.int32)}, "x must be"),
        ({"filter": torch.zeros(1, 1, 2)}, "filter must be"),
        ({"filter": torch.ones(2, requires_grad=True)}, "filter must be"),
        ({"up": 0}, "up must be"),
        ({"down": [1, 2, 3]}, "down must be"),
        ({"padding": [1, 2]}, "padding must be"),
        ({"padding": 2**31}, "padding must be"),
        ({"padding": 1.5}, "padding must be"),
        ({"up": 2**30, "down": 1, "padding": 2**30}, "too large"),
        ({"x": torch.zeros(1, 3, 4, 4).to_sparse()}, "x must be"),
        ({"x": torch.zeros(1, 3, 4, 4, dtype=torch.float8_e4m3fn)}, "x must be"),
        ({"filter": torch.ones(2, device="meta")}, "filter must be on cpu"),
        ({"filter": torch.ones(2, dtype=torch.int64)}, "filter must be"),
        ({"padding": -3}, "leaves no output"),
        ({"filter": torch.ones(9)}, "leaves no output"),
        ({"x": torch.zeros(0, 3, 4, 4)}, "x must be"),
        ({"x": torch.zeros(1, 3, 0, 4)}, "x must be"),
    ],
)
def test_bad_arguments_are_named(change, named):
    arguments = {"x": torch.zeros(1, 3, 4, 4), "filter": torch.ones(2)} | change
    with pytest.raises(ValueError, match=named):
        upfirdn2d(**arguments)


@pytest.mark.parametrize("taps", [[], [0.0], [1.0, -1.0], [float("nan")]])
def test_bad_taps(taps):
    with pytest.raises(ValueError, match="taps must be"):
        setup_filter(taps)
