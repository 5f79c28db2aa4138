"""The per-channel protocol of stacked digits against single digits, and its junk baselines."""

from functools import partial
from itertools import product

import numpy as np
import pytest

from gan.errors import UserError
from gan.metrics.classifier import train_classifier
from gan.metrics.learned import LEARNED, ChannelClassifier, junk, split_channels, stacked_classes
from gan.metrics.modes import mode_kl, mode_kl_floor

RANDOM = np.random.RandomState(0)
CHANNEL = LEARNED["channels"]


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    bunch = pytest.importorskip("sklearn.datasets").load_digits()
    return (bunch.images / 16 * 255).round().astype(np.uint8), bunch.target


@pytest.fixture(scope="module")
def classifier(digits) -> ChannelClassifier:
    return CHANNEL.wrap(train_classifier(digits[0][..., None], digits[1], 10, steps=250))


def stacked(digits, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [count, 8, 8, 3] of three digits each, and the digits [count, 3]."""
    chosen = np.random.RandomState(seed).randint(0, len(digits[0]), (count, 3))
    return np.moveaxis(digits[0][chosen], 1, 3), digits[1][chosen]


def test_the_modes_of_an_image_are_what_single_channels_are_read_as(classifier, digits):
    images, named = stacked(digits, 50)
    features, probabilities = classifier(images)
    assert features.shape == (50, CHANNEL.width) and probabilities.shape == (50, classifier.classes) == (50, 1000)
    each = [classifier.channel(images[..., channel : channel + 1])[1] for channel in range(3)]
    for a, b, c in ((0, 0, 0), (3, 1, 4), (9, 9, 8)):
        wanted = each[0][:, a] * each[1][:, b] * each[2][:, c]
        np.testing.assert_allclose(probabilities[:, 100 * a + 10 * b + c], wanted, rtol=1e-5)
    read = np.stack([part.argmax(1) for part in each], axis=1) @ [100, 10, 1]
    assert (probabilities.argmax(1) == read).all()
    assert (read == named @ [100, 10, 1]).mean() > 0.9


def test_channels_are_split_with_their_own_labels(digits):
    images, named = stacked(digits, 20)
    singles, labels = split_channels(images, named @ np.array([100, 10, 1]), 10)
    assert singles.shape == (60, 8, 8, 1) and labels.tolist() == named.reshape(-1).tolist()
    assert (singles[7, :, :, 0] == images[2, :, :, 1]).all()


def test_only_stacked_classes_are_taken():
    assert stacked_classes(["".join(t) for t in product("0123456789", repeat=3)], 3) == 10
    assert stacked_classes(["".join(t) for t in product(["ab", "cd"], repeat=3)], 3) == 2
    for names, channels in ((["a", "b", "c"], 3), ([], 3), (["x"], 3), (list("abcdefgh"), 3)):
        with pytest.raises(UserError, match="prepare stacked-digits"):
            stacked_classes(names, channels)
    with pytest.raises(UserError, match="stacked images"):
        stacked_classes(["".join(t) for t in product("01", repeat=3)], 1)


def test_junk_is_told_by_kl_or_confident_modes_and_not_by_a_raw_count(classifier, digits):
    """The order of magnitude that each baseline is known to have: noise and one digit three times have a high KL, and
    averages of two digits see most modes, few of them with confidence."""
    images, _ = stacked(digits, 4000)
    sets = junk(lambda numbers: images[numbers], len(images), seed=0)

    def counts(made: np.ndarray, least: float = 0.0) -> np.ndarray:
        found = classifier(made)[1]
        return np.bincount(found.argmax(1)[found.max(1) >= least], minlength=1000)

    reals = counts(images)
    assert mode_kl(reals) == pytest.approx(mode_kl_floor(4000, 1000), rel=0.15)
    noise, average, same = (counts(read(slice(500, 4500))) for read in sets.values())
    assert mode_kl(noise) > 5 * mode_kl(reals)
    assert (average > 0).sum() > 0.85 * (reals > 0).sum() and mode_kl(average) > 2 * mode_kl(reals)
    assert (same > 0).sum() < 30 and mode_kl(same) > 4
    sure = counts(sets["two reals averaged in each channel"](slice(0, 4000)), least=0.9)
    assert sure.sum() < 0.6 * counts(images, least=0.9).sum()


def test_junk_does_not_depend_on_how_it_is_read(digits):
    images, _ = stacked(digits, 30)
    read = partial(lambda numbers, of: of[numbers], of=images)
    for name, rows in junk(read, 30, seed=1).items():
        whole = rows(slice(0, 20))
        assert whole.shape == (20, 8, 8, 3) and whole.dtype == np.uint8
        np.testing.assert_array_equal(rows(slice(0, 20)), whole)
        if name != "uniform noise":  # which is drawn batch by batch
            np.testing.assert_array_equal(rows(slice(5, 20)), whole[5:])
    same = junk(read, 30, seed=1)["one channel of a real in all three"](slice(0, 9))
    assert (same[..., 0] == same[..., 2]).all() and any((same[0, :, :, 0] == x[:, :, 0]).all() for x in images)


def test_neighboring_images_of_junk_share_no_draws():
    """Out of 2^40 reals none is read twice by chance."""
    seen = []

    def read(numbers: np.ndarray) -> np.ndarray:
        seen.extend(numbers.tolist())
        return np.zeros((len(numbers), 8, 8, 3), np.uint8)

    junk(read, 2**40, seed=0)["two reals averaged in each channel"](slice(5, 9))
    assert len(set(seen)) == len(seen) == 4 * 6
