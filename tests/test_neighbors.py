"""gan.metrics.neighbors against definitions that are written out, and cases that can be counted by hand."""

import numpy as np
import pytest
import torch

from gan.metrics.blocks import squared_distances
from gan.metrics.neighbors import density_coverage, precision_recall, radii


def naive_radii(x: np.ndarray, k: int) -> list[float]:
    return [sorted(np.linalg.norm(a - b) for j, b in enumerate(x) if j != i)[k - 1] for i, a in enumerate(x)]


def naive(real: np.ndarray, fake: np.ndarray, k: int) -> dict[str, float]:
    """The four figures, point by point."""
    real_radii, fake_radii = naive_radii(real, k), naive_radii(fake, k)
    distances = np.array([[np.linalg.norm(f - r) for r in real] for f in fake])
    inside = distances <= np.array(real_radii)
    around = distances <= np.array(fake_radii)[:, None]
    return {
        "precision": inside.any(1).mean(),
        "recall": around.any(0).mean(),
        "density": inside.sum(1).mean() / k,
        "coverage": inside.any(0).mean(),
    }


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("rows", [1024, 16])
def test_figures_are_those_of_the_definitions(k, rows, monkeypatch):
    monkeypatch.setattr("gan.metrics.blocks.ROWS", rows)
    random = np.random.RandomState(k)
    real, fake = random.randn(60, 2), random.randn(45, 2) * 0.6 + 0.4
    sets = torch.from_numpy(real), torch.from_numpy(fake)
    found = precision_recall(*sets, k) | density_coverage(*sets, k)
    wanted = naive(real, fake, k)
    assert {name: estimate.value for name, estimate in found.items()} == pytest.approx(wanted)
    assert 0.1 < wanted["recall"] < 0.9 and 0.1 < wanted["coverage"] < 0.9
    np.testing.assert_allclose(radii(sets[0], k).sqrt(), naive_radii(real, k), rtol=1e-10)


def test_samples_of_the_same_source_reach_what_theory_says():
    """Coverage: a ball of k of N reals misses N fakes with probability 2^-k; density: 1 (Naeem et al. 2020)."""
    generator = torch.Generator().manual_seed(0)
    real, fake = torch.randn(2, 2000, 8, generator=generator, dtype=torch.float64)
    scores = density_coverage(real, fake, k=3)
    assert scores["coverage"].low < 1 - 2**-3 < scores["coverage"].high
    assert scores["density"].value == pytest.approx(1, abs=0.05)
    assert scores["density"].low < scores["density"].value < scores["density"].high


def test_copies_of_few_reals_are_precise_and_recall_only_those():
    """Each fake is one of five reals; the fakes' balls have radius 0 and contain these reals alone."""
    real = torch.randn(200, 30, generator=torch.Generator().manual_seed(0)) + 50
    fake = real[torch.arange(200) % 5]
    scores = precision_recall(real, fake)
    assert scores["precision"].value == 1 and scores["recall"].value == 5 / 200
    assert density_coverage(real, fake)["coverage"].value < 0.5


def test_equal_rows_are_at_distance_zero_far_from_the_origin():
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)).double() + 1e4
    distances = squared_distances(x, x)
    assert (distances.diagonal() == 0).all()
    assert (distances + torch.eye(50) > 0).all()
