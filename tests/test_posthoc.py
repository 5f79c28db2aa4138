"""Averages made after training: their profiles against integrals, and reconstructed ones against ones kept directly."""

import math
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tiny import one_thread, tiny_config, tiny_feed, tiny_task  # noqa: F401 - a fixture

from gan.checkpoint import load_snapshot
from gan.errors import UserError
from gan.networks import stage_of
from gan.posthoc import combination, inner_product, reconstruct
from gan.run import loop
from gan.schedules import profile_beta, profile_exponent
from gan.state import initial_state
from launch.average import main

LENGTHS = (0.02, 0.05, 0.1, 0.2, 0.28)


def profile(tau: np.ndarray, time: float, length: float) -> np.ndarray:
    gamma = profile_exponent(length)
    return np.where(tau <= time, (gamma + 1) / time * (tau / time) ** gamma, 0.0)


@pytest.mark.parametrize("length", LENGTHS)
def test_a_profile_has_the_wanted_standard_deviation(length):
    tau = (np.arange(200_000) + 0.5) / 200_000
    weights = profile(tau, 1.0, length) / len(tau)
    mean = weights @ tau
    assert weights.sum() == pytest.approx(1, rel=1e-6)
    assert math.sqrt(weights @ (tau - mean) ** 2) == pytest.approx(length, rel=1e-6)
    assert profile_exponent(length) > 0


def test_exponents_are_those_of_the_paper():
    assert profile_exponent(0.05) == pytest.approx(16.97, abs=0.005)
    assert profile_exponent(0.10) == pytest.approx(6.94, abs=0.005)


@pytest.mark.parametrize("first", [32, 20])  # the first G update may come less than n_critic steps after a stage began
@pytest.mark.parametrize("length", LENGTHS)
def test_the_weights_of_the_steps_are_the_profile_integrated_over_each_step(first, length):
    times = [first + 32 * k for k in range(50)]
    weights = np.zeros(50)
    for k, time in enumerate(times):
        beta = profile_beta(32, time, length)
        weights *= beta
        weights[k] = 1 - beta
    gamma = profile_exponent(length)
    wanted = np.diff([0, *((time / times[-1]) ** (gamma + 1) for time in times)])
    np.testing.assert_allclose(weights, wanted, rtol=1e-9, atol=1e-15)


def test_inner_products_are_integrals():
    tau = 3 * (np.arange(300_000) + 0.5) / 300_000
    for a in ((1.0, 0.05), (2.0, 0.1), (3.0, 0.2)):
        for b in ((1.0, 0.1), (2.0, 0.1), (2.5, 0.05)):
            ours = inner_product(*((time, profile_exponent(length)) for time, length in (a, b)))
            assert ours == pytest.approx((profile(tau, *a) * profile(tau, *b)).sum() * 1e-5, rel=1e-4)


def test_an_average_that_was_kept_is_found_and_factors_add_up_to_1():
    kept = [(time, profile_exponent(length)) for time in (1000, 2000, 3000) for length in (0.05, 0.1)]
    for number in (4, 5):
        factors, left = combination(kept, kept[number])
        np.testing.assert_allclose(factors, np.eye(6)[number], atol=1e-9)
        assert left < 1e-6
    factors, left = combination(kept, (3000, profile_exponent(0.07)))
    assert factors.sum() == pytest.approx(1, rel=1e-12) and 1e-3 < left < 0.1


