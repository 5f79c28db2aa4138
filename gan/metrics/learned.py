"""Features of a classifier that is first trained on the dataset's own classes.

One sees whole images; one the single channels of stacked images, whose modes are all combinations of its classes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from torch import nn

from gan.draws import group_generators
from gan.errors import UserError
from gan.metrics.classifier import FEATURES, Classifier

Read = Callable[[np.ndarray], np.ndarray]  # numbers int64 [n] of reals -> uint8 [n, H, W, C]
CHANNELS = 3
MOST_TRAINED = 150_000  # single channels


@dataclass(frozen=True)
class ChannelClassifier:
    """A classifier of K classes that looks at each of three channels alone: the published protocol for stacked digits
    (Metz et al. 2017, section 3.3.1), with K^3 modes."""

    channel: Classifier  # of images of one channel

    @property
    def network(self) -> nn.Sequential:
        """The network that sees each channel."""
        return self.channel.network

    @property
    def classes(self) -> int:
        """The number of modes."""
        return self.channel.classes**CHANNELS

    @property
    def accuracy(self) -> float:
        """On single channels."""
        return self.channel.accuracy

    @property
    def held_out(self) -> int:
        """The number of single channels that the accuracy is of."""
        return self.channel.held_out

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 [N, H, W, 3] -> float32 (features [N, 192], those of the three channels; probabilities of the
        modes [N, K^3])."""
        parts = [self.channel(images[..., index : index + 1])[0] for index in range(CHANNELS)]
        features = np.concatenate(parts, axis=1)
        return features, self.probabilities(features)

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """Features float32 [N, 192] -> probabilities [N, K^3] of the modes: products of those of the channels."""
        first, second, third = (self.channel.probabilities(part) for part in np.split(features, CHANNELS, axis=1))
        return np.einsum("na,nb,nc->nabc", first, second, third, optimize=True).reshape(len(features), -1)


@dataclass(frozen=True)
class Learned:
    """A row of LEARNED: how a classifier of a dataset is trained and used."""

    width: int  # of the features
    classes: Callable[[Sequence[str], int], int]  # (the dataset's classes, channels) -> how many to learn; UserError
    channels: Callable[[int], int]  # of the images that it is trained on
    split: Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray]]  # (images, labels, classes) -> both
    wrap: Callable[[Classifier], "Classifier | ChannelClassifier"]
    junk: Callable[[Read, int, int], Mapping[str, Callable[[slice], np.ndarray]]] = lambda read, count, seed: {}


def stacked_classes(names: Sequence[str], channels: int) -> int:
    """K, of a dataset whose K^3 classes are all triples of K names, as of stacked digits. Raises UserError for
    others."""
    count = round(len(names) ** (1 / CHANNELS))
    single = [name[: len(name) // CHANNELS] for name in names[:: max(count**2, 1)]]
    if channels != CHANNELS or count < 2 or list(names) != ["".join(triple) for triple in product(single, repeat=3)]:
        raise UserError(
            "features=channels are of stacked images, whose classes are all triples of a channel's classes: prepare "
            "stacked-digits, or give run.features=classifier"
        )
    return count


def split_channels(images: np.ndarray, labels: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Stacked images uint8 [N, H, W, 3] with labels K^2 a + K b + c -> their channels uint8 [n, H, W, 1], at most
    MOST_TRAINED, with labels [n] of K classes; channels of one image follow each other."""
    images = images[: MOST_TRAINED // CHANNELS]
    labels = labels[: MOST_TRAINED // CHANNELS]
    digits = np.stack(np.unravel_index(labels, (classes,) * CHANNELS), axis=1)
    return np.moveaxis(images, 3, 1).reshape(-1, *images.shape[1:3], 1), digits.reshape(-1)


def junk(read: Read, count: int, seed: int) -> dict[str, Callable[[slice], np.ndarray]]:
    """Sets of images that a raw count of modes takes for good ones, by name, each a function of rows -> uint8 [n, H, W,
    3]. read: of `count` stacked reals."""

    def picks(rows: slice, columns: int) -> np.ndarray:
        generators = group_generators(seed, "junk", range(rows.start, rows.stop))
        return np.stack([generator.integers(count, size=columns) for generator in generators]).T

    def average(rows: slice) -> np.ndarray:
        chosen = picks(rows, 2 * CHANNELS)
        halves = [
            np.stack([read(chosen[side + 2 * c])[..., c] for c in range(CHANNELS)], -1).astype(np.uint16)
            for side in (0, 1)
        ]
        return ((halves[0] + halves[1] + 1) // 2).astype(np.uint8)

    def noise(rows: slice) -> np.ndarray:
        shape = read(np.zeros(1, np.int64)).shape[1:]
        random = np.random.default_rng((seed, rows.start))
        return random.integers(0, 256, (rows.stop - rows.start, *shape), np.uint8)

    return {
        "uniform noise": noise,
        "two reals averaged in each channel": average,
        "one channel of a real in all three": lambda rows: read(picks(rows, 1)[0])[..., :1].repeat(CHANNELS, axis=3),
    }


LEARNED = {
    "classifier": Learned(
        width=FEATURES,
        classes=lambda names, _: len(names),
        channels=lambda channels: channels,
        split=lambda images, labels, _: (images, labels),
        wrap=lambda classifier: classifier,
    ),
    "channels": Learned(
        width=CHANNELS * FEATURES,
        classes=stacked_classes,
        channels=lambda _: 1,
        split=split_channels,
        wrap=ChannelClassifier,
        junk=junk,
    ),
}
