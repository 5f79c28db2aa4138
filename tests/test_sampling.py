"""gan.sampling against numpy's stream, hand-made grids and the properties of a closed cubic."""

import numpy as np
import pytest
import torch
from snapshots import craft_snapshot, read_snapshot, write_snapshot
from torch import nn

from gan.checkpoint import load_snapshot
from gan.errors import UserError
from gan.networks import ResNetGenerator
from gan.sampling import (
    GAP,
    catmull_rom,
    generate,
    generate_batches,
    grid_columns,
    latent_walk,
    parse_seeds,
    seed_latents,
    tile,
    to_uint8,
)


class LinearGenerator(nn.Module):
    """w = z + label, image = w / 10 as one pixel of Z channels: every number can be worked out by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.base = (1, 1)
        self.scale = nn.Parameter(torch.tensor(0.1))

    def first_layer(self, z, labels):
        return z if labels is None else z + labels[:, None]

    def mean_first_layer(self, labels):
        return torch.zeros(1, 3) if labels is None else labels[:, None].float().expand(-1, 3)

    def synthesize(self, w, stage, alpha):
        return (w * self.scale)[:, :, None, None]


def test_seed_latents_are_the_streams_of_random_state():
    assert torch.equal(seed_latents([5], 4), torch.tensor(np.random.RandomState(5).randn(1, 4), dtype=torch.float32))
    # RandomState's legacy stream is frozen by numpy: these digits hold on every version.
    assert seed_latents([0], 3)[0].tolist() == pytest.approx(
        [1.764052345967664, 0.4001572083672233, 0.9787379841057392]
    )
    assert torch.equal(seed_latents([1, 7, 1], 8)[1], seed_latents([7], 8)[0])
    assert seed_latents([], 8).shape == (0, 8)


@pytest.mark.parametrize(
    ("text", "seeds"), [("0", [0]), ("0,1,4-6", [0, 1, 4, 5, 6]), (" 3 , 8 - 9", [3, 8, 9]), ("2,2", [2, 2])]
)
def test_parse_seeds(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize(
    ("text", "part"), [("0,x", "'x'"), ("", "''"), ("1,,2", "''"), ("6-4", "'6-4'"), ("-1", "'-1'"), ("1.5", "'1.5'"),
                       ("0-4294967296", "'0-4294967296'"), ("0,0-99999999", "'0-99999999'"), ("٣", "'٣'")]
)  # fmt: skip
def test_parse_seeds_names_the_bad_part(text, part):
    with pytest.raises(UserError, match=part):
        parse_seeds(text)


def test_to_uint8_rounds_and_clips():
    values = torch.tensor([-9.0, -1, -1 + 0.49 / 127.5, -1 + 0.51 / 127.5, 0.999, 1, 9]).reshape(1, 1, 1, 7)
    assert to_uint8(values).ravel().tolist() == [0, 0, 0, 1, 255, 255, 255]
    assert to_uint8(torch.zeros(2, 3, 4, 5)).shape == (2, 4, 5, 3)


def test_to_uint8_inverts_the_scaling_of_data():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert np.array_equal(to_uint8(levels.float() / 127.5 - 1)[0, :, :, 0], levels[0, 0].numpy())


def test_tile_places_images_row_by_row():
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 3, 1), np.uint8) + 1
    grid = tile(images, 3, gap=0)
    assert grid.shape == (4, 9, 1)
    assert grid[::2, ::3, 0].tolist() == [[1, 2, 3], [4, 5, 0]]
    wide = tile(images, 3, gap=1)
    assert wide.shape == (5, 11, 1)
    assert wide[:, :, 0].tolist()[1:4] == [
        [1, 1, 1, 0, 2, 2, 2, 0, 3, 3, 3],
        [0] * 11,
        [4, 4, 4, 0, 5, 5, 5, 0, 0, 0, 0],
    ]
    assert 1 <= GAP <= 2 and np.array_equal(tile(images, 3), tile(images, 3, gap=GAP))


def test_images_of_a_grid_do_not_touch_unless_asked_to():
    """White squares: every row and column of pixels that belongs to no image is black."""
    grid = tile(np.full((4, 3, 3, 1), 255, np.uint8), 2)[:, :, 0]
    assert grid[:3].any(0).tolist() == grid[:, :3].any(1).tolist() == [True] * 3 + [False] * GAP + [True] * 3


def test_a_grid_is_nearly_square_with_few_empty_cells():
    assert [grid_columns(n) for n in (1, 2, 3, 5, 7, 10, 12, 64, 65)] == [1, 2, 3, 5, 4, 5, 4, 8, 13]
    for count in range(1, 300):
        columns = grid_columns(count)
        rows = -(-count // columns)
        assert rows * columns - count < max(rows, 2) and rows <= columns <= 5 * rows


def test_truncation_moves_to_the_mean_of_the_class():
    z, labels = seed_latents(range(5), 3), torch.tensor([0, 1, 2, 0, 1])
    full = generate(LinearGenerator(), z, labels, stage=0, alpha=1, batch=2)
    near = generate(LinearGenerator(), z, labels, stage=0, alpha=1, trunc=0.25, batch=3)
    torch.testing.assert_close(full[:, :, 0, 0], (z + labels[:, None]) / 10)
    torch.testing.assert_close(near[:, :, 0, 0], (z / 4 + labels[:, None]) / 10)
    assert not full.requires_grad


@pytest.mark.parametrize("classes", [0, 3])
def test_the_truncation_mean_is_the_mean_over_latents_of_both_signs(classes):
    """z and -z are equally likely, so the mean of the first layer's output over such a pair is the mean over all."""
    torch.manual_seed(0)
    G = ResNetGenerator(16, (4,), classes=classes).double()
    torch.nn.init.normal_(G.first.bias)
    labels = torch.tensor([0, 2, 1, 2, 0]) if classes else None
    z = seed_latents(range(5), 16).double()
    mean = (G.first_layer(z, labels) + G.first_layer(-z, labels)) / 2
    torch.testing.assert_close(G.mean_first_layer(labels).expand_as(mean), mean, rtol=1e-12, atol=1e-12)


