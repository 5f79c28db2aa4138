"""What content and style say of the class, for codes whose content and noise are known."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from snapshots import write_snapshot

from data.prepare import prepare
from gan.errors import UserError
from gan.metrics.sample import groups_of_class
from gan.vae.groups import Grouped
from launch import code_estimates, evaluate
from launch.code_estimates import code_rows

NOISE = 1.0


def planted(count, generator):
    """Codes whose content is the class in three noisy numbers, and whose style is noise."""
    labels = torch.randint(4, (count,), generator=generator)
    centers = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [-1, -1, -1]])
    content = centers[labels] + NOISE * torch.randn(count, 3, generator=generator)
    style = torch.randn(count, 2, generator=generator)
    log_variance = torch.full((count, 5), 2 * np.log(NOISE))
    return torch.cat([content, style, log_variance], 1), labels.numpy(), centers


def test_content_tells_the_class_style_does_not_and_more_images_tell_more():
    codes, labels, centers = planted(8000, torch.Generator().manual_seed(0))
    rows = code_rows(Grouped(5, 5, content=3, size=2), codes, labels, 4000, 4, seed=0)
    style, *content = rows
    assert style["code"] == "style" and abs(style["class told"] - 0.25) < 0.04
    best = (torch.cdist(codes[4000:, :3], centers).argmin(1).numpy() == labels[4000:]).mean()
    assert abs(content[0]["class told"] - best) < 0.04
    told = [row["class told"] for row in content]
    assert told == sorted(told) and told[-1] > 0.95 > told[0] + 0.15
    for row in content:
        assert row["deviation"] == pytest.approx(NOISE / row["images together"] ** 0.5, abs=1e-3)
    assert content[0]["of held out"] == 4000 and content[-1]["of held out"] <= 4000 // 16


def test_groups_are_of_one_class_and_have_no_image_twice():
    labels = np.array([1, 0, 1, 1, 2, 1, 0, 1])
    groups = groups_of_class(labels, 2)
    assert (labels[groups] == labels[groups][:, :1]).all() and len(np.unique(groups)) == groups.size
    assert len(groups) == 3 and groups_of_class(labels, 9).shape == (0, 9)


def test_the_command_compares_codes_of_grouped_networks_only(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    prepare("digits", tmp_path / "d.lmdb", resolution=(8, 8), max_images=200)
    monkeypatch.setattr(code_estimates, "STEPS", 20)
    grouped = write_snapshot(tmp_path / "g.safetensors", model="vae", more={"vae.posterior": "grouped:content=3"})
    arguments = [f"--data={tmp_path}/d.lmdb", "--codes", f"--json={tmp_path}/r.json"]
    found = CliRunner().invoke(evaluate.main, [f"--network={grouped}", *arguments], standalone_mode=False)
    assert found.exception is None
    rows = json.loads((tmp_path / "r.json").read_text())
    assert [(row["code"], row["images together"]) for row in rows][:3] == [("style", 1), ("content", 1), ("content", 2)]
    assert all(0 <= row["class told"] <= 1 and row["of held out"] <= 100 for row in rows)
    plain = write_snapshot(tmp_path / "p.safetensors", model="vae")
    refused = CliRunner().invoke(evaluate.main, [f"--network={plain}", *arguments], standalone_mode=False)
    assert isinstance(refused.exception, UserError) and "no content apart from style" in str(refused.exception)
