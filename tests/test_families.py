"""A second kind of model goes through the same loop, states, snapshots and sampling as the GAN."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from autoencoder import AUTOENCODER, autoencoder_plan
from tiny import one_thread, tiny_config, tiny_task  # noqa: F401 - a fixture

from gan.checkpoint import load_snapshot, load_state, newest_state
from gan.config import TrainConfig, override
from gan.errors import UserError
from gan.families import FAMILIES, find_family
from gan.run.directories import find_run
from gan.sampling import generate, seed_latents
from gan.state import build_networks, initial_state

ROOT = Path(__file__).resolve().parents[1]


def start(outdir: Path) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    return subprocess.Popen([sys.executable, str(ROOT / "tests" / "autoencoder.py"), str(outdir)], env=env)


def newest(outdir: Path) -> tuple[dict, dict, Path]:
    run = find_run(autoencoder_plan(), outdir)
    path, passed_over = newest_state(run)
    assert not passed_over
    tensors, about = load_state(path)
    return tensors, about, run


def test_an_autoencoder_trains_is_killed_resumes_bit_equal_and_is_sampled(tmp_path):
    assert start(tmp_path / "whole").wait() == 0
    killed = start(tmp_path / "killed")
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("killed/0*/training-state-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    _, about, _ = newest(tmp_path / "killed")
    assert 0 < about["images_seen"] < 960  # it was killed on its way
    assert start(tmp_path / "killed").wait() == 0
    whole, about, run = newest(tmp_path / "whole")
    resumed, _, other = newest(tmp_path / "killed")
    assert about["images_seen"] == 960 and whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    parts = {"G", "E", "G_ema", "g_optimizer", "e_optimizer", "skipped", "augmentation"}
    assert {name.split("/")[0] for name in whole} == parts
    assert run.name == "00000-none-tiny-autoencoder-16-b32"
    assert "error 0." in (other / "log.txt").read_text()

    snapshot = load_snapshot(max(run.glob("network-snapshot-*")))
    images = generate(snapshot.G, seed_latents(range(3), 16), stage=2, alpha=1.0)
    assert images.shape == (3, 2, 16, 16) and images.isfinite().all()
    assert all(torch.equal(whole[f"G_ema/{name}"], p) for name, p in snapshot.G.state_dict().items())


def test_the_error_of_an_autoencoder_falls():
    """The step trains: the same images are rebuilt better after it."""
    from gan.inputs import step_inputs
    from gan.ranks.statistics import Statistics
    from gan.run.loop import steps

    task = tiny_task(tiny_config({"model": "autoencoder", "growth.mode": "none", "growth.shares": []}))
    state = initial_state(task)
    images = torch.full((32, 16, 16, 2), 200, dtype=torch.uint8)
    errors = []
    for now in list(steps(task, 0))[:20]:
        stats = Statistics()
        task.family.step(state, task, now, step_inputs(task, now, images, None), stats)
        errors.append(stats.take()["Loss/error"])
    assert errors[-1] < 0.5 * errors[0]


def test_loading_a_snapshot_builds_no_other_network(tmp_path, monkeypatch):
    from snapshots import write_snapshot

    path = write_snapshot(tmp_path / "network-snapshot-0000000000.safetensors")

    def refuse(*_):
        raise AssertionError("a discriminator was built")

    monkeypatch.setattr("gan.networks.ResNetDiscriminator.__init__", refuse)
    assert load_snapshot(path).G.z_dim > 0


def test_networks_start_alike_whatever_was_drawn_before():
    task = tiny_task(tiny_config())
    first = build_networks(task.family, task.config, task.images)
    before = torch.random.get_rng_state()
    torch.rand(3)
    second = build_networks(task.family, task.config, task.images)
    assert all(
        torch.equal(a, b)
        for name in first
        for a, b in zip(first[name].parameters(), second[name].parameters(), strict=True)
    )
    torch.rand(3)
    assert not torch.equal(before, torch.random.get_rng_state())


def test_a_model_that_does_not_exist_is_named_with_the_nearest():
    assert find_family(TrainConfig()) is FAMILIES["gan"]
    assert find_family(override(TrainConfig(), {"model": "autoencoder"})) is AUTOENCODER
    with pytest.raises(UserError, match="model=gam is unknown; did you mean gan"):
        find_family(override(TrainConfig(), {"model": "gam"}))
