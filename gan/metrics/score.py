"""Scores of generated images against real ones: a table of metrics, each a function of two samples."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gan.config import choice
from gan.errors import UserError
from gan.metrics.blocks import ROWS
from gan.metrics.classifier import one_thread
from gan.metrics.diversity import diversity, no_images, sums
from gan.metrics.frechet import frechet_estimate
from gan.metrics.intervals import Estimate, mean, share
from gan.metrics.kernel_distance import kernel_distance
from gan.metrics.modes import mode_kl_estimate, mode_kl_floor
from gan.metrics.neighbors import density_coverage, precision_recall
from gan.metrics.provenance import Provenance
from gan.metrics.sample import Sample

SAMPLES = 10_000
MOST_PAIRS = 10_000  # images of each set that metrics of all pairs compare


@dataclass(frozen=True)
class Metric:
    """A row of METRICS."""

    summary: str  # one line for `--help`
    measure: Callable[[Sample, Sample], dict[str, Estimate]]  # (reals, fakes) -> figures
    best: str  # the figure by which snapshots are compared ...
    higher: bool  # ... and is a higher one better?
    fewest: Callable[[int], int] = lambda width: 2  # images that each set needs, for features [N, width]
    pairs: bool = False  # all pairs are compared: both sets are cut to as many, at most MOST_PAIRS
    classes: bool = False  # it needs a classifier of the images
    of_features: bool = True  # its figures are named after the features: fd-lite0

    def named(self, figure: str, features: str) -> str:
        """A figure's full name."""
        return f"{figure}-{features}" if self.of_features else figure


@dataclass(frozen=True)
class Score:
    """The figures of a set of images."""

    samples: int
    figures: dict[str, Estimate]  # by full name
    by_metric: dict[str, list[str]] = field(default_factory=dict)  # the figures of each metric
    provenance: Provenance | None = None

    def __getitem__(self, figure: str) -> float:
        return self.figures[figure].value


def _fd(real: Sample, fake: Sample) -> dict[str, Estimate]:
    return {"fd": frechet_estimate(_tensor(fake), _tensor(real))}


def _kid(real: Sample, fake: Sample) -> dict[str, Estimate]:
    return {"kid": kernel_distance(_tensor(fake), _tensor(real))}


def _pr(real: Sample, fake: Sample) -> dict[str, Estimate]:
    return precision_recall(_tensor(real), _tensor(fake), k=3)


def _dc(real: Sample, fake: Sample) -> dict[str, Estimate]:
    return density_coverage(_tensor(real), _tensor(fake), k=5)


def _classes(_: Sample, fake: Sample) -> dict[str, Estimate]:
    assert fake.probabilities is not None
    samples, classes = fake.probabilities.shape
    predicted = fake.probabilities.argmax(1)
    by_chance = mode_kl_floor(samples, classes)
    figures = {
        "mode-kl": mode_kl_estimate(np.bincount(predicted, minlength=classes)),
        "mode-kl-by-chance": Estimate(by_chance, by_chance, by_chance),
        "confidence": mean(fake.probabilities.max(1)),
    }
    if fake.labels is not None:
        figures["as-asked"] = share(int((predicted == fake.labels).sum()), samples)
    return figures


def _diversity(_: Sample, fake: Sample) -> dict[str, Estimate]:
    found = _coherence_and_spread(fake.images, np.zeros(len(fake), np.int64), "")
    return found if fake.labels is None else found | _coherence_and_spread(fake.images, fake.labels, "-in-classes")


def _coherence_and_spread(images: np.ndarray, groups: np.ndarray, ending: str) -> dict[str, Estimate]:
    """Of images uint8 [N, H, W, C] in groups int64 [N], unless each image is alone in its group."""
    count = int(groups.max()) + 1
    if np.bincount(groups).max() < 2:
        return {}
    total = no_images(images.shape[1:], count)
    for start in range(0, len(images), ROWS):
        rows = slice(start, start + ROWS)
        total += sums(torch.from_numpy(images[rows]), torch.from_numpy(groups[rows]), count)
    found = diversity(total)
    return {name + ending: Estimate(value, value, value) for name, value in vars(found).items()}


def _tensor(sample: Sample) -> Tensor:
    """The features, on a GPU if there is one: float64 is fast on those that train networks."""
    return torch.from_numpy(sample.features).to("cuda" if torch.cuda.is_available() else "cpu")


