"""Scoring networks against a dataset, beside scores of real images, and showing the scores as a table."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from gan.errors import UserError
from launch.samples import classes_in_turn, device, network_source, read_reals
from launch.tables import aligned

if TYPE_CHECKING:
    from data.dataset import Dataset, ImageDataset
    from gan.checkpoint import Snapshot
    from gan.metrics.classifier import Classifier
    from gan.metrics.features import FeatureNetwork
    from gan.metrics.intervals import Estimate
    from gan.metrics.learned import ChannelClassifier
    from gan.metrics.provenance import Provenance
    from gan.metrics.sample import Sample
    from gan.metrics.score import Metric, Score
    from gan.ranks.distributed import Ranks

CLASSIFIER = "classifier"
MOST_REALS = 50_000
READ = 500  # reals that are read at a time
HALF = "half of the reals"  # the floor of one half against the other
FEW = 10  # reals, of each class if there are classes, that one floor repeats
# Beginning of a figure's name -> its heading in the table, None for the name itself, and its format; in this order.
OF_FEATURES = {
    "fd-": (None, ".2f"),
    "kid-": (None, ".4g"),
    "precision-": ("precision", ".3f"),
    "recall-": ("recall", ".3f"),
    "density-": ("density", ".3f"),
    "coverage-": ("coverage", ".3f"),
    "js-": (None, ".3f"),
    "is-": (None, ".2f"),
    "copies-": ("copies", ".3f"),
    "copies-by-chance-": ("(by chance)", ".3f"),
    "nearest-": ("nearest", ".3f"),
}
OTHERS = {
    "coherence": ("coherence", ".3f"),
    "coherence-in-classes": ("(in classes)", ".3f"),
    "spread": ("spread", ".3f"),
    "spread-in-classes": ("(in classes)", ".3f"),
    "mode-kl": ("mode-KL", ".4f"),
    "mode-kl-by-chance": ("(by chance)", ".4f"),
    "confidence": ("confidence", ".3f"),
    "as-asked": ("as asked", ".3f"),
    "modes": ("modes", ".0f"),
    "modes-confident": ("(confident)", ".0f"),
    "swd": ("SWD", ".4f"),
    "ms-ssim": ("MS-SSIM", ".3f"),
    "ms-ssim-in-classes": ("(in classes)", ".3f"),
    "pixel-copies": ("copies", ".3f"),
    "pixel-copies-by-chance": ("(by chance)", ".3f"),
    "pixel-nearest": ("nearest", ".3f"),
}


@dataclass(frozen=True)
class Reference:
    """Real images, and the network through whose features they are compared with samples.

    Scores of networks are comparable only if they are measured against the same Reference, with as many samples.

    The Fréchet distance between n and m samples of the same source is not 0: it is proportional to 1/n + 1/m. The floor
    between two halves of the N reals has n = m = N/2, hence 4/N. 10 000 samples against all reals have 1/N + 1/10 000,
    which is about 0.3 of the floor for N = 1797. So a perfect generator scores about 0.3 of the floor, and one at the
    floor is as near to the reals as half of them is to the other half.
    """

    dataset: "ImageDataset"
    level: int
    seed: int
    ranks: "Ranks"
    metrics: "Mapping[str, Metric]"
    network: "FeatureNetwork"
    classifier: "Classifier | ChannelClassifier | None"
    indices: np.ndarray  # of the reals in the dataset, in random order
    reals: "Sample"  # in that order

    def score_network(self, snapshot: "Snapshot", samples: int) -> "Score":
        """Score samples of a network. A conditional one makes all classes in turn."""
        labels = classes_in_turn(snapshot, samples)
        sample = self.observe(network_source(snapshot, labels, self.level, samples, self.seed))
        sample = dataclasses.replace(sample, labels=None if labels is None else labels.numpy())
        return self.score(sample, snapshot=snapshot.sha256)

    def floors(self, samples: int) -> "dict[str, Score]":
        """Rows to compare a score with, of as many images where the dataset has them: those of `real_floors`; blurred
        reals; a few reals, repeated, of those of which the views of metrics were made."""
        from gan.metrics.sample import Source
        from gan.metrics.score import box_blur, few_repeated

        count = min(samples, len(self.reals))
        shape = self.dataset.shape(self.level)
        blurred = self.observe(Source(count, shape, READ, lambda rows: box_blur(self._read(rows))))
        labels = self.reals.labels
        first = self.reals.rows_in_views()
        few = first[few_repeated(None if labels is None else labels[first], FEW, samples)]
        return {
            **self.real_floors(samples),
            "blurred reals": self.score(
                dataclasses.replace(blurred, labels=None if labels is None else labels[:count])
            ),
            f"{FEW} reals{' per class' * (labels is not None)}, repeated": self.score(self.reals.pick(few)),
            **self._junk(samples),
        }

    def _junk(self, samples: int) -> "dict[str, Score]":
        """Rows of images that are no good, and that some scores by these features take for good ones."""
        from gan.metrics.learned import LEARNED
        from gan.metrics.sample import Source

        learned = LEARNED.get(self.network.name)
        if learned is None:
            return {}
        sets = learned.junk(self._read, len(self.reals), self.seed)
        shape = self.dataset.shape(self.level)
        return {name: self.score(self.observe(Source(samples, shape, READ, read))) for name, read in sets.items()}

    def real_floors(self, samples: int) -> "dict[str, Score]":
        """One random half of the reals against the other; of as many reals as samples, what needs no comparison."""
        half = (len(self.reals) + 1) // 2
        alone = {name: metric for name, metric in self.metrics.items() if metric.alone}
        count = min(samples, len(self.reals))
        return {
            "all reals" if count == len(self.reals) else "reals": self.score(
                self.reals.pick(slice(count)), metrics=alone
            ),
            HALF: self.score(self.reals.pick(slice(min(samples, half))), self.reals.pick(slice(half, None))),
        }

    def score(
        self,
        sample: "Sample",
        reals: "Sample | None" = None,
        metrics: "Mapping[str, Metric] | None" = None,
        snapshot: str | None = None,
    ) -> "Score":
        """Score a sample against all reals, or against some. snapshot: the SHA-256 sum of the network that made it."""
        from gan.metrics.score import score

        reals = reals or self.reals
        found = score(reals, sample, metrics or self.metrics, self.network.name)
        return dataclasses.replace(found, provenance=self.provenance(len(reals), len(sample), snapshot))

    def observe(self, source: Any) -> "Sample":
        """See a source's images, on all ranks."""
        from gan.metrics.sample import observe

        views = [metric.view for metric in self.metrics.values() if metric.view]
        sample = observe(source, self.network, self.ranks, views)
        classify = self.network.classify
        if classify is None or not any(metric.classes or metric.probabilities for metric in self.metrics.values()):
            return sample
        return dataclasses.replace(sample, probabilities=classify(sample.features))

    def _read(self, rows: slice | np.ndarray) -> np.ndarray:
        return self.dataset.read(self.indices[rows], self.level)

    def provenance(self, reals: int, samples: int, snapshot: str | None) -> "Provenance":
        """Where a score of so many images of each kind comes from."""
        from gan.metrics.provenance import Features, Provenance, versions

        network = self.network
        return Provenance(
            Features(network.name, network.sha256, network.side, network.resize),
            self.dataset.manifest.content_hash,
            tuple(self.dataset.manifest.size(self.level)),
            reals,
            samples,
            self.seed,
            snapshot,
            versions(device()),
        )

    def summary(self) -> str:
        """One line about the features."""
        height, width = self.dataset.manifest.size(self.level)
        where = f"{len(self.reals)} images of {height}x{width}"
        if self.classifier is None:
            return f"features {self.network.name}, SHA-256 {self.network.sha256[:12]}, of {where}"
        return classifier_line(self.classifier, (height, width))


