"""`saddle benchmark features`: what degrades images does what it says, and the table of distances."""

import hashlib
import json
import sys
import warnings

import numpy as np
import pytest
import stores
import torch
from torch import Tensor, nn

from launch import cli
from launch.benchmark.features_benchmark import KEPT, LADDERS, blurred, compressed, copied, noisy

RANDOM = np.random.RandomState(0)


class Texture(nn.Module):
    """Two features: the mean, and the mean squared difference of neighbors."""

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.float() / 255
        roughness = pixels.diff(dim=3).square().mean((1, 2, 3))
        return torch.stack([pixels.mean((1, 2, 3)), roughness], dim=1)


def test_blur_has_the_deviation_that_is_asked_for():
    """Of a bright stripe on black: the second moment across the stripe is sigma^2."""
    images = np.zeros((1, 64, 65, 3), np.uint8)
    images[:, :, 32] = 255
    for sigma in (1, 2, 3):
        weights = blurred(images, sigma, RANDOM)[0, 32, :, 0].astype(float)
        moment = (weights * np.square(np.arange(65) - 32)).sum() / weights.sum()
        assert moment == pytest.approx(sigma**2, rel=0.15)


def test_noise_has_the_deviation_that_is_asked_for():
    gray = np.full((20, 32, 32, 3), 128, np.uint8)
    difference = noisy(gray, 8, RANDOM).astype(float) - 128
    assert difference.std() == pytest.approx(8, rel=0.02)
    assert abs(difference.mean()) < 0.2
    white = np.full((20, 32, 32, 3), 255, np.uint8)
    assert noisy(white, 8, RANDOM).min() > 200  # cut off, not wrapped around


def test_jpeg_loses_more_at_lower_quality():
    images = RANDOM.randint(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    errors = [np.square(compressed(images, quality, RANDOM).astype(float) - images).mean() for quality in (95, 50, 10)]
    assert 0 < errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_copies_replace_the_share_that_is_asked_for(share):
    result = copied(np.zeros((100, 1, 1, 3), np.uint8), share, np.random.RandomState(1))
    changed = result != np.arange(100)
    assert changed.sum() == round(100 * share)
    assert len(np.unique(result)) == 100 - round(100 * share)
    assert len(np.unique(result[changed])) == (KEPT if share else 0)


def saddle(monkeypatch, *arguments: object) -> int:
    """The exit code of `saddle benchmark features ARGUMENTS`, in this process."""
    monkeypatch.setattr(sys, "argv", ["saddle", "benchmark", "features", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


@pytest.fixture
def spec(tmp_path) -> str:
    path = tmp_path / "texture.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(Texture()).save(path)
    return f"{path}:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def test_the_command_prints_every_step_of_every_ladder(monkeypatch, tmp_path, spec, capsys):
    stores.build(tmp_path / "data.lmdb")
    path = tmp_path / "rows.json"
    assert saddle(monkeypatch, f"--data={tmp_path / 'data.lmdb'}", f"--features={spec}", f"--json={path}") == 0
    saved = json.loads(path.read_text())
    assert saved["features"]["name"] == "texture"
    assert saved["features"]["sha256"] == spec.rpartition(":")[2]
    steps = [(row["ladder"], row["amount"]) for row in saved["rows"]]
    assert steps == [(name, float(amount)) for name, (amounts, _) in LADDERS.items() for amount in amounts]
    assert "fd-texture" in capsys.readouterr().out
    for before, after in zip(saved["rows"], saved["rows"][1:], strict=False):
        if after["ladder"] != before["ladder"]:
            continue
        assert after["fd-texture rises"] == (after["fd-texture low"] > before["fd-texture high"])
        if after["ladder"] == "blur, pixels":  # of white noise: each blur takes roughness away
            assert after["fd-texture"] > before["fd-texture"]


def test_too_few_images_are_refused(monkeypatch, tmp_path, spec, capsys):
    pyramids = stores.images(count=2)
    stores.build(tmp_path / "data.lmdb", pyramids)
    assert saddle(monkeypatch, f"--data={tmp_path / 'data.lmdb'}", f"--features={spec}") == 2
    error = capsys.readouterr().err
    assert "2 images of" in error
    assert "texture has 2 features" in error


def test_features_that_do_not_exist_are_refused(monkeypatch, tmp_path, capsys):
    stores.build(tmp_path / "data.lmdb")
    assert saddle(monkeypatch, f"--data={tmp_path / 'data.lmdb'}", "--features=inception") == 2
    assert "features are lite0, or PATH:SHA256" in capsys.readouterr().err
