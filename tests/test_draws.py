"""Draws are functions of (seed, purpose, group), whoever draws them and in whatever order."""

import torch

from gan.draws import Draws


def test_ranks_draw_their_own_part_of_one_stream():
    whole = Draws(3, range(8, 16), 4).latents("a", 5)
    parts = [Draws(3, range(a, b), 4).latents("a", 5) for a, b in ((13, 16), (8, 10), (10, 13))]
    assert torch.equal(torch.cat([parts[1], parts[2], parts[0]]), whole)


def test_seeds_purposes_groups_and_samples_differ():
    draws = [Draws(s, range(g, g + 2), 4).latents(p, 6) for s in (0, 1) for p in ("a", "b") for g in (0, 2)]
    rows = torch.cat(draws)
    assert len(rows.unique(dim=0)) == len(rows)


def test_distributions():
    z = Draws(0, range(500), 4).latents("z", 16)
    assert abs(z.mean()) < 0.03 and abs(z.std() - 1) < 0.03  # six standard errors
    assert abs(Draws(0, range(500), 4).coins("c").float().mean() - 0.5) < 0.07


def test_golden_values_do_not_drift():
    """A change here breaks the resumption of every run there is."""
    z = Draws(1, range(2, 4), 2).latents("latents of the D step", 2)
    torch.testing.assert_close(z, torch.tensor(GOLDEN))
    assert Draws(1, range(0, 3), 4).coins("mirror").int().tolist() == COINS


GOLDEN = [[-0.465077, 0.481724], [0.004869, 1.701655], [-1.766115, -0.560566], [-0.224107, -0.521815]]
COINS = [1, 0, 0, 0, 1, 1, 1, 0, 1, 0, 0, 1]