def classifier_line(classifier: "Classifier | ChannelClassifier", size: tuple[int, int]) -> str:
    """One line about a classifier of images of (H, W): classes and accuracy."""
    return (
        f"classifier of {classifier.classes} classes at {size[0]}x{size[1]}: {classifier.accuracy:.1%} right on "
        f"{classifier.held_out} held-out images"
    )


def check_scores(
    dataset: "Dataset", metrics: str, features: str, samples: int, where: str = "cpu"
) -> "tuple[dict[str, Metric], FeatureNetwork | None]":
    """The metrics, and the network of features on a device; None for a classifier, which is trained later.

    Raises UserError for what does not exist, does not fit together, or is too little: before anything takes long.
    """
    from gan.metrics.classifier import check as check_classifier
    from gan.metrics.features import load_features
    from gan.metrics.learned import LEARNED
    from gan.metrics.score import check_enough, check_size, find_metrics

    manifest = dataset.manifest
    learned = LEARNED.get(features)
    network = None
    if learned is None:
        find_metrics(metrics, classifier=False, probabilities=True)  # fails before a network is loaded
        network = load_features(features, where)
    chosen = find_metrics(metrics, learned is not None, network is not None and network.classify is not None)
    if learned:
        class_labels(dataset)
        assert manifest.classes
        check_classifier(len(dataset), manifest.resolution, learned.classes(manifest.classes, manifest.channels))
    width = network.width if network else LEARNED[features].width
    check_enough(chosen, width, samples, "samples", "make more, or choose other metrics")
    reals = min(len(dataset), MOST_REALS)
    remedy = "give a larger dataset, or choose other metrics"
    check_enough(chosen, width, reals, f"images of {dataset.path}", remedy, reals=True)
    check_size(chosen, manifest.resolution)
    return chosen, network