@pytest.mark.parametrize("keep", [0.0, 0.9, 1.0])  # of the movement of the step before: noise, short memory, a walk
def test_on_a_random_trajectory_any_length_between_is_reconstructed_within_a_thousandth(keep):
    rng = np.random.default_rng(0)
    steps, snapshots = 1600, 16
    moving = np.zeros((steps, 100))
    for k in range(1, steps):
        moving[k] = keep * moving[k - 1] + 0.05 * rng.normal(size=100)
    parameters = rng.normal(size=100) + moving

    def average(time: int, length: float) -> np.ndarray:
        value = parameters[0]
        for k in range(time):
            value = value + (1 - profile_beta(1, k + 1, length)) * (parameters[k] - value)
        return value

    times = [steps * (k + 1) // snapshots for k in range(snapshots)]
    pairs = [(time, length) for time in times for length in (0.05, 0.1)]
    kept = np.stack([average(*pair).astype(np.float32) for pair in pairs]).astype(np.float64)
    for length in (0.055, 0.065, 0.075, 0.085, 0.095):
        factors, _ = combination(
            [(time, profile_exponent(kept_length)) for time, kept_length in pairs], (steps, profile_exponent(length))
        )
        direct = average(steps, length)
        error = np.linalg.norm(factors @ kept - direct)
        nearest = min(np.linalg.norm(kept[number] - direct) for number in (-2, -1))
        assert error < 1e-3 * np.linalg.norm(direct) and error < nearest / 5


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A run of 60 steps in three stages, with a snapshot after every third, that kept lengths .05 and .1; and the
    average of length .07 that it kept directly, at 40 steps and at the end."""
    run = tmp_path_factory.mktemp("run")
    config = tiny_config(
        {"run.kimg": 32 * 60 / 1000, "run.tick": 32 * 3 / 1000, "ema.posthoc": [0.05, 0.1, 0.07], "run.keep": 1}
    )
    task = tiny_task(config)
    assert loop.train(initial_state(task), task, tiny_feed, run, {}) == 0
    direct = {}
    for path in run.glob("posthoc-*-0.07.safetensors"):
        direct[int(path.stem.split("-")[1])] = load_snapshot(path).G.state_dict()
        path.unlink()
    return run, direct


def distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], names: list[str]) -> float:
    a, b = (torch.cat([tensors[name].double().flatten() for name in names]) for tensors in (ours, theirs))
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("seen,stage", [(32 * 60, 2), (32 * 27, 1)])
def test_a_length_between_is_reconstructed_within_a_thousandth_of_one_kept_directly(grown, seen, stage):
    """Of a run that grew, for the parameters of every stage. At the end the last one has trained for 30 steps."""
    run, direct = grown
    snapshot, count, left = reconstruct(run / f"network-snapshot-{seen:010d}.safetensors", 0.07)
    assert count == 2 * seen // 96 and left < 0.05
    ours = snapshot.G.state_dict()
    for of_stage in range(stage + 1):
        names = [name for name in ours if stage_of(name) == of_stage]
        error = distance(ours, direct[seen], names)
        others = [
            load_snapshot(run / f"posthoc-{seen:010d}-{length}.safetensors").G.state_dict() for length in (0.05, 0.1)
        ]
        assert error < 1e-3 and error < min(distance(other, direct[seen], names) for other in others) / 5
    assert (snapshot.images_seen, snapshot.stage) == (seen, stage)


def test_the_command_writes_a_snapshot_that_makes_images(grown, tmp_path):
    run, _ = grown
    output = tmp_path / "long.safetensors"
    result = CliRunner().invoke(main, [f"--network={run}", "--length=0.08", f"--output={output}"])
    assert result.exit_code == 0, result.output
    assert result.output.startswith(f"wrote {output}: length 0.08 after 1920 images, made of 40 averages; ")
    made = load_snapshot(output)
    assert (made.stage, made.alpha, made.images_seen) == (2, 1.0, 1920)
    expected = reconstruct(run / "network-snapshot-0000001920.safetensors", 0.08)[0]
    z = torch.randn(2, 16)
    assert torch.equal(made.G(z, 2), expected.G(z, 2))


def test_what_cannot_be_reconstructed_is_refused(grown, tmp_path):
    run, _ = grown
    newest = run / "network-snapshot-0000001920.safetensors"
    for length in (0.04, 0.11, math.nan):
        with pytest.raises(UserError, match=r"is not between those of the averages in .*, 0.05 and 0.1;"):
            reconstruct(newest, length)
    for seen in (288, 576):  # from before the last stage began
        shutil.copy(run / f"posthoc-{seen:010d}-0.05.safetensors", tmp_path)
        shutil.copy(run / f"posthoc-{seen:010d}-0.1.safetensors", tmp_path)
    shutil.copy(newest, tmp_path)
    with pytest.raises(UserError, match=r"has no average from after .* images, when stage 2 began"):
        reconstruct(tmp_path / newest.name, 0.07)
    for path in tmp_path.glob("posthoc-*"):
        path.unlink()
    with pytest.raises(UserError, match=r"has no posthoc-\*\.safetensors; train with --set ema\.posthoc=0\.05,0\.1"):
        reconstruct(tmp_path / newest.name, 0.07)
    shutil.copy(run / "posthoc-0000001920-0.05.safetensors", tmp_path)
    (tmp_path / "posthoc-0000000960-0.1.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"posthoc-0000000960-0\.1\.safetensors is damaged"):
        reconstruct(tmp_path / newest.name, 0.07)
