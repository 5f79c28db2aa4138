"""Networks that turn images into the vectors that scores compare."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from gan.errors import UserError
from gan.metrics.classifier import FEATURES, LARGEST_SIDE, Classifier

CHUNK = 32  # images a pass; always as many, since kernels may add up in another order for another number


@dataclass(frozen=True)
class FeatureNetwork:
    """A frozen network, with all that its features depend on. Compare only scores with equal `sha256`, `side` and
    `resize`."""

    name: str  # scores are named after it: fd-lite0, kid-lite0
    sha256: str  # of the weights
    side: int  # pixels that images are resized to, height and width alike; 0 if that depends on the image
    resize: str  # how they are resized
    width: int  # F, numbers an image
    run: Callable[[np.ndarray], np.ndarray]  # uint8 [CHUNK, H, W, C] -> float32 [CHUNK, F]

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Images uint8 [N, H, W, C] -> features float32 [N, F]. The features of an image do not depend on the others.

        Raises UserError for features that are not finite.
        """
        features = np.empty((len(images), self.width), np.float32)
        for start in range(0, len(images), CHUNK):
            part = images[start : start + CHUNK]
            full = np.concatenate([part, np.zeros((CHUNK - len(part), *part.shape[1:]), np.uint8)])
            features[start : start + CHUNK] = self.run(full)[: len(part)]
        if not np.isfinite(features).all():
            raise UserError(f"the features of {self.name} are not all finite: the network does not fit these images")
        return features


def load_features(spec: str, device: str | torch.device = "cpu") -> FeatureNetwork:
    """`lite0`, or PATH:SHA256 of a file of the user's own -> the network, on a device.

    Raises UserError if the network is not installed, or the file is not what the hash says.
    """
    raise UserError(f"unknown features {spec!r}: give lite0, or PATH:SHA256 of a TorchScript file")


def classifier_features(classifier: Classifier) -> FeatureNetwork:
    """The classifier's features [N, 64] under the name `classifier`; the hash is that of all its tensors."""
    digest = hashlib.sha256()
    for tensor in classifier.network.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    return FeatureNetwork(
        name="classifier",
        sha256=digest.hexdigest(),
        side=0,
        resize=f"averaged down to {LARGEST_SIDE} pixels where it is larger",
        width=FEATURES,
        run=lambda images: classifier(images)[0],
    )