def features_name(features: str) -> str:
    """The name of features that `check_scores` has accepted: of PATH:SHA256, the file's without its ending."""
    return Path(features.rpartition(":")[0]).stem if ":" in features else features


def class_labels(dataset: "Dataset") -> tuple[np.ndarray, int]:
    """(labels int64 [N], number of classes). Raises UserError for a dataset without classes."""
    labels, classes = dataset.labels, dataset.manifest.classes
    if labels is None or classes is None:
        what = "no labels" if labels is None else f"vectors of {dataset.manifest.label_dim} numbers for labels"
        raise UserError(
            f"{dataset.path} has {what}, and a classifier of its images needs classes: prepare a folder with a "
            "sub-folder per class, or give run.features=lite0"
        )
    return labels, len(classes)


def build_reference(
    dataset: "ImageDataset",
    level: int,
    seed: int,
    *,
    metrics: str = "",
    features: str = CLASSIFIER,
    samples: int = MOST_REALS,
    ranks: "Ranks | None" = None,
    say: Callable[[str], object] = click.echo,
    kept: Path | None = None,
) -> Reference:
    """At most MOST_REALS images of a dataset at a level, seen through a network. It says so where it trains a
    classifier first, as that takes a while. kept: a file from which the classifier is read, or to which it is written.
    Raises UserError as `check_scores` does."""
    from gan.metrics.features import classifier_features
    from gan.metrics.sample import Source
    from gan.metrics.score import check_size
    from gan.ranks.distributed import Ranks

    ranks = ranks or Ranks()
    chosen, network = check_scores(dataset, metrics, features, samples, device())
    classifier = None
    if network is None:
        classifier = train_on_first(dataset, level, seed, ranks, say, features, kept)
        network = classifier_features(classifier, features)
    indices = np.random.RandomState(seed).permutation(len(dataset))[:MOST_REALS]
    empty: Any = None
    reference = Reference(dataset, level, seed, ranks, chosen, network, classifier, indices, empty)
    check_size(chosen, dataset.manifest.size(level))
    reals = reference.observe(Source(len(indices), dataset.shape(level), READ, reference._read))
    labels = dataset.labels[indices] if dataset.manifest.classes and dataset.labels is not None else None
    return dataclasses.replace(reference, reals=dataclasses.replace(reals, labels=labels))


