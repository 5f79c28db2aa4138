"""The sliced Wasserstein distance against scipy and a second pyramid, written pixel by pixel."""

import numpy as np
import pytest
import torch

from gan.metrics.sliced import (
    PATCHES,
    laplacian_pyramid,
    level_sizes,
    patches,
    sliced_wasserstein,
    standardized,
)

RANDOM = np.random.RandomState(0)


def blurred(plane: np.ndarray) -> np.ndarray:
    """[H, W] filtered by 1 4 6 4 1 in both directions, pixel by pixel; edges are mirrored."""
    kernel = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]) / 256
    height, width = plane.shape
    found = np.zeros_like(plane)
    for i in range(height):
        for j in range(width):
            for a in range(-2, 3):
                for b in range(-2, 3):
                    y, x = abs(i + a), abs(j + b)
                    y, x = (y if y < height else 2 * height - 2 - y), (x if x < width else 2 * width - 2 - x)
                    found[i, j] += kernel[a + 2, b + 2] * plane[y, x]
    return found


def test_a_pyramid_is_that_of_pixel_by_pixel_and_adds_up_to_the_image():
    images = RANDOM.randint(0, 256, (2, 3, 64, 36)).astype(np.float64)
    fine, coarse = laplacian_pyramid(torch.from_numpy(images))
    plane = images[1, 2]
    small = blurred(plane)[::2, ::2]
    large = np.zeros_like(plane)
    large[::2, ::2] = small
    np.testing.assert_allclose(coarse[1, 2], small, atol=1e-11)
    np.testing.assert_allclose(fine[1, 2], plane - 4 * blurred(large), atol=1e-11)
    assert [tuple(level.shape[2:]) for level in (fine, coarse)] == level_sizes(64, 36) == [(64, 36), (32, 18)]
    assert level_sizes(8, 8) == [(8, 8)] and level_sizes(128, 128)[-1] == (16, 16)


def test_patches_are_pieces_of_the_levels_that_depend_on_the_images_number_alone():
    images = RANDOM.randint(0, 256, (3, 33, 40, 2), dtype=np.uint8)
    found = patches(images, np.array([4, 0, 9]))
    assert found.shape == (3, 2, PATCHES, 2, 49)
    for level, plane in enumerate(laplacian_pyramid(torch.from_numpy(images).permute(0, 3, 1, 2).float())):
        places = {
            plane[1, :, i : i + 7, j : j + 7].numpy().tobytes()
            for i in range(plane.shape[2] - 6)
            for j in range(plane.shape[3] - 6)
        }
        pieces = {patch.tobytes() for patch in found[1, level]}
        assert pieces <= places and len(pieces) > PATCHES // 2
    np.testing.assert_array_equal(patches(images[1:], np.array([0, 9])), found[1:])
    assert not np.array_equal(patches(images[1:2], np.array([1])), found[1:2])


def test_patches_of_one_image_under_neighboring_numbers_are_from_other_places():
    """Of 122 500 places: of 24 random ones hardly ever two are equal."""
    image = RANDOM.randint(0, 256, (1, 356, 356, 1), dtype=np.uint8)
    found = patches(image.repeat(3, axis=0), np.array([6, 7, 8]))[:, 0]
    assert len(np.unique(found.reshape(3 * PATCHES, -1), axis=0)) == 3 * PATCHES


def test_standardized_patches_do_not_know_brightness_and_contrast():
    x = torch.from_numpy(RANDOM.randn(20, 8, 3, 49))
    tinted = x * torch.tensor([2.0, 3.0, 0.5]).view(3, 1) + torch.tensor([5.0, -9.0, 0.0]).view(3, 1)
    torch.testing.assert_close(standardized(tinted), standardized(x))
    torch.testing.assert_close(standardized(x).square().mean((0, 1, 3)), torch.ones(3, dtype=torch.float64))
    assert (standardized(torch.ones(2, 8, 1, 49)) == 0).all()


@pytest.mark.parametrize("ties", [False, True])
def test_the_distance_is_the_mean_of_scipys_over_directions(ties):
    stats = pytest.importorskip("scipy.stats")
    x = RANDOM.randn(31, 4, 6)
    y = RANDOM.randn(17, 4, 6) * 1.5 + 0.3
    if ties:
        x, y = x.round(), y.round()
    axes = np.random.RandomState(0).randn(20, 6)
    axes /= np.linalg.norm(axes, axis=1, keepdims=True)
    wanted = [stats.wasserstein_distance((x @ axis).ravel(), (y @ axis).ravel()) for axis in axes]
    found = sliced_wasserstein(torch.from_numpy(x), torch.from_numpy(y), directions=20)
    assert found.value == pytest.approx(np.mean(wanted), rel=1e-12)
    assert found.low <= found.value <= found.high


def test_equal_sets_are_at_distance_zero_and_sets_of_one_number_at_their_difference():
    x = torch.from_numpy(RANDOM.randn(10, 8, 5))
    same = sliced_wasserstein(x, x.flip(0))
    assert (same.value, same.low, same.high) == (0, 0, 0)
    apart = sliced_wasserstein(torch.full((3, 2, 1), 5.0), torch.full((4, 2, 1), 2.5))
    assert apart.value == pytest.approx(2.5) and apart.high == pytest.approx(2.5)


def test_the_interval_is_that_of_many_draws():
    """Patches of one image are alike: what counts is the number of images."""
    generator = torch.Generator().manual_seed(0)

    def draw(count: int, shift: float) -> torch.Tensor:
        own = torch.randn(count, 1, 3, generator=generator, dtype=torch.float64)
        return own + 0.1 * torch.randn(count, 4, 3, generator=generator, dtype=torch.float64) + shift

    estimates = [sliced_wasserstein(draw(300, 0.0), draw(200, 1.0), directions=16) for _ in range(150)]
    spread = np.std([estimate.value for estimate in estimates])
    reach = np.mean([estimate.high - estimate.value for estimate in estimates]) / 1.96
    assert reach == pytest.approx(spread, rel=0.2)
