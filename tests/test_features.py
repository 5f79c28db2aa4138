"""Features of images: of the classifier, of lite0 and of the user's own files; what is refused."""

import hashlib
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from devices import CUDA
from torch import Tensor, nn

import gan.metrics.lite0 as lite0
from gan.errors import UserError
from gan.metrics.classifier import Classifier, build_network
from gan.metrics.features import CHUNK, FeatureNetwork, classifier_features, full_precision, load_features, to_rgb


def random_images(count: int, side: int = 16, channels: int = 3) -> np.ndarray:
    return np.random.RandomState(0).randint(0, 256, (count, side, side, channels), dtype=np.uint8)


def small_classifier() -> Classifier:
    torch.manual_seed(0)
    return Classifier(build_network(3, 4, width=8).eval(), classes=4, accuracy=1.0, held_out=1)


class Means(nn.Module):
    """Means of the color channels over the pixels, scaled: features with a closed form."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float().mean((2, 3)) * 2


class Detector(nn.Module):
    """Probabilities unless features are asked for, as Inception files of the StyleGAN family."""

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        features = x.float().mean((2, 3))
        return features if return_features else features.softmax(1)


class Integers(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum((2, 3))


class Maps(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float()


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.float().mean((2, 3)), x


class Summed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float().mean((0, 2, 3))[None]


class Logarithms(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float().mean((2, 3)).log()


class Fixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float().flatten(1) @ torch.ones(3 * 299 * 299, 5)


def saved(module: nn.Module, path: Path) -> str:
    """Save a TorchScript file; -> PATH:SHA256."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(module).save(path)
    return f"{path}:{hashlib.sha256(path.read_bytes()).hexdigest()}"


@pytest.fixture(params=["classifier", "lite0", "file"])
def network(request, tmp_path) -> FeatureNetwork:
    if request.param == "classifier":
        return classifier_features(small_classifier())
    if request.param == "lite0":
        pytest.importorskip(lite0.PACKAGE)
        return load_features("lite0")
    body = nn.Sequential(nn.Conv2d(3, 40, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = body

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x.float())

    return load_features(saved(Own(), tmp_path / "own.pt"))


def test_features_of_an_image_do_not_depend_on_the_others(network):
    """Bit for bit, in whatever batches they come: so any number of ranks has the same scores."""
    images = random_images(CHUNK + 5)
    features = network(images)
    assert features.shape == (len(images), network.width)
    assert features.dtype == np.float32
    assert np.ptp(features, axis=0).max() > 0
    np.testing.assert_array_equal(network(images[7:10]), features[7:10])
    np.testing.assert_array_equal(network(images[::-1]), features[::-1])
    assert network(images[:0]).shape == (0, network.width)


def test_features_do_not_depend_on_the_number_of_threads(network):
    images = random_images(CHUNK)
    features = network(images)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads % 2 + 1)
    try:
        np.testing.assert_array_equal(network(images), features)
    finally:
        torch.set_num_threads(threads)


def test_settings_of_the_caller_are_restored():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with full_precision():
            assert not torch.backends.cuda.matmul.allow_tf32
            assert not torch.backends.cudnn.allow_tf32
            assert torch.is_inference_mode_enabled()
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("device", [CUDA])
def test_features_on_a_gpu_are_those_of_a_cpu(device):
    pytest.importorskip(lite0.PACKAGE)
    images = random_images(CHUNK + 3)
    here = load_features("lite0")(images)
    there = load_features("lite0", device)
    np.testing.assert_allclose(there(images), here, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(there(images[5:9]), there(images)[5:9])


def test_the_classifier_as_a_network_of_features():
    classifier = small_classifier()
    network = classifier_features(classifier)
    images = random_images(CHUNK, side=40)
    np.testing.assert_allclose(network(images), classifier(images)[0], rtol=1e-6)
    assert (network.name, network.width) == ("classifier", 64)
    assert network.sha256 == classifier_features(small_classifier()).sha256
    with torch.no_grad():
        classifier.network[0].weight[0, 0, 0, 0] += 1
    assert network.sha256 != classifier_features(classifier).sha256


def test_lite0_sees_small_images_at_128_pixels_and_large_ones_at_224():
    """A plain color is the same at every size, except that padding with zeros weighs more in a small input."""
    pytest.importorskip(lite0.PACKAGE)
    network = load_features("lite0")
    whole = lite0.load_lite0()[:-1]
    for side, seen in [(8, 128), (64, 128), (65, 224), (300, 224)]:
        expected = whole(torch.full((1, 3, seen, seen), 200.0)).numpy()
        features = network(np.full((1, side, side, 3), 200, np.uint8))
        np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-4)


