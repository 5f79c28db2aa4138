"""upfirdn2d against its definition written as loops, its adjoint, autograd, and torch's own resampling."""

import itertools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from ops import downsample2d, filter2d, setup_filter, upfirdn2d, upsample2d

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


@pytest.mark.parametrize("up,down", [((1, 1), (1, 1)), ((2, 2), (1, 1)), ((1, 1), (2, 2)), ((3, 2), (2, 3))])
@pytest.mark.parametrize("padding", [(2, 2, 2, 2), (3, 1, 4, 2), (4, -1, -1, 4)])
@pytest.mark.parametrize("flip", [False, True])
def test_equals_the_definition_and_its_derivatives_are_exact(up, down, padding, flip):
    torch.manual_seed(0)
    filters = [torch.tensor(f, dtype=torch.float64) for f in FILTERS] + [torch.rand(2, 3, dtype=torch.float64)]
    for shape, filter in itertools.product(SHAPES, filters):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        try:
            y = upfirdn2d(x, filter, up, down, padding, 1.7, flip)
        except ValueError as error:
            assert "leaves no output" in str(error)
            continue
        torch.testing.assert_close(y, by_definition(x, filter, up, down, padding, 1.7, flip))
        assert gradcheck(lambda x: upfirdn2d(x, filter, up, down, padding, 1.7, flip), (x,), fast_mode=True)  # noqa: B023
        # The op is linear: a cube behind it gives the second derivative something to find.
        assert gradgradcheck(lambda x: upfirdn2d(x, filter, up, down, padding, 1.7, flip) ** 3, (x,), fast_mode=True)  # noqa: B023


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
    assert filter2d(x, filter).shape == x.shape
    inside = (..., slice(4, -4), slice(4, -4))
    if len(taps) % 2 == 0:  # odd filters do not give both phases of an upsampled plane the same weight
        torch.testing.assert_close(upsample2d(x, filter)[inside], torch.ones(1, 1, 24, 16, dtype=torch.float64))
    torch.testing.assert_close(filter2d(x, filter)[inside], torch.ones(1, 1, 8, 4, dtype=torch.float64))


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_lower_precisions_agree_with_float64(dtype, tolerance):
    x, filter = torch.rand(2, 3, 8, 8, dtype=torch.float64), setup_filter([1, 3, 3, 1])
    for op in (upsample2d, downsample2d, filter2d):
        torch.testing.assert_close(op(x.to(dtype), filter).double(), op(x, filter), rtol=tolerance, atol=tolerance)
        assert op(x.to(dtype), filter).dtype == dtype


def test_registration():
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    arguments = (x, setup_filter([1, 3, 3, 1]), [2, 2], [1, 1], [2, 1, 2, 1], False, 4.0)
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
        ({"padding": -3}, "leaves no output"),
        ({"filter": torch.ones(9)}, "leaves no output"),
        ({"x": torch.zeros(0, 3, 4, 4)}, "leaves no output"),
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
