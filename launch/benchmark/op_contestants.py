"""Who is measured by `saddle benchmark ops`: each op, its reference composition, what stock PyTorch has, and a copy.

An op is a row of OPS; its contest on one shape holds functions of the same inputs that make the same numbers. What it
must move through memory at the least is counted as in the byte floors of kernels: every tensor that a kernel reads or
writes once, and one bit per element where a backward keeps bits. A derivative counts as the kernels it is made of.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

import ops
from launch.benchmark.timing import Call
from ops.bias_leaky_relu import bias_leaky_relu_reference
from ops.gradient_penalty import wide
from ops.upfirdn2d import upfirdn2d_reference

Shape = tuple[int, ...]
Function = Callable[..., Tensor]
Moved = tuple[int, int]  # (numbers, bits) that one kernel reads and writes

TAPS = [1.0, 3.0, 3.0, 1.0]
SLOPE, GAIN = 0.2, math.sqrt(2)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAYOUTS = {"nchw": False, "nhwc": True}  # channels_last?

PLANES = ((8, 64, 64, 64), (4, 32, 128, 128), (16, 256, 16, 16))
LARGE_PLANES = ((32, 512, 64, 64), (32, 128, 256, 256))
IMAGES = ((16, 3, 32, 32), (16, 3, 64, 64), (16, 3, 256, 256), (8, 64, 64, 64))
LARGE_IMAGES = ((64, 3, 64, 64), (32, 3, 256, 256), (16, 3, 1024, 1024))
# Beside a copy alone, on a GPU: more than fits into its cache, and as much in small planes.
GPU_PLANES = ((16, 64, 512, 512), (64, 512, 32, 32), (64, 512, 16, 16))
GPU_IMAGES = ((16, 3, 1024, 1024), (32, 3, 256, 256))
COLORS = 3


@dataclass(frozen=True)
class Contest:
    """Functions of (x, *others), which make `output`. Only x and a bias are differentiated by."""

    output: Shape
    ours: Function
    reference: Mapping[str, Function]
    stock: Mapping[str, Function]
    moved: tuple[tuple[Moved, ...], ...]  # by the forward, by the backward, and by the backward of that
    others: tuple[Tensor, ...] = ()
    any_layout: bool = False  # stock may choose its memory order
    curved: bool = False  # the gradient depends on x too: it is differentiated by both
    wide_output: bool = False  # numbers per sample
    input: Shape = ()  # of x, where it is not the shape that the contest is for


@dataclass(frozen=True)
class Op:
    """A row of the benchmark: on which shapes, in which cases, and who competes."""

    contest: Callable[[str, Shape, torch.dtype, torch.device], Contest]
    shapes: tuple[Shape, ...]
    large: tuple[Shape, ...]  # on a GPU as well
    beside_copy: tuple[Shape, ...]  # on a GPU with --against=copy
    cases: tuple[str, ...] = ("",)
    clone: bool = False  # beside a copy that has to allocate, too


@dataclass(frozen=True)
class Resampling:
    """A case of upfirdn2d with TAPS, and depthwise convolutions (x, weight [C, 1, 4, 4]) that do the same."""

    padding: list[int]
    stock: Mapping[str, Callable[[Tensor, Tensor], Tensor]]
    up: int = 1
    down: int = 1

    def size(self, shape: Shape) -> Shape:
        """Of the output."""
        n, c, h, w = shape
        return n, c, h * self.up // self.down, w * self.up // self.down


def _transposed(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv_transpose2d(x, weight, stride=2, padding=1, groups=x.shape[1])


def _strided(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, stride=2, padding=1, groups=x.shape[1])


def _padded(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(F.pad(x, (2, 1, 2, 1)), weight, groups=x.shape[1])


def _cropped(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, padding=2, groups=x.shape[1])[:, :, :-1, :-1]


RESAMPLINGS = {
    "up2": Resampling([2, 1, 2, 1], {"depthwise transposed": _transposed}, up=2),
    "down2": Resampling([1, 1, 1, 1], {"depthwise": _strided}, down=2),
    "blur": Resampling([2, 1, 2, 1], {"depthwise, padded": _padded, "depthwise, cropped": _cropped}),
}


def _filters(device: torch.device) -> dict[str, Tensor]:
    """What the reference may take: a separable filter in two passes, or a full one in one. Which is faster varies."""
    taps = ops.setup_filter(TAPS, device=device)
    return {"separable": taps, "full": torch.outer(taps, taps)}


def _reference(case: Resampling, taps: Tensor) -> Function:
    gain = float(case.up**2)
    return lambda x: upfirdn2d_reference(x, taps, [case.up] * 2, [case.down] * 2, case.padding, False, gain)


def _upfirdn2d(name: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> Contest:
    case = RESAMPLINGS[name]
    filters = _filters(device)
    taps = filters["separable"]
    gain = float(case.up**2)
    weight = (filters["full"] * gain).to(dtype).expand(shape[1], 1, -1, -1).contiguous()
    output = case.size(shape)
    moved: tuple[Moved, ...] = ((math.prod(shape) + math.prod(output), 0),)
    return Contest(
        output,
        lambda x: ops.upfirdn2d(x, taps, case.up, case.down, case.padding, gain),
        {how: _reference(case, filter) for how, filter in filters.items()},
        {how: lambda x, f=convolve: f(x, weight) for how, convolve in case.stock.items()},
        moved=(moved, moved, moved),
        any_layout=True,
    )


def _in_place(x: Tensor) -> Tensor:
    """Activate what nobody else needs. Autograd keeps the output of leaky_relu_, which must then stay as it is."""
    y = F.leaky_relu_(x, SLOPE)
    return y * GAIN if y.requires_grad else y.mul_(GAIN)


def _per_channel(bias: Tensor) -> Tensor:
    return bias.view(-1, 1, 1)


def _bias_leaky_relu(name: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> Contest:
    count = math.prod(shape)
    backward = ((2 * count, count),)
    return Contest(
        shape,
        lambda x, bias: ops.bias_leaky_relu(x, bias, SLOPE, GAIN),
        {"": lambda x, bias: bias_leaky_relu_reference(x, bias, SLOPE, GAIN)},
        {
            "leaky_relu(x + b).mul_": lambda x, bias: F.leaky_relu(x + _per_channel(bias), SLOPE).mul_(GAIN),
            "leaky_relu_(x + b)": lambda x, bias: _in_place(x + _per_channel(bias)),
        },
        moved=(((2 * count, 0),), backward, backward),
        others=(torch.randn(shape[1], dtype=dtype, device=device, requires_grad=True),),
    )


def _squared_norm(name: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> Contest:
    count = math.prod(shape)
    return Contest(
        shape[:1],
        ops.squared_norm,
        {"": lambda x: x.to(wide(x)).pow(2).flatten(1).sum(1)},
        {
            "square().sum": lambda x: x.square().sum((1, 2, 3), dtype=wide(x)),
            "vector_norm ** 2": lambda x: torch.linalg.vector_norm(x, dim=(1, 2, 3), dtype=wide(x)).square(),
            "einsum": lambda x: torch.einsum("nchw,nchw->n", x, x).to(wide(x)),
        },
        moved=(((count, 0),), ((2 * count, 0),), ((2 * count, 0), (2 * count, 0))),
        curved=True,
        wide_output=True,
    )


def _interpolate(name: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> Contest:
    count = math.prod(shape)
    weight = torch.rand(shape[0], device=device, dtype=wide(torch.empty(0, dtype=dtype)))
    each = weight.view(-1, 1, 1, 1).to(dtype)
    scale = ((2 * count, 0),)
    return Contest(
        shape,
        lambda x, y: ops.interpolate_samples(x, y, weight),
        {"": lambda x, y: each * x + (1 - each) * y},
        {"lerp": lambda x, y: torch.lerp(y, x, each)},
        moved=(((3 * count, 0),), scale, scale),
        others=(torch.randn(shape, dtype=dtype, device=device),),
    )


def _image_convolution(name: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> Contest:
    """The 1x1 convolution of a network's last layer, or of its first one: to or from the three colors."""
    inputs, outputs = (COLORS, shape[1]) if name == "from image" else (shape[1], COLORS)
    n, _, h, w = shape
    weight = torch.randn(outputs, inputs, 1, 1, dtype=dtype, device=device) / math.sqrt(inputs)
    numbers = n * h * w * (inputs + outputs)
    each = ((numbers, 0),)  # the weight is small
    return Contest(
        (n, outputs, h, w),
        lambda x, weight: ops.conv2d(x, weight),
        {"": lambda x, weight: F.conv2d(x, weight)},
        {},
        moved=(each, (*each, *each), each),
        others=(weight.requires_grad_(),),
        input=(n, inputs, h, w),
    )


