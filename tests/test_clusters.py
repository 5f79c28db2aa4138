"""gan/theory/clusters.py: small GANs of several seeds, trained at once."""

import math

import numpy as np
import pytest
import torch

from gan.theory import clusters
from gan.theory.clusters import POINTS, Recipe, train_seeds

RECIPE = Recipe(steps=6, n_critic=2, group=256)


@pytest.mark.parametrize(
    "objective,regularizer",
    [("nonsaturating", "r1"), ("relativistic", "spectral_norm"), ("wasserstein", "clip"), ("mmd", "instance_noise")],
)
def test_a_seed_does_not_depend_on_the_others(objective, regularizer):
    def points(seeds: list[int]) -> np.ndarray:
        trained = train_seeds(objective, regularizer, 0.5, POINTS["grid"], seeds, RECIPE, [RECIPE.steps])
        return trained[seeds.index(1)].points

    alone = points([1])
    assert np.array_equal(points([0, 1, 2]), alone) and np.array_equal(points([7, 5, 3, 2, 9, 8, 1]), alone)
    assert not np.array_equal(
        train_seeds(objective, regularizer, 0.5, POINTS["grid"], [2], RECIPE, [6])[0].points, alone
    )


def test_a_seed_that_overflows_does_not_disturb_the_others(monkeypatch):
    """Seed 0 begins with weights that are not finite, seed 1 as it always does."""
    as_usual = clusters._networks

    def spoiled(seed, outputs, prepare):
        G, D = as_usual(seed, outputs, prepare)
        if seed == 0:
            torch.nn.init.constant_(D[0].weight, math.nan)
        return G, D

    (alone,) = train_seeds("f:kl", "r1", 1.0, POINTS["ring"], [1], RECIPE, [6])
    monkeypatch.setattr(clusters, "_networks", spoiled)
    lost, kept = train_seeds("f:kl", "r1", 1.0, POINTS["ring"], [0, 1], RECIPE, [6])
    assert math.isnan(lost.looks[-1][1]["mode_kl"]) and np.array_equal(kept.points, alone.points)


def test_looks_are_taken_at_the_steps_asked_for():
    (trained,) = train_seeds("nonsaturating", "none", 0.0, POINTS["ring"], [3], RECIPE, [2, 6])
    assert [step for step, _ in trained.looks] == [2, 6] and trained.points.shape == (2500, 2)
