"""gan.metrics against closed forms, and the classifier on real digits."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from gan.errors import UserError
from gan.metrics.classifier import Classifier, shrink, train_classifier
from gan.metrics.frechet import frechet_distance, frechet_estimate, gaussian_fit
from gan.metrics.intervals import normal, share
from gan.metrics.modes import mode_kl, mode_kl_estimate, mode_kl_floor
from gan.metrics.sample import Sample, Seen
from gan.metrics.score import METRICS, Score, box_blur, check_enough, check_size, few_repeated, find_metrics, score

RANDOM = np.random.RandomState(0)


def covariance(rank: int, size: int = 6) -> np.ndarray:
    root = RANDOM.randn(size, rank)
    return root @ root.T


def test_frechet_distance_of_equal_covariances_is_that_of_the_means():
    mu1, mu2, sigma = RANDOM.randn(6), RANDOM.randn(6), covariance(6)
    assert frechet_distance(mu1, sigma, mu2, sigma) == pytest.approx(np.square(mu1 - mu2).sum(), rel=1e-12)


def test_frechet_distance_of_commuting_covariances():
    """S1 = Q diag(a) Q', S2 = Q diag(b) Q': the distance is sum (sqrt a - sqrt b)^2."""
    q = np.linalg.qr(RANDOM.randn(6, 6))[0]
    a, b = RANDOM.rand(6), RANDOM.rand(6)
    distance = frechet_distance(np.zeros(6), (q * a) @ q.T, np.zeros(6), (q * b) @ q.T)
    assert distance == pytest.approx(np.square(np.sqrt(a) - np.sqrt(b)).sum(), rel=1e-12)


def test_golden_wasserstein_distance_of_gaussians():
    """N(0, 1) and N(1, 1.5^2): W2^2 is the squared differences of means and of deviations."""
    distance = frechet_distance(np.array([0.0]), np.array([[1.0]]), np.array([1.0]), np.array([[1.5**2]]))
    assert distance == pytest.approx(1.25, rel=1e-13)


def test_frechet_distance_of_rank_deficient_covariances():
    """Ranks 1 along u and v: the trace of the root of the product is |u.v|. Orthogonal supports do not overlap."""
    u, v, zero = RANDOM.randn(50), RANDOM.randn(50), np.zeros(50)
    distance = frechet_distance(zero, np.outer(u, u), zero, np.outer(v, v))
    assert distance == pytest.approx(u @ u + v @ v - 2 * abs(u @ v), rel=1e-10)
    e1, e2 = np.diag([1.0, 0, 0]), np.diag([0, 2.0, 0])
    assert frechet_distance(np.zeros(3), e1, np.zeros(3), e2) == pytest.approx(3, rel=1e-12)
    low = covariance(2, 50)
    assert frechet_distance(u, low, u, low) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(u, low, u, np.zeros((50, 50))) == pytest.approx(np.trace(low), rel=1e-12)


def test_frechet_distance_in_general_position():
    """tr (S1 S2)^1/2 from the eigenvalues of the nonsymmetric product: the other way to write it."""
    s1, s2, zero = covariance(6), covariance(6), np.zeros(6)
    root = np.sqrt(np.linalg.eigvals(s1 @ s2).real).sum()
    assert frechet_distance(zero, s1, zero, s2) == pytest.approx(np.trace(s1 + s2) - 2 * root, rel=1e-8)
    assert frechet_distance(zero, s1, zero, s2) == pytest.approx(frechet_distance(zero, s2, zero, s1), rel=1e-10)


def test_frechet_distance_refuses_non_finite_moments():
    with pytest.raises(ValueError, match="finite"):
        frechet_distance(np.array([np.nan]), np.eye(1), np.zeros(1), np.eye(1))


def test_gaussian_fit_is_unbiased_and_needs_two_samples():
    mean, sigma = gaussian_fit(np.array([[0.0, 1], [2, 5]], np.float32))
    assert mean.tolist() == [1, 3]
    assert sigma.tolist() == [[2, 4], [4, 8]]
    assert gaussian_fit(np.ones((3, 1)))[1].tolist() == [[0]]
    with pytest.raises(UserError, match="at least 2"):
        gaussian_fit(np.ones((1, 3)))


def gaussians(n: int, m: int, shift: float, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """n samples of N(0, 1) and m of N(shift, 1.5^2), in each of three dimensions: at distance 3 (shift^2 + .25)."""
    options = {"generator": generator, "dtype": torch.float64}
    return torch.randn(n, 3, **options), torch.randn(m, 3, **options) * 1.5 + shift


def test_moments_of_many_blocks_are_those_of_numpy():
    x = RANDOM.randn(2500, 5) @ RANDOM.randn(5, 5) + 100
    mean, sigma = gaussian_fit(x)
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-13)
    np.testing.assert_allclose(sigma, np.cov(x, rowvar=False), rtol=1e-10)


def test_the_error_of_a_frechet_distance_is_that_of_leaving_out_a_sample_at_a_time():
    x, y = gaussians(60, 90, 0.7, torch.Generator().manual_seed(1))
    x = x @ torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, 1.0], [1.0, 3.0, 4.0]], dtype=torch.float64)  # of rank 2
    y = y @ torch.tensor([[3.0, 0.0, 0.0], [1.0, 1.0, 0.0], [-2.0, 2.0, 0.5]], dtype=torch.float64)
    distance = frechet_distance(*gaussian_fit(x), *gaussian_fit(y))
    squared = 0.0
    for mine, pair in ((x, lambda part: (part, y)), (y, lambda part: (x, part))):
        parts = (torch.cat([mine[:i], mine[i + 1 :]]) for i in range(len(mine)))
        without = [frechet_distance(*(moment for one in pair(part) for moment in gaussian_fit(one))) for part in parts]
        squared += np.var(without) * (len(mine) - 1)
    estimate = frechet_estimate(x, y)
    assert estimate.value == pytest.approx(distance, rel=1e-10)
    assert (estimate.high - estimate.value) / 1.96 == pytest.approx(math.sqrt(squared), rel=0.05)
    assert estimate.high + estimate.low == pytest.approx(2 * distance)


def test_the_interval_of_a_frechet_distance_covers_the_known_distance():
    generator = torch.Generator().manual_seed(0)
    estimates = [frechet_estimate(*gaussians(800, 1200, 1.0, generator)) for _ in range(300)]
    covered = np.mean([estimate.low <= 3.75 <= estimate.high for estimate in estimates])
    assert 0.91 < covered < 0.985
    spread = np.std([estimate.value for estimate in estimates])
    assert np.mean([e.high - e.value for e in estimates]) / 1.96 == pytest.approx(spread, rel=0.15)


def test_intervals_of_shares_and_of_means():
    """Wilson 1927: the rates p whose own standard deviation puts the share seen at their border of 95 %."""
    seen = share(30, 120)
    for p in (seen.low, seen.high):
        assert abs(0.25 - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / 120), rel=1e-6)
    assert share(0, 50).low == 0 < share(0, 50).high < 0.1
    assert share(50, 50).high == 1 > share(50, 50).low > 0.9
    assert (normal(1.0, 1.0, least=0.0).low, normal(1.0, 1.0).high) == (0.0, pytest.approx(2.959964))


def test_mode_kl_closed_forms():
    assert mode_kl([7, 7, 7]) == 0
    assert mode_kl([5, 0, 0, 0]) == pytest.approx(math.log(4))
    assert mode_kl([3, 1]) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))


def test_mode_kl_floor_is_what_an_even_source_scores():
    counts = RANDOM.multinomial(1000, [0.1] * 10, size=4000)
    assert np.mean([mode_kl(c) for c in counts]) == pytest.approx(mode_kl_floor(1000, 10), rel=0.05)


def test_box_blur_is_the_mean_of_nine():
    images = np.zeros((1, 5, 5, 1), np.uint8)
    images[0, 2, 2] = 90
    assert box_blur(images)[0, :, :, 0].tolist() == [[0] * 5, *[[0, 10, 10, 10, 0]] * 3, [0] * 5]
    assert (box_blur(np.full((2, 4, 3, 3), 255, np.uint8)) == 255).all()
    wide = np.zeros((1, 64, 64, 2), np.uint8)
    wide[0, 30, 31, 1] = 245
    assert box_blur(wide)[0, 27:34, 28:35, 1].tolist() == [[5] * 7] * 7 and box_blur(wide).sum() == 245


def test_shrink_averages_large_images_only():
    small = RANDOM.randint(0, 256, (2, 32, 8, 3), dtype=np.uint8)
    assert shrink(small) is small
    large = np.kron(RANDOM.randint(0, 256, (2, 32, 32, 3)), np.ones((1, 2, 4, 1))).astype(np.uint8)
    assert np.array_equal(shrink(large), large[:, ::2, ::4])


def digits() -> tuple[np.ndarray, np.ndarray]:
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    bunch = load_digits()
    return (bunch.images[..., None] / 16 * 255).round().astype(np.uint8), bunch.target


QUICK = {name: metric for name, metric in METRICS.items() if name != "js"}  # which trains a network


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    images, labels = digits()
    return train_classifier(images, labels, 10, steps=250)


@pytest.fixture(scope="module")
def reals(classifier) -> Sample:
    """All digits, in random order."""
    images, labels = digits()
    order = np.random.RandomState(0).permutation(len(images))
    return see(classifier, images[order], labels[order])


def see(classifier: Classifier, images: np.ndarray, labels: np.ndarray | None = None) -> Sample:
    return Sample(images, *classifier(images), labels)


def scored(reals: Sample, fakes: Sample) -> Score:
    return score(reals, fakes, QUICK, "classifier")


def test_classifier_reads_digits(classifier, reals):
    assert classifier.accuracy > 0.97
    assert classifier.held_out == 359
    assert reals.features.shape == (1797, 64)
    assert reals.features.min() >= 0
    np.testing.assert_allclose(reals.probabilities.sum(1), 1, rtol=1e-5)


def test_the_classifier_sees_an_image_alone_as_it_does_among_others(classifier, reals):
    for whole, part in zip((reals.features, reals.probabilities), classifier(reals.images[7:8]), strict=True):
        np.testing.assert_allclose(part[0], whole[7], rtol=1e-4, atol=1e-5)


def test_figures_of_classes_by_hand():
    probabilities = np.array([[0.7, 0.3], [0.4, 0.6], [0.9, 0.1], [0.8, 0.2]])
    sample = Sample(np.zeros((4, 8, 8, 1), np.uint8), np.zeros((4, 3)), probabilities, np.array([0, 1, 1, 1]))
    row = score(sample, sample, find_metrics("classes", classifier=True), "classifier")
    assert row.samples == 4 and row["as-asked"] == 0.5
    assert row["confidence"] == pytest.approx((0.7 + 0.6 + 0.9 + 0.8) / 4)
    assert row["mode-kl"] == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert row["mode-kl-by-chance"] == 1 / 8


def test_the_interval_of_mode_kl_is_that_of_many_draws():
    counts = RANDOM.multinomial(2000, [0.3, 0.5, 0.15, 0.05], size=2000)
    wanted = np.std([mode_kl(c) for c in counts])
    found = np.mean([mode_kl_estimate(c).high - mode_kl(c) for c in counts[:200]]) / 1.96
    assert found == pytest.approx(wanted, rel=0.05)


def test_accuracy_is_of_images_that_the_classifier_never_saw():
    """Labels at random can be learned by heart, and not foretold."""
    images, labels = RANDOM.randint(0, 256, (300, 8, 8, 1), dtype=np.uint8), RANDOM.randint(0, 2, 300)
    classifier = train_classifier(images, labels, 2, steps=200)
    assert (classifier(images)[1].argmax(1) == labels).mean() > 0.8 > classifier.accuracy


def test_scores_rank_reals_before_blur_before_noise(classifier, reals):
    half = score(reals.pick(slice(898, None)), reals.pick(slice(898)), QUICK, "classifier")
    blurred = scored(reals, see(classifier, box_blur(reals.images)))
    noise = scored(reals, see(classifier, RANDOM.randint(0, 256, (400, 8, 8, 1), dtype=np.uint8)))
    assert half["fd-classifier"] < blurred["fd-classifier"] / 3 < noise["fd-classifier"]
    assert abs(half["kid-classifier"]) < blurred["kid-classifier"] / 3 < noise["kid-classifier"]
    assert noise["precision-classifier"] < 0.5 < 0.8 < half["precision-classifier"]
    assert noise.samples == 400 and "as-asked" not in noise.figures
    assert scored(reals, reals)["as-asked"] > 0.97
    assert scored(reals, reals)["mode-kl"] < 0.001 < noise["mode-kl"]


def test_a_network_that_makes_one_class_has_a_high_mode_kl(reals):
    threes = scored(reals, reals.pick(np.flatnonzero(reals.labels == 3)))
    assert threes["as-asked"] > 0.97
    assert threes["mode-kl"] > 0.9 * math.log(10)
    half = score(reals.pick(slice(898, None)), reals.pick(slice(898)), QUICK, "classifier")
    assert threes["fd-classifier"] > 20 * half["fd-classifier"]
    assert threes["coverage-classifier"] < 0.2 < 0.9 < half["coverage-classifier"]


def test_reals_against_themselves_are_at_distance_zero(reals):
    assert scored(reals, reals)["fd-classifier"] == pytest.approx(0, abs=1e-6)


def test_copies_are_few_and_repeated():
    labels = np.array([0, 1, 1, 0, 1, 0])
    assert few_repeated(labels, 2, 10).tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert few_repeated(None, 3, 7).tolist() == [0, 1, 2, 0, 1, 2, 0]
    many = RANDOM.randint(0, 20, 1000)
    assert set(many[few_repeated(many, 10, 100)]) == set(range(20))  # fewer than ten of each are of all classes too


def test_coherence_and_spread_are_given_within_classes_too():
    """Two classes, each one image and its negative: nothing in common, unless each class is looked at alone."""
    images = RANDOM.randint(0, 256, (1, 8, 8, 1), dtype=np.uint8)
    both = np.concatenate([images, 255 - images]).repeat(10, axis=0)
    row = score(*[Sample(both, np.zeros((20, 1)), labels=np.arange(20) // 10)] * 2, {"x": METRICS["diversity"]}, "x")
    assert row["coherence"] < 0 and row["spread"] > 0.3
    assert (row["coherence-in-classes"], row["spread-in-classes"]) == (pytest.approx(1), pytest.approx(0, abs=1e-6))


def test_planted_sets_are_exposed_by_coherence_spread_or_recall(classifier, reals):
    """The limits of coherence and spread are those of the warning while training; half of the reals is not exposed."""
    half = score(reals.pick(slice(898, None)), reals.pick(slice(898)), QUICK, "classifier")
    whole = scored(reals, reals)
    count = 898
    noise = see(classifier, RANDOM.randint(0, 256, (count, 8, 8, 1), dtype=np.uint8), reals.labels[:count])
    planted = {
        "one image": reals.pick(np.zeros(count, np.int64)),
        "ten per class": reals.pick(few_repeated(reals.labels, 10, count)),
        "noise": noise,
        "blurred": see(classifier, box_blur(reals.images[:count]), reals.labels[:count]),
    }

    def exposed_by(row: Score) -> list[str]:
        alarms = {
            "coherence": row["coherence-in-classes"] > 3 * whole["coherence-in-classes"],
            "spread": row["spread-in-classes"] < 0.75 * whole["spread-in-classes"],
            "recall": row.figures["recall-classifier"].high < 0.75 * half["recall-classifier"],
        }
        return [name for name, alarm in alarms.items() if alarm]

    assert exposed_by(half) == []
    assert {name: exposed_by(scored(reals, sample)) for name, sample in planted.items()} == {
        "one image": ["spread", "recall"],
        "ten per class": ["recall"],
        "noise": ["recall"],
        "blurred": ["spread", "recall"],
    }


@pytest.mark.parametrize(
    ("metric", "needed"), [("fd", 65), ("kid", 3), ("pr", 4), ("dc", 6)], ids=["fd", "kid", "pr", "dc"]
)
def test_too_few_samples_are_refused_with_the_number_needed(metric, needed):
    random = np.random.RandomState(0)
    metrics = find_metrics(metric, classifier=False)
    check_enough(metrics, 64, needed, "samples", "give more")
    with pytest.raises(UserError, match=f"{needed - 1} samples are too few for {metric}, which needs {needed}"):
        check_enough(metrics, 64, needed - 1, "samples", "give more")
    enough, few = (Sample(np.zeros((n, 1, 1, 1), np.uint8), random.randn(n, 64)) for n in (needed, needed - 1))
    assert all(math.isfinite(e.high) for e in score(enough, enough, metrics, "x").figures.values())
    assert score(enough, enough, metrics, "x").figures and not score(enough, few, metrics, "x").figures


def test_reals_images_and_sides_that_are_too_few_are_refused_with_the_number_needed():
    metrics = find_metrics("swd,ms-ssim,copies", classifier=False)
    check_enough(metrics, 64, 51, "images", "give more", reals=True)
    with pytest.raises(UserError, match="50 images are too few for copies, which needs 51"):
        check_enough(metrics, 64, 50, "images", "give more", reals=True)
    check_enough(metrics, 64, 4, "samples", "give more")
    with pytest.raises(UserError, match="3 samples are too few for ms-ssim, which needs 4"):
        check_enough(metrics, 64, 3, "samples", "give more")
    check_size(metrics, (7, 9))
    with pytest.raises(UserError, match="images of 6x9 are too small for swd, which needs 7 pixels a side"):
        check_size(metrics, (6, 9))


@pytest.mark.parametrize(
    "seen, measured", [(0, set()), (1, set()), (2, {"swd"}), (3, {"swd"}), (4, {"swd", "ms-ssim"})]
)
def test_a_metric_needs_images_of_which_its_view_was_made(seen, measured):
    images = RANDOM.randint(0, 256, (40, 16, 16, 1), dtype=np.uint8)
    metrics = find_metrics("swd,ms-ssim", classifier=False)
    data = {metric.view.name: metric.view.look(images, np.arange(40)) for metric in metrics.values()}

    def sample(count: int) -> Sample:
        rows = np.where(np.arange(40) < count, np.arange(40), -1)
        views = {name: Seen(part, rows, (16, 16)) for name, part in data.items()}
        return Sample(images, np.zeros((40, 1)), views=views)

    found = score(sample(40), sample(seen), metrics, "x")
    assert set(found.by_metric) == measured
    assert all(math.isfinite(figure.high) for figure in found.figures.values())
    if seen >= 2:
        assert set(score(sample(1), sample(seen), metrics, "x").by_metric) == measured - {"swd"}


def test_rows_in_views_come_first_and_keep_their_order():
    views = {
        name: Seen(np.empty(0), np.array(rows), (8, 8)) for name, rows in (("a", [-1, 0, 1, 2]), ("b", [0, 1, -1, 2]))
    }
    sample = Sample(np.zeros((4, 8, 8, 1)), np.zeros((4, 1)), views=views)
    assert sample.rows_in_views().tolist() == [1, 3, 0, 2]
    assert replace(sample, views={}).rows_in_views().tolist() == [0, 1, 2, 3]


def test_metrics_are_found_by_name():
    assert list(find_metrics("kid, fd,kid", classifier=False)) == ["kid", "fd"]
    usual = ["fd", "kid", "pr", "dc", "diversity"]
    assert list(find_metrics("", classifier=False)) == usual
    assert list(find_metrics("", classifier=True)) == [*usual, "classes"]
    assert find_metrics("all", classifier=True) == METRICS
    without = {name for name in METRICS if name not in find_metrics("all", classifier=False)}
    assert without == {"classes", "modes", "is"}
    assert "is" in find_metrics("all", classifier=False, probabilities=True)
    with pytest.raises(UserError, match=r"give run\.features=classifier or"):
        find_metrics("fd,is", classifier=False)
    with pytest.raises(UserError, match="needs a classifier"):
        find_metrics("fd,classes", classifier=False)
    with pytest.raises(UserError, match="did you mean fd"):
        find_metrics("fid", classifier=True)


def test_classifier_is_deterministic_and_leaves_the_random_state_alone():
    images, labels = RANDOM.randint(0, 256, (40, 9, 12, 4), dtype=np.uint8), np.arange(40) % 3
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = train_classifier(images, labels, 3, steps=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    second = train_classifier(images, labels, 3, steps=3)
    assert torch.get_num_threads() == threads + 1
    torch.set_num_threads(threads)
    assert np.array_equal(first(images)[0], second(images)[0])
    assert not np.array_equal(first(images)[0], train_classifier(images, labels, 3, steps=3, seed=1)(images)[0])


@pytest.mark.parametrize(
    ("shape", "classes", "message"),
    [((20, 8, 8, 1), 1, "two classes"), ((9, 8, 8, 1), 2, "10 labeled"), ((20, 4, 8, 1), 2, "8 pixels")],
)
def test_too_few_classes_or_images_for_a_classifier_are_refused(shape, classes, message):
    with pytest.raises(UserError, match=message):
        train_classifier(np.zeros(shape, np.uint8), np.zeros(shape[0], np.int64), classes)


def test_the_bound_of_the_jensen_shannon_divergence_is_near_that_of_two_gaussians():
    a, b = (Sample(np.zeros((4000, 1, 1, 1)), RANDOM.normal(shift, 1, (4000, 4))) for shift in (0.0, 1.0))
    (figure,) = METRICS["js"].measure(a, b).values()
    x = np.linspace(-10, 11, 20_000)  # along the line through both means, which are 2 apart
    p, q = (np.exp(-0.5 * (x - mean) ** 2) / math.sqrt(2 * math.pi) for mean in (0.0, 2.0))
    exact = 0.5 * (p * np.log(2 * p / (p + q)) + q * np.log(2 * q / (p + q))).sum() * (x[1] - x[0])
    assert figure.low - 0.01 < exact and 0.9 * exact < figure.value < exact + 0.03
