"""Coherence and spread against the formulas, written out for single images, and what they show of planted sets."""

import math

import numpy as np
import pytest
import torch

from gan.metrics.diversity import diversity, no_images, sums


def images_of(seed: int, count: int, side: int = 8, channels: int = 3) -> torch.Tensor:
    """Random images that share a pattern, each with a tint of its own; uint8 [count, side, side, channels]."""
    random = np.random.RandomState(seed)
    pattern = random.randn(side, side, channels)
    tints = random.randn(count, 1, 1, channels)
    noise = random.randn(count, side, side, channels)
    return torch.from_numpy(np.clip(128 + 20 * (pattern + tints + noise), 0, 255).astype(np.uint8))


def by_hand(groups: list[np.ndarray]) -> tuple[float, float]:
    """(coherence, spread) from all pairs of different images: means over pairs have no bias to be freed of."""
    common = pattern = distance = 0.0
    images = pixels = 0
    for group in groups:
        x = group.astype(np.float64) / 127.5 - 1
        d = x - x.mean((1, 2), keepdims=True)
        n = len(x)
        pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
        common += n * np.mean([(d[i] * d[j]).sum() for i, j in pairs])
        pattern += n * np.mean([(one * one).sum() for one in d])
        distance += n * np.mean([((x[i] - x[j]) ** 2).sum() / 2 for i, j in pairs])
        images += n
        pixels = x[0].size
    return common / pattern, math.sqrt(distance / images / pixels)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_both_are_means_over_pairs_of_images_of_a_group(channels):
    images = images_of(0, 30, channels=channels)
    labels = torch.arange(30) % 4
    labels[labels == 3] = 0
    labels[7] = 3  # alone in its group, which therefore says nothing
    found = diversity(sums(images, labels, 5))
    coherence, spread = by_hand([images[labels == k].numpy() for k in range(3)])
    assert found.coherence == pytest.approx(coherence, abs=1e-7)
    assert found.spread == pytest.approx(spread, abs=1e-12)


def test_parts_of_a_set_add_up_exactly():
    images = images_of(1, 37)
    labels = torch.from_numpy(np.random.RandomState(2).randint(0, 3, 37))
    whole = sums(images, labels, 3)
    added = no_images((8, 8, 3), 3)
    for a, b in ((0, 1), (1, 20), (20, 20), (20, 37)):
        added += sums(images[a:b], labels[a:b], 3)
    for name, value in vars(whole).items():
        assert torch.equal(value, getattr(added, name)), name


def test_large_images_do_not_overflow():
    images = torch.full((2, 2048, 2048, 1), 255, dtype=torch.uint8)
    images[:, ::2] = 0
    images[1] = 255 - images[1]
    found = diversity(sums(images, torch.zeros(2, dtype=torch.int64), 1))
    assert found.coherence == pytest.approx(-1)
    assert found.spread == pytest.approx(math.sqrt(2))


def test_one_image_repeated_in_any_tint_is_wholly_coherent():
    image = images_of(3, 1)
    tints = torch.arange(0, 40, 4, dtype=torch.uint8).view(-1, 1, 1, 1)
    found = diversity(sums(image // 2 + tints, torch.zeros(10, dtype=torch.int64), 1))
    assert found.coherence == pytest.approx(1, abs=1e-6)
    assert found.spread > 0.05  # which the tints alone make


def test_a_group_of_equal_images_has_no_spread():
    images = images_of(4, 2).repeat_interleave(5, 0)
    within = diversity(sums(images, torch.arange(10) // 5, 2))
    assert within.coherence == pytest.approx(1, abs=1e-6)
    assert within.spread == 0
    assert diversity(sums(images, torch.zeros(10, dtype=torch.int64), 1)).spread > 0.05


def test_a_set_without_a_group_of_two_is_refused():
    with pytest.raises(ValueError, match="at least two"):
        diversity(sums(images_of(5, 3), torch.arange(3), 3))