METRICS = {
    "fd": Metric("Fréchet distance (Heusel et al. 2017)", _fd, best="fd", higher=False, fewest=lambda width: width + 1),
    "kid": Metric(
        "kernel distance, unbiased (Bińkowski et al. 2018)",
        _kid,
        best="kid",
        higher=False,
        fewest=lambda width: 3,
        pairs=True,
    ),
    "pr": Metric(
        "precision and recall, k=3 (Kynkäänniemi et al. 2019)",
        _pr,
        best="recall",
        higher=True,
        fewest=lambda width: 4,
        pairs=True,
    ),
    "dc": Metric(
        "density and coverage, k=5 (Naeem et al. 2020)",
        _dc,
        best="coverage",
        higher=True,
        fewest=lambda width: 6,
        pairs=True,
    ),
    "diversity": Metric(
        "coherence and spread of the pixels, of all images and within classes",
        _diversity,
        best="spread",
        higher=True,
        of_features=False,
    ),
    "classes": Metric(
        "mode-KL, confidence and accuracy in the classes asked for, by the classifier",
        _classes,
        best="mode-kl",
        higher=False,
        classes=True,
        of_features=False,
    ),
}


def find_metrics(text: str, classifier: bool) -> dict[str, Metric]:
    """The metrics named in "fd,kid", or all that apply for "". classifier: are the features those of a classifier?

    Raises UserError for unknown names, and for scores of classes without a classifier.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        known, message = choice("run.metrics", name, METRICS)
        if not known:
            raise UserError(message)
        if METRICS[name].classes and not classifier:
            raise UserError(
                f"run.metrics={name} needs a classifier of the dataset's classes: give run.features=classifier, and a "
                "dataset with classes"
            )
    wanted = names or [name for name, metric in METRICS.items() if classifier or not metric.classes]
    return {name: METRICS[name] for name in dict.fromkeys(wanted)}


def check_enough(metrics: Mapping[str, Metric], width: int, count: int, what: str, remedy: str) -> None:
    """Raises UserError if `count` images, called `what`, are too few for one of the metrics, of features [N, width]."""
    for name, metric in metrics.items():
        if count < metric.fewest(width):
            raise UserError(
                f"{count} {what} are too few for {name}, which needs {metric.fewest(width)} of {width} features each; "
                f"{remedy}"
            )


def score(real: Sample, fake: Sample, metrics: Mapping[str, Metric], features: str) -> Score:
    """All figures, under their full names, of the metrics for which there are enough images.

    real: in random order. features: the name of the network that made them. On a CPU one thread computes the figures,
    so that the number of cores does not change them.
    """
    figures: dict[str, Estimate] = {}
    by_metric: dict[str, list[str]] = {}
    with one_thread():
        for key, metric in metrics.items():
            count = min(len(real), len(fake), MOST_PAIRS)
            pair = [sample.pick(slice(count)) if metric.pairs else sample for sample in (real, fake)]
            if min(map(len, pair)) >= metric.fewest(fake.features.shape[1]):
                found = metric.measure(*pair)
                full = {metric.named(name, features): estimate for name, estimate in found.items()}
                figures |= full
                by_metric[key] = list(full)
    return Score(len(fake), figures, by_metric)


def few_repeated(labels: np.ndarray | None, each: int, count: int) -> np.ndarray:
    """Rows of `each` images of every class, or of `each` images without labels [N], repeated to `count` -> int64."""
    if labels is None:
        return np.arange(count) % each
    kept = np.concatenate([np.flatnonzero(labels == label)[:each] for label in np.unique(labels)])
    return kept[np.arange(count) % len(kept)]


def box_blur(images: np.ndarray) -> np.ndarray:
    """Blur that looks alike at any size: the mean over 3x3 pixels at 32 pixels a side, over 25x25 at 256; edges are
    repeated. uint8 [N, H, W, C] -> uint8 of that shape."""
    reach = max(3 * max(images.shape[1:3]) // 64, 1)
    window = 2 * reach + 1
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float()
    padded = F.pad(pixels, (reach, reach, reach, reach), mode="replicate")
    rows = F.avg_pool2d(padded, (window, 1), stride=1, divisor_override=1)
    total = F.avg_pool2d(rows, (1, window), stride=1, divisor_override=1)
    return (total / window**2).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
