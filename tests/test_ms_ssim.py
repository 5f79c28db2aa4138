"""MS-SSIM against a second implementation by loops, and against torchmetrics where it is installed."""

import numpy as np
import pytest
import torch

from gan.metrics.ms_ssim import WEIGHTS, ms_ssim, similarities
from gan.metrics.sample import Sample, Seen, groups_of_class
from gan.metrics.score import METRICS

RANDOM = np.random.RandomState(0)


def smooth(count: int, channels: int, height: int, width: int) -> torch.Tensor:
    """Random images that are smooth enough to be somewhat alike, [count, C, H, W]."""
    coarse = torch.from_numpy(RANDOM.rand(count, channels, 4, 4) * 255)
    images = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return (images + torch.from_numpy(RANDOM.randn(*images.shape)) * 8).clamp(0, 255)


def by_loops(x: np.ndarray, y: np.ndarray) -> float:
    """Of two images [C, H, W]: sums over each window, scale by scale (Wang et al. 2003, eq. 7)."""
    side = min(11, *x.shape[1:])
    offsets = np.arange(side) - (side - 1) / 2
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    scales = max(sum(min(x.shape[1:]) // 2**k >= 11 for k in range(5)), 1)
    weights = np.array(WEIGHTS[:scales]) / sum(WEIGHTS[:scales])
    result = 1.0
    for scale in range(scales):
        whole, structure = [], []
        for a, b in zip(x, y, strict=True):
            for i in range(a.shape[0] - side + 1):
                for j in range(a.shape[1] - side + 1):
                    p, q = a[i : i + side, j : j + side], b[i : i + side, j : j + side]
                    mp, mq = (window * p).sum(), (window * q).sum()
                    vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                    cov = (window * (p - mp) * (q - mq)).sum()
                    structure.append((2 * cov + 7.65**2) / (vp + vq + 7.65**2))
                    whole.append(structure[-1] * (2 * mp * mq + 2.55**2) / (mp**2 + mq**2 + 2.55**2))
        result *= max(np.mean(whole if scale == scales - 1 else structure), 0) ** weights[scale]
        height, width = x.shape[1] // 2, x.shape[2] // 2
        whole_cells = [part[:, : 2 * height, : 2 * width] for part in (x, y)]
        x, y = (part.reshape(len(part), height, 2, width, 2).mean((2, 4)) for part in whole_cells)
    return result


@pytest.mark.parametrize("size", [(8, 8), (8, 12), (24, 32), (48, 44)])
def test_similarity_is_that_of_loops(size):
    x, y = smooth(2, 2, *size), smooth(2, 2, *size)
    found = ms_ssim(x, 0.5 * x + 0.5 * y)
    for index in range(2):
        wanted = by_loops(x[index].numpy(), (0.5 * x + 0.5 * y)[index].numpy())
        assert float(found[index]) == pytest.approx(wanted, rel=1e-9)


def test_the_factors_of_contrast_are_those_of_torchmetrics():
    """Of four scales. At the last one it averages over mirrored borders too, unlike the paper: here that weighs 0."""
    functional = pytest.importorskip("torchmetrics.functional.image")
    measure = functional.multiscale_structural_similarity_index_measure
    betas = tuple(weight / sum(WEIGHTS[:4]) for weight in WEIGHTS[:4])
    x, y = smooth(3, 3, 192, 208), smooth(3, 3, 192, 208)
    mixed = 0.6 * x + 0.4 * y
    wanted = measure(mixed, x, data_range=255.0, reduction="none", betas=(*betas, 0.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gan.metrics.ms_ssim.WEIGHTS", (*betas, 0.0))
        np.testing.assert_allclose(ms_ssim(x, mixed), wanted, rtol=1e-6)


def test_equal_images_are_alike_and_unlike_ones_are_not():
    x = smooth(4, 1, 32, 32)
    np.testing.assert_allclose(ms_ssim(x, x), 1)
    noise = torch.from_numpy(RANDOM.randint(0, 256, (4, 1, 32, 32))).double()
    assert float(ms_ssim(x, noise).max()) < 0.3
    assert bool((ms_ssim(x, 255 - x) == 0).all())


def test_pairs_are_of_one_group_and_no_image_is_in_two():
    groups = np.array([2, 0, 2, 1, 0, 2, 0, 0, 2])
    pairs = groups_of_class(groups, 2)
    assert pairs.tolist() == [[1, 4], [6, 7], [0, 2], [5, 8]]
    images = smooth(9, 3, 16, 16).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    planes = images.permute(0, 3, 1, 2).double()
    wanted = [float(ms_ssim(planes[i : i + 1], planes[j : j + 1])) for i, j in pairs]
    np.testing.assert_allclose(similarities(images.numpy(), pairs), wanted)


@pytest.mark.parametrize("labels", [np.arange(400) % 2, np.arange(400) // 200], ids=["in turn", "one after another"])
def test_pairs_of_all_images_are_of_one_class_as_often_as_by_chance(labels):
    """Two classes, an image and its negative: pairs have a similarity of 1 or 0, and of any pair half are of one."""
    image = smooth(1, 1, 16, 16).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    images = np.concatenate([image, 255 - image])[labels]
    view = Seen(images, np.arange(400), (16, 16))
    sample = Sample(images, np.zeros((400, 1)), labels=labels, views={"thumbnails": view})
    found = METRICS["ms-ssim"].measure(sample, sample)
    assert found["ms-ssim"].value == pytest.approx(0.5, abs=0.1)
    assert found["ms-ssim-in-classes"].value == pytest.approx(1)


def test_of_repeated_images_no_more_pairs_are_compared_than_a_view_has(monkeypatch):
    compared = []
    monkeypatch.setattr("gan.metrics.score.similarities", lambda _, pairs: compared.append(len(pairs)) or np.ones(2))
    view = Seen(np.zeros((40, 8, 8, 1), np.uint8), np.arange(40), (8, 8))
    sample = Sample(view.data, np.zeros((40, 1)), labels=np.arange(40) % 2, views={"thumbnails": view})
    repeated = sample.pick(np.arange(5000) % 40)
    METRICS["ms-ssim"].measure(repeated, repeated)
    assert compared == [1000, pytest.approx(1000, abs=1)]