ACTIVATED = (*PLANES, (8, 64, 128, 128), (16, 64, 128, 128))
OPS = {
    "upfirdn2d": Op(_upfirdn2d, PLANES, LARGE_PLANES, GPU_PLANES, cases=tuple(RESAMPLINGS)),
    "bias_leaky_relu": Op(_bias_leaky_relu, ACTIVATED, LARGE_PLANES, GPU_PLANES, clone=True),
    "gradient_penalty": Op(_squared_norm, IMAGES, LARGE_IMAGES, GPU_IMAGES),
    "interpolate_samples": Op(_interpolate, IMAGES, LARGE_IMAGES, GPU_IMAGES),
    "conv2d": Op(
        _image_convolution,
        ((8, 64, 64, 64),),
        ((32, 64, 256, 256),),
        ((32, 64, 256, 256),),
        cases=("to image", "from image"),
    ),
}


@dataclass
class Tensors:
    """What a contestant works on, in one memory order: x, the gradient that comes in, and that of the gradient."""

    x: Tensor
    others: tuple[Tensor, ...]
    dy: Tensor
    ddx: Tensor = field(repr=False)


def make_tensors(
    contest: Contest, shape: Shape, dtype: torch.dtype, device: torch.device, channels_last: bool
) -> Tensors:
    """Random ones for a contest, dense in one of the two memory orders."""

    def random(size: Shape, kind: torch.dtype) -> Tensor:
        x = torch.randn(size, dtype=kind, device=device)
        return x.contiguous(memory_format=torch.channels_last) if channels_last and x.dim() == 4 else x

    shape = contest.input or shape
    x = random(shape, dtype)
    others = tuple(
        o if o.dim() < 4 else random(tuple(o.shape), o.dtype).requires_grad_(o.requires_grad) for o in contest.others
    )
    dy = random(contest.output, wide(x) if contest.wide_output else dtype)
    return Tensors(x.requires_grad_(), others, dy.requires_grad_(), random(shape, dtype))


