"""Planted collapses and planted copies of the training set: the alarms name them, and are silent for honest samples."""

import numpy as np
import pytest
from test_metrics import QUICK, classifier, reals  # noqa: F401 - fixtures

from gan.metrics.alarms import alarms
from gan.metrics.sample import Sample, Source, View, observe
from gan.metrics.score import METRICS, box_blur, few_repeated, score
from gan.ranks.distributed import Ranks


@pytest.fixture(scope="module")
def look(classifier, reals):  # noqa: F811
    """Indices of reals, or images, as a sample with all views."""
    from dataclasses import replace

    from gan.metrics.features import classifier_features

    network = classifier_features(classifier)
    views = [metric.view for metric in METRICS.values() if metric.view]

    def look(images: np.ndarray, labels: np.ndarray | None) -> Sample:
        source = Source(len(images), images.shape[1:], 100, lambda rows: images[rows])
        sample = observe(source, network, Ranks(), views)
        return replace(sample, probabilities=network.classify(sample.features), labels=labels)

    return look


@pytest.fixture(scope="module")
def halves(look, reals):  # noqa: F811
    """Training images, and images that were held out."""
    return [look(reals.images[part], reals.labels[part]) for part in (slice(900), slice(900, None))]


def told(training: Sample, sample: Sample, honest: Sample) -> set[str]:
    """What the alarms tell of a sample: which kind, by which figure."""
    beside = score(training, honest, QUICK, "x")
    lines = alarms(score(training, sample, QUICK, "x").figures, beside.figures)
    return {" ".join(line.split()[:2]) for line in lines}


def test_honest_samples_ring_no_alarm(halves):
    training, held_out = halves
    third = held_out.pick(np.random.RandomState(0).permutation(len(held_out))[:600])
    assert told(training, third, held_out) == set()


def test_planted_copies_are_named(halves, look):
    training, held_out = halves
    random = np.random.RandomState(0)
    slightly = np.clip(training.images[:400].astype(int) + random.randint(-3, 4, training.images[:400].shape), 0, 255)
    planted = look(
        np.concatenate([slightly.astype(np.uint8), held_out.images[:400]]),
        np.concatenate([training.labels[:400], held_out.labels[:400]]),
    )
    assert told(training, planted, held_out) == {"copies: copies-x", "copies: pixel-copies"}
    all_of_it = told(training, training, held_out)
    assert {"copies: copies-x", "copies: pixel-copies"} == all_of_it


def test_planted_collapses_are_named(halves, look):
    training, held_out = halves
    one = look(held_out.images[np.zeros(600, int)], None)
    assert {"collapse: recall-x", "collapse: spread", "collapse: ms-ssim", "collapse: modes"} <= told(
        training, one, held_out
    )
    one_class = held_out.pick(np.flatnonzero(held_out.labels == 3))
    assert {"collapse: recall-x", "collapse: modes"} <= told(training, one_class, held_out)
    few = held_out.pick(few_repeated(held_out.labels, 2, 600))
    assert {"collapse: spread-in-classes", "collapse: recall-x"} <= told(training, few, held_out)


def test_blurred_samples_are_no_copies(halves, look):
    training, held_out = halves
    blurred = look(box_blur(held_out.images), held_out.labels)
    assert not any(line.startswith("copies") for line in told(training, blurred, held_out))


def test_views_follow_their_images_and_are_made_of_no_more_than_they_need(look, reals):  # noqa: F811
    images = reals.images[:50]
    view = View("sums", most=20, look=lambda part, numbers: part.sum((1, 2, 3))[:, None] * 100 + numbers[:, None])
    source = Source(50, images.shape[1:], 7, lambda rows: images[rows])

    class Flat:
        width = 1

        def __call__(self, part):
            return part.reshape(len(part), -1)[:, :1].astype(np.float32)

    sample = observe(source, Flat(), Ranks(), [view])
    rows, data = sample.views["sums"].of_images()
    assert len(rows) == 20 and rows.tolist() == view.chosen(50).tolist()
    assert data[:, 0].tolist() == [int(images[row].astype(int).sum()) * 100 + row for row in rows]
    picks = np.array([rows[3], rows[3], rows[0]])
    again, picked = sample.pick(picks).views["sums"].of_images()
    assert again.tolist() == [0, 1, 2] and picked[:, 0].tolist() == data[[3, 3, 0], 0].tolist()
