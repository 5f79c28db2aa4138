"""How near samples are to labeled real images, in the features of a classifier of those images, and the scores of real
images to compare with (floors)."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor

from gan.metrics.classifier import Classifier
from gan.metrics.frechet import frechet_distance, gaussian_fit
from gan.metrics.modes import mode_kl, mode_kl_floor

SAMPLES = 10_000


@dataclass(frozen=True)
class Score:
    """A row of the table. Lower is better for Fréchet distance and mode-KL, higher for confidence and accuracy."""

    samples: int
    frechet_distance: float  # to all reals; the row of one half of the reals has the distance to the other half
    mode_kl: float  # KL(predicted classes || uniform), nats
    mode_kl_floor: float  # the mode-KL that as many samples from equally likely classes have by chance
    confidence: float  # mean probability of the predicted class; high for noise too, so never read it alone
    accuracy_as_asked: float | None  # share classified as the class that was asked for; None without classes


@dataclass(frozen=True)
class Reference:
    """Real images and a classifier of them: every score is measured against a Reference.

    Scores of networks are comparable only if they are measured against the same Reference, as another classifier has
    other features.

    The Fréchet distance between n and m samples of the same source is not 0: it is proportional to 1/n + 1/m. The floor
    between two halves of the N reals has n = m = N/2, hence 4/N. 10 000 samples against all reals have 1/N + 1/10 000,
    which is about 0.3 of the floor for N = 1797. So a perfect generator scores about 0.3 of the floor, and one at the
    floor is as near to the reals as half of them is to the other half. Compare only scores of equally many samples.
    """

    classifier: Classifier
    images: np.ndarray  # uint8 [N, H, W, C]
    labels: np.ndarray  # int64 [N]
    seed: int = 0  # of the division into halves

    @cached_property
    def views(self) -> tuple[np.ndarray, np.ndarray]:
        """Features [N, 64] and class probabilities [N, K] of the reals."""
        return self.classifier(self.images)

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean [64] and covariance [64, 64] of all reals' features."""
        return gaussian_fit(self.views[0])

    def floors(self) -> dict[str, Score]:
        """Rows to compare a score with: all reals, one random half of them against the other, and 3x3-blurred reals."""
        features, probabilities = self.views
        order = np.random.RandomState(self.seed).permutation(len(features))
        half, rest = np.array_split(order, 2)
        between = frechet_distance(*gaussian_fit(features[half]), *gaussian_fit(features[rest]))
        return {
            "all reals": summarize(probabilities, 0.0, self.labels),
            "half of the reals": summarize(probabilities[half], between, self.labels[half]),
            "blurred reals": score(self, [box_blur(self.images)], self.labels),
        }


def score(reference: Reference, batches: Iterable[np.ndarray], asked: np.ndarray | None = None) -> Score:
    """Score batches of samples uint8 [n, H, W, C]. asked: int64 [sum of n], the classes the network was asked for."""
    seen = [reference.classifier(images) for images in batches]
    features, probabilities = (np.concatenate(parts) for parts in zip(*seen, strict=True))
    return summarize(probabilities, frechet_distance(*gaussian_fit(features), *reference.moments), asked)


def summarize(probabilities: np.ndarray, distance: float, asked: np.ndarray | None) -> Score:
    """Make a row from class probabilities [N, K], a Fréchet distance and the classes that were asked for [N]."""
    samples, classes = probabilities.shape
    predicted = probabilities.argmax(1)
    return Score(
        samples=samples,
        frechet_distance=distance,
        mode_kl=mode_kl(np.bincount(predicted, minlength=classes)),
        mode_kl_floor=mode_kl_floor(samples, classes),
        confidence=float(probabilities.max(1).mean()),
        accuracy_as_asked=None if asked is None else float((predicted == asked).mean()),
    )


def box_blur(images: np.ndarray) -> np.ndarray:
    """Mean over 3x3 pixels, edges repeated: uint8 [N, H, W, C] -> uint8 of that shape."""
    height, width = images.shape[1:3]
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge").astype(np.uint16)
    total = np.full(images.shape, 4, np.uint16)  # half of nine: the division then rounds to nearest
    for top, left in np.ndindex(3, 3):
        total += padded[:, top : top + height, left : left + width]
    return (total // 9).astype(np.uint8)
