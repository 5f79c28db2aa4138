"""Networks that turn images into the vectors that scores compare: the classifier of the data, `lite0`, or a file of the
user's own."""

import hashlib
import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gan.errors import UserError
from gan.metrics import lite0
from gan.metrics.classifier import LARGEST_SIDE, Classifier
from gan.metrics.learned import LEARNED, ChannelClassifier

CHUNK = 16  # images a pass; always as many, since kernels may add up in another order for another number
SMALL = 64  # pixels; a larger side of an image than this is large
SMALL_INPUT, LARGE_INPUT = 128, 224  # pixels that lite0 sees of small and of large images
TRIAL = 64  # pixels a side of the images that a file is tried with
RESERVED = (*LEARNED, "lite0")


@dataclass(frozen=True)
class FeatureNetwork:
    """A frozen network, with all that its features depend on. Compare only scores with equal `sha256`, `side` and
    `resize`."""

    name: str  # scores are named after it: fd-lite0, kid-lite0
    sha256: str  # of the weights
    side: (
        int  # pixels that all images are resized to, height and width alike; 0 if it depends on them, as `resize` says
    )
    resize: str  # how they are resized
    width: int  # F, numbers an image
    run: Callable[[np.ndarray], np.ndarray]  # uint8 [CHUNK, H, W, C] -> float32 [CHUNK, F]
    classify: Callable[[np.ndarray], np.ndarray] | None = None  # features -> class probabilities [N, K]

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Images uint8 [N, H, W, C] -> features float32 [N, F]. The features of an image do not depend on the others.

        Raises UserError for features that are not finite.
        """
        features = np.empty((len(images), self.width), np.float32)
        with full_precision():
            for start in range(0, len(images), CHUNK):
                part = images[start : start + CHUNK]
                filler = np.zeros((CHUNK - len(part), *part.shape[1:]), np.uint8)
                features[start : start + CHUNK] = self.run(np.concatenate([part, filler]))[: len(part)]
        if not np.isfinite(features).all():
            raise UserError(f"the features {self.name} of these images are not all finite: use another network")
        return features


@contextmanager
def full_precision() -> Iterator[None]:
    """Within the block a GPU computes in fp32 and by deterministic kernels, and no gradients are recorded."""
    matmul = torch.backends.cuda.matmul
    allowed = matmul.allow_tf32
    matmul.allow_tf32 = False
    try:
        with (
            torch.inference_mode(),
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
        ):
            yield
    finally:
        matmul.allow_tf32 = allowed


def load_features(spec: str, device: str | torch.device = "cpu") -> FeatureNetwork:
    """`lite0`, or PATH:SHA256 of a TorchScript file of the user's own -> the network, on a device.

    Raises UserError if the network is not installed, the file has another hash, or it makes no features.
    """
    return lite0_features(device) if spec == "lite0" else file_features(spec, device)


def classifier_features(classifier: Classifier | ChannelClassifier, name: str = "classifier") -> FeatureNetwork:
    """The classifier's features [N, 64], or [N, 192] of channels, under the name of its row of LEARNED; the hash is
    that of all its tensors."""
    digest = hashlib.sha256()
    for tensor in classifier.network.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    return FeatureNetwork(
        name=name,
        sha256=digest.hexdigest(),
        side=0,
        resize=f"averaged down to {LARGEST_SIDE} pixels where larger",
        width=LEARNED[name].width,
        run=lambda images: classifier(images)[0],
        classify=classifier.probabilities,
    )


def lite0_features(device: str | torch.device) -> FeatureNetwork:
    """The last features [N, 1280] of EfficientNet-Lite0, trained on ImageNet.

    Small images are enlarged less: of CIFAR-10 it recognizes more at 128 pixels than at 224, in a third of the time.
    """
    whole = lite0.load_lite0().to(device)
    network, head = whole[:-1], whole[-1]
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # 1.7 times as fast on a CPU

    def run(images: np.ndarray) -> np.ndarray:
        pixels = to_rgb(images).to(device).float()
        side = SMALL_INPUT if max(pixels.shape[2:]) <= SMALL else LARGE_INPUT
        resized = F.interpolate(pixels, (side, side), mode="bicubic", antialias=True).clamp(0, 255)
        return network(resized.contiguous(memory_format=torch.channels_last)).cpu().numpy()

    def classify(features: np.ndarray) -> np.ndarray:
        with full_precision():
            return head(torch.from_numpy(features).to(device)).softmax(1).cpu().numpy()

    return FeatureNetwork(
        name="lite0",
        sha256=lite0.SHA256,
        side=0,
        resize=f"bicubic, antialiased, to {SMALL_INPUT} pixels a side for images up to {SMALL}, to {LARGE_INPUT} above",
        width=lite0.FEATURES,
        run=run,
        classify=classify,
    )


def to_rgb(images: np.ndarray) -> Tensor:
    """Images uint8 [N, H, W, C], C = 1 (gray), 3 or 4 (with opacity) -> uint8 [N, 3, H, W]; the ground of transparent
    ones is white. Raises UserError for other C."""
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
    channels = pixels.shape[1]
    if channels == 1:
        return pixels.expand(-1, 3, -1, -1)
    if channels == 4:
        opacity = pixels[:, 3:].float() / 255
        return (pixels[:, :3] * opacity + 255 * (1 - opacity)).round().to(torch.uint8)
    if channels != 3:
        raise UserError(f"features are made of images with 1, 3 or 4 channels, not {channels}")
    return pixels


def file_features(spec: str, device: str | torch.device) -> FeatureNetwork:
    """PATH:SHA256 of a TorchScript file -> its network, named by the file's stem.

    It takes uint8 [n, 3, H, W] of any H and W, resizes by itself, and returns floats [n, F]. One whose `forward` has an
    argument `return_features`, as the Inception files of the StyleGAN family have, is called with it.

    A TorchScript file is a program, though of tensor operations only, so it is loaded only if its user vouches for it
    by the hash. Files of `torch.export` are not taken: loading one may unpickle, and so run any Python code.
    """
    path, content = read_vouched(spec)
    if path.stem in RESERVED:
        raise UserError(f"scores with {path} would have the name of the built-in {path.stem}: rename the file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # nothing else loads the files that users have
            network = torch.jit.load(io.BytesIO(content), map_location=device).eval()
    except RuntimeError as error:
        raise UserError(f"{path} is not a TorchScript file: save one by torch.jit.save") from error
    arguments = {argument.name for argument in network.forward.schema.arguments}
    options = {"return_features": True} if "return_features" in arguments else {}

    def run(images: np.ndarray) -> np.ndarray:
        pixels = to_rgb(images).contiguous().to(device)
        try:
            with torch.jit.optimized_execution(False):  # or a GPU may fuse kernels after the first passes
                features = network(pixels, **options)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(f"{path} cannot take uint8 images {list(pixels.shape)}: {reason}") from error
        return checked(path, features).float().cpu().numpy()

    with full_precision():
        width = run(np.zeros((CHUNK, TRIAL, TRIAL, 3), np.uint8)).shape[1]
    sha256 = hashlib.sha256(content).hexdigest()
    return FeatureNetwork(path.stem, sha256, side=0, resize="by the network itself", width=width, run=run)


def read_vouched(spec: str) -> tuple[Path, bytes]:
    """PATH:SHA256 -> the path and the file's content. Raises UserError if its hash is another or none is given."""
    match = re.fullmatch(r"(.+):([0-9a-fA-F]{64})", spec)
    path = Path(match[1] if match else spec)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror or error}; features are lite0, or PATH:SHA256 of a TorchScript file"
        ) from error
    found = hashlib.sha256(content).hexdigest()
    if match is None:
        raise UserError(f"{path} is a program: if you trust it, say so by its hash: {path}:{found}")
    if found != match[2].lower():
        raise UserError(f"{path} is another file: its SHA-256 is {found}, not {match[2].lower()}")
    return path, content


def checked(path: Path, features: Any) -> Tensor:
    """What a file's network returned. Raises UserError if it is not a tensor of floats [CHUNK, F]."""
    if not isinstance(features, Tensor):
        raise UserError(f"{path} returns {type(features).__name__}, not a tensor of features [n, F]")
    if features.ndim != 2 or len(features) != CHUNK or not features.is_floating_point():
        kind = str(features.dtype).removeprefix("torch.")
        raise UserError(f"{path} returns {kind} {list(features.shape)} for {CHUNK} images, not floats [n, F]")
    return features
