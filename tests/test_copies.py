"""The test for copies against distances of scipy, and on planted copies, blurred copies and honest samples."""

import numpy as np
import pytest
import torch

from gan.metrics.copies import NEIGHBORS, QUERIES, copies, nearest, relative

RANDOM = np.random.RandomState(0)


@pytest.mark.parametrize("held_out", [False, True])
def test_nearest_distances_are_those_of_all_pairs(held_out):
    """More points than one block has, so that blocks are put together."""
    distance = pytest.importorskip("scipy.spatial.distance")
    points = RANDOM.randn(2300, 5)
    queries = points[:1100] if held_out else RANDOM.randn(1100, 5)
    all_pairs = distance.cdist(queries, points)
    if held_out:
        np.fill_diagonal(all_pairs, np.inf)
    found = nearest(torch.from_numpy(queries), torch.from_numpy(points), 7, held_out)
    np.testing.assert_allclose(found, np.sort(all_pairs, axis=1)[:, :7], rtol=1e-6, atol=1e-9)


def test_figures_by_hand():
    """Reals on a line and fakes at known places: the 50 nearest of each can be counted."""
    places = np.cumsum(RANDOM.rand(400) + 0.5)
    wide = np.argsort(np.diff(places))[-30:]
    fake_places = np.concatenate([places[wide] + 0.5 * np.diff(places)[wide], places[200:210] + 0.001])
    found = copies(torch.from_numpy(places).view(-1, 1), torch.from_numpy(fake_places).view(-1, 1))
    by_hand = [np.sort(np.abs(places - place))[:NEIGHBORS] for place in fake_places]
    reals_by_hand = [np.sort(np.abs(np.delete(places, i) - places[i]))[:NEIGHBORS] for i in range(400)]
    ratios = np.array([d[0] / d.mean() for d in reals_by_hand])
    limit = np.sort(ratios)[int(0.01 * 399)]
    assert found["copies-by-chance"].value == np.mean(ratios <= limit) == 0.01
    assert found["copies"].value == np.mean([d[0] / d.mean() <= limit for d in by_hand]) == 0.25
    nearest_of_each = [np.mean([d[0] for d in part]) for part in (by_hand, reals_by_hand)]
    assert found["nearest"].value == pytest.approx(nearest_of_each[0] / nearest_of_each[1], rel=1e-4)


def photos(count: int, seed: int) -> torch.Tensor:
    """Images of 12x12 with smooth and with fine detail, float [count, 144]."""
    random = np.random.RandomState(seed)
    coarse = torch.from_numpy(random.randn(count, 1, 3, 3))
    smooth = torch.nn.functional.interpolate(coarse, (12, 12), mode="bilinear")
    return (smooth + 0.5 * torch.from_numpy(random.randn(count, 1, 12, 12))).flatten(1)


def test_planted_copies_stand_out_and_honest_or_blurred_samples_do_not():
    reals = photos(1000, 0)
    honest = copies(reals, photos(600, 1))
    assert honest["copies"].low <= honest["copies-by-chance"].value == 0.01
    assert honest["nearest"].low < 1 < honest["nearest"].high
    noisy = reals[:300] + 0.05 * photos(300, 2)
    planted = copies(reals, torch.cat([noisy, photos(300, 3)]))
    assert planted["copies"].low > 0.4 and planted["copies"].value == pytest.approx(0.5, abs=0.02)
    smooth = photos(600, 4).view(-1, 1, 12, 12)
    blurred = copies(reals, torch.nn.functional.avg_pool2d(smooth, 5, 1, 2, count_include_pad=False).flatten(1))
    assert blurred["nearest"].high < 1  # nearer than held-out images are ...
    assert blurred["copies"].high < 10 * blurred["copies-by-chance"].value  # ... and no copies for it


def test_a_set_of_equal_images_has_copies_only_and_no_ratio():
    same = torch.ones(80, 3)
    found = copies(same, same[:20])
    assert found["copies"].value == found["copies-by-chance"].value == 1 and "nearest" not in found
    assert relative(np.zeros((2, 3))).tolist() == [0, 0]


def test_all_reals_are_looked_through_though_few_samples_are():
    reals = torch.from_numpy(RANDOM.randn(QUERIES + 100, 4))
    found = copies(reals, torch.cat([reals[-50:], torch.from_numpy(RANDOM.randn(QUERIES, 4))]))
    assert 50 / QUERIES <= found["copies"].value < 50 / QUERIES + 0.03
