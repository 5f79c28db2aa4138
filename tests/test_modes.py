"""Counts of modes and the inception score against the formulas, many draws and torch-fidelity."""

import math

import numpy as np
import pytest
import torch

from gan.metrics.modes import inception_score, mode_count

RANDOM = np.random.RandomState(0)


def test_a_count_of_modes_has_the_interval_of_many_draws():
    assert vars(mode_count([50, 0, 70, 0])) == pytest.approx({"value": 2, "low": 2, "high": 2}, abs=1e-6)
    chances = np.arange(1, 1001) / np.arange(1, 1001).sum()
    draws = RANDOM.multinomial(2000, chances, size=500)
    counts = [(draw > 0).sum() for draw in draws]
    found = [mode_count(draw) for draw in draws]
    assert [estimate.value for estimate in found] == counts
    assert np.mean([e.high - e.value for e in found]) / 1.96 == pytest.approx(np.std(counts), rel=0.25)
    assert mode_count([1] * 10).high == 10


def test_inception_scores_of_known_classes():
    even = inception_score(np.eye(4)[np.arange(40) % 4])
    assert (even.value, even.low, even.high) == pytest.approx((4, 4, 4))
    assert vars(inception_score(np.full((9, 5), 0.2))) == pytest.approx({"value": 1, "low": 1, "high": 1})
    p = RANDOM.dirichlet([0.3] * 6, size=50)
    mean = p.mean(0)
    entropy = -(mean * np.log(mean)).sum() + (p * np.log(p)).sum(1).mean()
    assert inception_score(p).value == pytest.approx(math.exp(entropy), rel=1e-12)


def test_the_interval_of_an_inception_score_is_that_of_many_draws():
    found = [inception_score(RANDOM.dirichlet([0.3, 0.2, 0.8], size=400)) for _ in range(300)]
    reach = np.mean([math.log(estimate.high / estimate.value) for estimate in found]) / 1.96
    assert reach == pytest.approx(np.std([math.log(estimate.value) for estimate in found]), rel=0.15)


def test_the_inception_score_is_that_of_torch_fidelity():
    metric = pytest.importorskip("torch_fidelity.metric_isc")
    logits = RANDOM.randn(301, 10).astype(np.float32) * 3
    wanted = metric.isc_features_to_metric(torch.from_numpy(logits), splits=1)[metric.KEY_METRIC_ISC_MEAN]
    probabilities = torch.from_numpy(logits).softmax(1).numpy()
    assert inception_score(probabilities).value == pytest.approx(wanted, rel=1e-5)
