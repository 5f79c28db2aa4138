"""Scores of generated images against real ones: a table of metrics, each a function of two samples."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gan.config import check_name
from gan.errors import UserError
from gan.methods.divergences import divergence
from gan.metrics.blocks import ROWS
from gan.metrics.classifier import one_thread, shrink
from gan.metrics.copies import NEIGHBORS, copies
from gan.metrics.diversity import diversity, no_images, sums
from gan.metrics.frechet import frechet_estimate
from gan.metrics.intervals import Estimate, mean, share
from gan.metrics.kernel_distance import kernel_distance
from gan.metrics.modes import CONFIDENT, inception_score, mode_count, mode_kl_estimate, mode_kl_floor
from gan.metrics.ms_ssim import similarities
from gan.metrics.neighbors import density_coverage, precision_recall
from gan.metrics.provenance import Provenance
from gan.metrics.sample import Sample, View, groups_of_class
from gan.metrics.sliced import SIDE, level_sizes, patches, sliced_wasserstein, standardized
from gan.theory.ruler import FEWEST, estimate_divergence

MOST_PAIRS = 10_000  # images of each set that metrics of all pairs compare


@dataclass(frozen=True)
class Metric:
    """A row of METRICS."""

    summary: str  # one line for `--help`
    measure: Callable[[Sample, Sample], dict[str, Estimate]]  # (reals, fakes) -> figures
    best: str  # the figure by which snapshots are compared ...
    higher: bool  # ... and is a higher one better?
    fewest: Callable[[int], int] = lambda width: 2  # samples that it needs, for features [N, width], and ...
    fewest_reals: Callable[[int], int] | None = None  # ... reals, if that is another number
    least_side: int = 1  # pixels
    pairs: bool = False  # all pairs are compared: both sets are cut to as many, at most MOST_PAIRS
    classes: bool = False  # it needs a classifier of the dataset's classes
    probabilities: bool = False  # it needs those of any classes, as of ImageNet's
    of_features: bool = True  # its figures are named after the features: fd-lite0
    alone: bool = False  # it looks at the fakes alone
    usual: bool = True  # is it computed where no metrics are named?
    view: View | None = None  # what it needs beside features, probabilities and small images

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


def _modes(_: Sample, fake: Sample) -> dict[str, Estimate]:
    assert fake.probabilities is not None
    classes = fake.probabilities.shape[1]
    predicted = fake.probabilities.argmax(1)
    confident = predicted[fake.probabilities.max(1) >= CONFIDENT]
    return {
        "modes": mode_count(np.bincount(predicted, minlength=classes)),
        "modes-confident": mode_count(np.bincount(confident, minlength=classes)),
    }


def _is(_: Sample, fake: Sample) -> dict[str, Estimate]:
    assert fake.probabilities is not None
    return {"is": inception_score(fake.probabilities)}


def _copies(real: Sample, fake: Sample) -> dict[str, Estimate]:
    return copies(_tensor(real), _tensor(fake))


def _pixel_copies(real: Sample, fake: Sample) -> dict[str, Estimate]:
    found = copies(*(torch.from_numpy(sample.images).flatten(1).to(_device()) for sample in (real, fake)))
    return {f"pixel-{name}": figure for name, figure in found.items()}


def _js(real: Sample, fake: Sample) -> dict[str, Estimate]:
    found = estimate_divergence(divergence("js"), real.features.astype(np.float32), fake.features.astype(np.float32))
    return {"js": Estimate(found.bound, found.low, found.high)}


PATCHES = View("patches", most=10_000, look=patches)
THUMBNAILS = View("thumbnails", most=2000, look=lambda images, _: shrink(images, 128))


def _swd(real: Sample, fake: Sample) -> dict[str, Estimate]:
    of_reals, of_fakes = (torch.from_numpy(sample.views[PATCHES.name].of_images()[1]) for sample in (real, fake))
    figures = {}
    for level, (height, width) in enumerate(level_sizes(*real.views[PATCHES.name].size)):
        fakes, reals = (standardized(part[:, level]).flatten(2) for part in (of_fakes, of_reals))
        figures[f"swd-{height}x{width}"] = sliced_wasserstein(fakes, reals)
    ends = [np.mean([getattr(figure, end) for figure in figures.values()]) for end in ("value", "low", "high")]
    return {"swd": Estimate(*map(float, ends)), **figures}


def _ms_ssim(_: Sample, fake: Sample) -> dict[str, Estimate]:
    rows, images = fake.views[THUMBNAILS.name].of_images()
    found = _similarity(images, np.zeros(len(rows), np.int64), "")
    return found if fake.labels is None else found | _similarity(images, fake.labels[rows], "-in-classes")


def _similarity(images: np.ndarray, groups: np.ndarray, ending: str) -> dict[str, Estimate]:
    """Of random pairs of images in one group, unless there is no second pair: neighbors are of different classes, where
    a network made its classes in turn, or of one, where a few images of each are repeated. Of repeated ones no more are
    looked at than a view is made of."""
    order = np.random.RandomState(0).permutation(len(groups))[: THUMBNAILS.most]
    pairs = order[groups_of_class(groups[order], 2)]
    return {f"ms-ssim{ending}": mean(similarities(images, pairs))} if len(pairs) > 1 else {}


def _tensor(sample: Sample) -> Tensor:
    """The features, on a GPU if there is one: float64 is fast on those that train networks."""
    return torch.from_numpy(sample.features).to(_device())


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


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
        alone=True,
    ),
    "classes": Metric(
        "mode-KL, confidence and accuracy in the classes asked for, by the classifier",
        _classes,
        best="mode-kl",
        higher=False,
        classes=True,
        of_features=False,
        alone=True,
    ),
    "modes": Metric(
        "how many classes are seen, and how many with a probability of 0.9 or more, by the classifier",
        _modes,
        best="modes-confident",
        higher=True,
        classes=True,
        of_features=False,
        alone=True,
        usual=False,
    ),
    "is": Metric(
        "inception score, by the classes that the features tell apart (Salimans et al. 2016)",
        _is,
        best="is",
        higher=True,
        probabilities=True,
        alone=True,
        usual=False,
    ),
    "swd": Metric(
        "sliced Wasserstein distance of patches, on each level of Laplacian pyramids (Karras et al. 2018)",
        _swd,
        best="swd",
        higher=False,
        of_features=False,
        least_side=SIDE,
        usual=False,
        view=PATCHES,
    ),
    "ms-ssim": Metric(
        "how alike pairs of images are, of all and within classes (Odena et al. 2017)",
        _ms_ssim,
        best="ms-ssim",
        higher=False,
        of_features=False,
        fewest=lambda width: 4,
        alone=True,
        usual=False,
        view=THUMBNAILS,
    ),
    "js": Metric(
        "lower bound of the Jensen-Shannon divergence, at most .693, by a network that tells the features apart "
        "(Nguyen et al. 2010)",
        _js,
        best="js",
        higher=False,
        fewest=lambda width: FEWEST,
        usual=False,
    ),
    "copies": Metric(
        "share of copies of reals, and how near samples are to the nearest, by features (Carlini et al. 2023)",
        _copies,
        best="copies",
        higher=False,
        fewest_reals=lambda width: NEIGHBORS + 1,
        usual=False,
    ),
    "pixel-copies": Metric(
        "the same by pixels",
        _pixel_copies,
        best="pixel-copies",
        higher=False,
        fewest_reals=lambda width: NEIGHBORS + 1,
        of_features=False,
        usual=False,
    ),
}
ALL = "all"


def find_metrics(text: str, classifier: bool, probabilities: bool = False) -> dict[str, Metric]:
    """The metrics named in "fd,kid", the usual ones that apply for "", or all that apply for "all". classifier: are the
    features those of a classifier of the dataset's classes? probabilities: do they tell any classes apart?

    Raises UserError for unknown names, and for scores of classes without a classifier.
    """
    applying = {
        name: metric
        for name, metric in METRICS.items()
        if (classifier or not metric.classes) and (classifier or probabilities or not metric.probabilities)
    }
    if text.strip() == ALL:
        return applying
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        check_name("run.metrics", name, METRICS)
        if METRICS[name].classes and not classifier:
            raise UserError(
                f"run.metrics={name} needs a classifier of the dataset's classes: give run.features=classifier, and a "
                "dataset with classes"
            )
        if name not in applying:
            raise UserError(f"run.metrics={name} needs features with classes: give run.features=classifier or lite0")
    wanted = names or [name for name, metric in applying.items() if metric.usual]
    return {name: METRICS[name] for name in dict.fromkeys(wanted)}


def check_enough(
    metrics: Mapping[str, Metric], width: int, count: int, what: str, remedy: str, reals: bool = False
) -> None:
    """Raises UserError if `count` images, called `what`, are too few for one of the metrics, of features [N, width].
    reals: are they real ones?"""
    for name, metric in metrics.items():
        needed = ((reals and metric.fewest_reals) or metric.fewest)(width)
        if count < needed:
            raise UserError(
                f"{count} {what} are too few for {name}, which needs {needed} of {width} features each; {remedy}"
            )


def check_size(metrics: Mapping[str, Metric], size: tuple[int, int]) -> None:
    """Raises UserError if images of (height, width) are too small for one of the metrics."""
    for name, metric in metrics.items():
        if min(size) < metric.least_side:
            raise UserError(
                f"images of {size[0]}x{size[1]} are too small for {name}, which needs {metric.least_side} pixels a "
                "side; choose other metrics"
            )


def score(real: Sample, fake: Sample, metrics: Mapping[str, Metric], features: str) -> Score:
    """All figures, under their full names, of the metrics for which there are enough images and the views of them.

    real: in random order. features: the name of the network that made them. On a CPU one thread computes the figures,
    so that the number of cores does not change them.
    """
    figures: dict[str, Estimate] = {}
    by_metric: dict[str, list[str]] = {}
    with one_thread():
        for key, metric in metrics.items():
            count = min(len(real), len(fake), MOST_PAIRS)
            pair = [sample.pick(slice(count)) if metric.pairs else sample for sample in (real, fake)]
            width = fake.features.shape[1]
            reals, fakes = (_usable(sample, metric) for sample in pair)
            enough_reals = metric.alone or reals >= (metric.fewest_reals or metric.fewest)(width)
            if enough_reals and fakes >= metric.fewest(width):
                found = metric.measure(*pair)
                full = {metric.named(name, features): estimate for name, estimate in found.items()}
                figures |= full
                by_metric[key] = list(full)
    return Score(len(fake), figures, by_metric)


def _usable(sample: Sample, metric: Metric) -> int:
    """How many images of a sample the metric can look at: those in its view, if it has one."""
    if metric.view is None:
        return len(sample)
    return len(sample.views[metric.view.name]) if metric.view.name in sample.views else 0


def few_repeated(labels: np.ndarray | None, each: int, count: int) -> np.ndarray:
    """Rows of `each` images of every class, or of `each` images without labels [N], repeated to `count` -> int64.

    They are in ascending order: of images in random order, the first rows are of all classes too."""
    if labels is None:
        return np.arange(count) % each
    kept = np.sort(np.concatenate([np.flatnonzero(labels == label)[:each] for label in np.unique(labels)]))
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