def forward(contest: Contest, function: Function, on: Tensors) -> Tensor:
    """The values alone, as a generator makes them for a discriminator's step: nothing is kept for a backward."""
    with torch.no_grad():
        return function(on.x, *on.others)


def forward_backward(contest: Contest, function: Function, on: Tensors) -> tuple[Tensor, ...]:
    """The values, and the gradients by x and the bias, if there is one."""
    y = function(on.x, *on.others)
    return torch.autograd.grad(y, _differentiated(on), on.dy.detach())


def _differentiated(on: Tensors) -> list[Tensor]:
    """x, and the bias or weight, if there is one."""
    return [on.x, *(o for o in on.others if o.requires_grad)]


def double_backward(contest: Contest, function: Function, on: Tensors) -> tuple[Tensor, ...]:
    """What R1 does to an op: the values, the gradient by x with a graph of its own, and the gradient of that."""
    y = function(on.x, *on.others)
    (dx,) = torch.autograd.grad(y, on.x, on.dy, create_graph=True)
    return torch.autograd.grad(dx, (on.dy, on.x) if contest.curved else (on.dy,), on.ddx)


PASSES = {"forward": forward, "forward+backward": forward_backward, "double backward": double_backward}


def backward_alone(contest: Contest, function: Function, on: Tensors) -> Call:
    """What computes the gradients, after a forward pass that is made now."""
    y = function(on.x, *on.others)
    by = _differentiated(on)
    dy = on.dy.detach()
    return lambda: torch.autograd.grad(y, by, dy, retain_graph=True)


def second_backward_alone(contest: Contest, function: Function, on: Tensors) -> Call:
    """What computes the gradient of a gradient, after the two passes before it, which are made now."""
    y = function(on.x, *on.others)
    (dx,) = torch.autograd.grad(y, on.x, on.dy, create_graph=True)
    by = (on.dy, on.x) if contest.curved else (on.dy,)
    return lambda: torch.autograd.grad(dx, by, on.ddx, retain_graph=True)


ALONE: dict[str, Callable[[Contest, Function, Tensors], Call]] = {  # each pass without those before it
    "forward": lambda contest, function, on: lambda: forward(contest, function, on),
    "backward": backward_alone,
    "second backward": second_backward_alone,
}


def bytes_moved(contest: Contest, dtype: torch.dtype, name: str) -> list[int]:
    """What each kernel of a pass reads and writes at the least: a pass of PASSES is the forward and all before it, one
    of ALONE is itself."""
    if name in PASSES:
        parts = contest.moved[: list(PASSES).index(name) + 1]
    else:
        parts = contest.moved[list(ALONE).index(name) :][:1]
    return [numbers * dtype.itemsize + (bits + 7) // 8 for part in parts for numbers, bits in part]