def test_gray_and_transparent_images():
    gray = random_images(3, channels=1)
    assert to_rgb(gray).numpy().tolist() == np.repeat(gray, 3, 3).transpose(0, 3, 1, 2).tolist()
    color = [10, 20, 30]
    opaque, half, clear = (
        to_rgb(np.array([[[[*color, alpha]]]], np.uint8)).flatten().tolist() for alpha in (255, 51, 0)
    )
    assert opaque == color
    assert half == [206, 208, 210]  # a fifth of the color, the rest white
    assert clear == [255, 255, 255]
    with pytest.raises(UserError, match="1, 3 or 4 channels, not 2"):
        to_rgb(random_images(3, channels=2))


def test_a_file_of_the_users_own(tmp_path):
    spec = saved(Means(), tmp_path / "means.pt")
    network = load_features(spec)
    assert (network.name, network.width, f"{tmp_path}/means.pt:{network.sha256}") == ("means", 3, spec)
    images = random_images(4)
    np.testing.assert_allclose(network(images), images.mean((1, 2)) * 2, rtol=1e-5)


def test_a_file_that_must_be_asked_for_features(tmp_path):
    images = random_images(4)
    network = load_features(saved(Detector(), tmp_path / "inception-2015-12-05.pt"))
    assert network.name == "inception-2015-12-05"
    np.testing.assert_allclose(network(images), images.mean((1, 2)), rtol=1e-5)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Integers(), r"int64 \[16, 3\] for 16 images"),
        (Maps(), r"float32 \[16, 3, 64, 64\]"),
        (Summed(), r"float32 \[1, 3\] for 16 images"),
        (Pair(), "returns tuple, not a tensor"),
        (Fixed(), r"cannot take uint8 images \[16, 3, 64, 64\]: .*mat1 and mat2 shapes"),
    ],
)
def test_files_that_make_no_features(module, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        load_features(saved(module, tmp_path / "file.pt"))
    assert "\n" not in str(caught.value)


def test_features_that_are_not_finite(tmp_path):
    network = load_features(saved(Logarithms(), tmp_path / "logarithms.pt"))
    assert np.isfinite(network(random_images(3))).all()
    with pytest.raises(UserError, match="the features logarithms of these images are not all finite"):
        network(np.zeros((3, 16, 16, 3), np.uint8))


def test_a_file_is_loaded_only_with_its_hash(tmp_path, monkeypatch):
    spec = saved(Means(), tmp_path / "means.pt")
    path, _, sha256 = spec.rpartition(":")
    load_features(f"{path}:{sha256.upper()}")
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(UserError, match=f"by its hash: {path}:{sha256}"):
        load_features(path)
    with pytest.raises(UserError, match=f"another file: its SHA-256 is {sha256}, not {'0' * 64}"):
        load_features(f"{path}:{'0' * 64}")


def test_what_is_no_file_of_features(tmp_path):
    with pytest.raises(UserError, match=r"cannot read lite1: No such file.*; features are lite0, or PATH:SHA256"):
        load_features("lite1")
    with pytest.raises(UserError, match="directory"):
        load_features(str(tmp_path))
    path = tmp_path / "weights.pt"
    torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(UserError, match="is not a TorchScript file"):
        load_features(f"{path}:{hashlib.sha256(path.read_bytes()).hexdigest()}")
    with pytest.raises(UserError, match="built-in lite0: rename the file"):
        load_features(saved(Means(), tmp_path / "lite0.pt"))