def test_the_truncation_mean_of_older_snapshots_is_read_and_not_used(tmp_path):
    path = write_snapshot(tmp_path / "new.safetensors")
    about, tensors = read_snapshot(path)
    assert torch.equal(tensors["latent_mean"], torch.zeros(8))
    older = {**tensors, "latent_mean": torch.full((8,), 0.03)}
    craft_snapshot(tmp_path / "old.safetensors", about, older, verified=False)
    new, old = (load_snapshot(tmp_path / name).G for name in ("new.safetensors", "old.safetensors"))
    assert torch.equal(new.mean_first_layer(), old.mean_first_layer())


def test_batches_are_bounded_and_complete():
    sizes = [
        len(images) for images in generate_batches(LinearGenerator(), torch.zeros(5, 3), stage=0, alpha=1, batch=2)
    ]
    assert sizes == [2, 2, 1]


def test_non_finite_networks_are_refused():
    with pytest.raises(UserError, match="not finite"):
        generate(LinearGenerator(), torch.full((1, 3), torch.nan), stage=0, alpha=1)


def test_walk_passes_its_keyframes_and_has_the_asked_length():
    keyframes = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    walk = torch.stack(list(latent_walk(keyframes, 7)))
    assert walk.shape == (21, 2, 4)
    torch.testing.assert_close(walk[::7], keyframes)


def test_walk_is_closed_and_continuous_with_its_derivative():
    keyframes = torch.randn(4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    nodes, h = torch.arange(-4, 9, dtype=torch.float64), 1e-6
    left, here, right = (catmull_rom(keyframes, nodes + d) for d in (-h, 0, h))
    torch.testing.assert_close(here, keyframes[nodes.long() % 4])
    torch.testing.assert_close((here - left) / h, (right - here) / h, atol=1e-4, rtol=0)
    tangents = (keyframes.roll(-1, 0) - keyframes.roll(1, 0)) / 2
    torch.testing.assert_close((right - left) / (2 * h), tangents[nodes.long() % 4], atol=1e-4, rtol=0)


def test_a_walk_through_one_keyframe_stands_still():
    assert torch.stack(list(latent_walk(torch.ones(1, 3), 4))).equal(torch.ones(4, 3))


def test_a_straight_line_is_walked_at_constant_speed():
    """Catmull-Rom reproduces linear functions: away from the wrap, equal steps."""
    keyframes = torch.arange(6, dtype=torch.float64)[:, None]
    times = torch.linspace(1, 4, 31, dtype=torch.float64)
    torch.testing.assert_close(catmull_rom(keyframes, times)[:, 0], times)