def train_on_first(
    dataset: "ImageDataset",
    level: int,
    seed: int,
    ranks: "Ranks",
    say: Callable[[str], object],
    features: str = CLASSIFIER,
    kept: Path | None = None,
) -> "Classifier | ChannelClassifier":
    """A classifier of the dataset's classes, trained on rank 0 and sent to the others. features: its row of LEARNED.
    kept: a file from which it is read, or to which it is written."""
    from gan.metrics.classifier import Classifier, build_network, train_classifier
    from gan.metrics.learned import LEARNED
    from gan.ranks.distributed import from_first
    from launch.kept_classifier import keep

    learned = LEARNED[features]
    labels, _ = class_labels(dataset)
    classes = learned.classes(dataset.manifest.classes or (), dataset.manifest.channels)

    def train() -> Classifier:
        say(f"training a classifier on {dataset.path} ...")
        images, indices = read_reals(dataset, MOST_REALS, level, seed)
        shown, named = learned.split(images, labels[indices], classes)
        return train_classifier(shown, named, classes, seed=seed, device=device())

    network = build_network(learned.channels(dataset.manifest.channels), classes).to(device())
    if ranks.first:
        trained = keep(kept, network, train) if kept else train()
    if ranks.world == 1:
        return learned.wrap(trained)
    sent = None
    if ranks.first:
        weights = {name: tensor.cpu() for name, tensor in trained.network.state_dict().items()}
        sent = (weights, trained.accuracy, trained.held_out)
    weights, accuracy, held_out = from_first(sent)
    network.load_state_dict(weights)
    network.eval().requires_grad_(False)
    return learned.wrap(Classifier(network, classes, accuracy, held_out))


def score_table(rows: "Mapping[str, Score]") -> str:
    """Scores by name in two tables, so that lines stay short: of figures that depend on features, and of others. The
    line under a score has half the width of its 95 % intervals. Figures that no row has are left out.

    Raises UserError for scores that are not comparable.
    """
    from gan.metrics.provenance import check_comparable

    check_comparable({name: row.provenance for name, row in rows.items() if row.provenance})
    tables = [_table(rows, formats) for formats in (OF_FEATURES, OTHERS)]
    return "\n\n".join(filter(None, tables))


def _table(rows: "Mapping[str, Score]", formats: Mapping[str, tuple[str | None, str]]) -> str:
    names = {name for row in rows.values() for name in row.figures}
    starts = {_start(name, formats): name for name in names}
    columns = [(starts[start], *formats[start]) for start in formats if start in starts]
    if not columns:
        return ""
    lines = [["", "samples", *(heading or name for name, heading, _ in columns)]]
    for label, row in rows.items():
        shown = [(row.figures.get(name), form) for name, _, form in columns]
        if any(estimate for estimate, _ in shown):
            lines.append([label, str(row.samples), *(_value(*cell) for cell in shown)])
            lines.append(["", "±", *(_reach(*cell) for cell in shown)])
    return "\n".join(aligned(lines))


def _start(name: str, formats: Mapping[str, Any]) -> str:
    """The longest key of `formats` that is the name, or its beginning up to a hyphen; "" if there is none."""
    found = [start for start in formats if name == start or (start.endswith("-") and name.startswith(start))]
    return max(found, key=len, default="")


def _value(estimate: "Estimate | None", form: str) -> str:
    return format(estimate.value, form) if estimate else "-"


def _reach(estimate: "Estimate | None", form: str) -> str:
    return format((estimate.high - estimate.low) / 2, form) if estimate and estimate.low < estimate.high else ""


def score_as_json(score: "Score", dataset: str) -> dict[str, Any]:
    """A score as plain values: {"figures": {name: {"value", "low", "high"}}, ...}, with its provenance and the path of
    the dataset."""
    from gan.metrics.provenance import figures_to_json

    about = score.provenance.to_json() if score.provenance else {"samples": score.samples}
    return {"figures": figures_to_json(score.figures), "dataset": dataset, **about}
