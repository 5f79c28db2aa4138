"""The benchmarks that train: equal time, what they keep, and their tables; with trainings of a few steps."""

import json
import os

import numpy as np
import pytest
from click.testing import CliRunner

from data.dataset import ImageDataset
from data.prepare import prepare
from gan.errors import UserError
from launch import likelihood_estimates
from launch.benchmark import baseline_benchmark, posteriors_benchmark, training
from launch.benchmark.baseline_benchmark import configuration, equal_time, shared_settings
from launch.benchmark.posteriors_benchmark import mean_and_error, row
from launch.samples import find_snapshot, last_run


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    pytest.importorskip("sklearn")
    path = tmp_path_factory.mktemp("data") / "d.lmdb"
    prepare("digits", path, resolution=(16, 16), max_images=300)
    return path


def call(command, *flags):
    result = CliRunner().invoke(command, [str(flag) for flag in flags], standalone_mode=False)
    if result.exception:
        raise result.exception
    return result.output


def test_errors_are_of_images_and_of_seeds():
    mean, error = mean_and_error([np.array([1.0, 3.0, 5.0, 7.0])])
    assert mean == 4 and error == pytest.approx(np.sqrt(20 / 3 / 4), abs=1e-3)
    mean, error = mean_and_error([np.array([1.0, 3.0]), np.array([5.0, 7.0])])
    assert mean == 4 and error == pytest.approx(np.sqrt(2 / 2 + 8 / 2), abs=1e-3)
    assert mean_and_error([]) == (None, None)


def test_a_row_is_compared_on_the_same_images_and_seeds():
    reference = [{"iwae": np.array([1.0, 2.0, 4.0])}, {"iwae": np.array([2.0, 3.0, 5.0])}]
    ours = [{"iwae": values["iwae"] + 0.5, "ais": np.array([2.0, 3.0])} for values in reference]
    line = row("iaf", ours, reference, "iwae", np.array([True, False, True]))
    assert line["above vae"] == 0.5 and line["± above vae"] == 0
    assert line["iwae, few"] == pytest.approx(3.5) and line["ais, few"] == 2.5
    assert line["jackknife, few"] is None and line["seeds"] == 2


def test_what_was_found_is_not_looked_for_again(tmp_path):
    path = tmp_path / "deep" / "found.json"
    assert training.kept(path, lambda: {"a": 1}) == {"a": 1}
    assert training.kept(path, lambda: pytest.fail("it is known")) == {"a": 1}


def test_the_last_run_is_the_one_that_ended_last_and_not_the_one_of_the_newest_snapshot(tmp_path):
    with pytest.raises(UserError, match="train first"):
        last_run(tmp_path)
    for run, ended, saved in (("00000-a", 30, 10), ("00001-b", 20, 25)):
        for name, seconds in (("exit.json", ended), ("network-snapshot-0000001000.safetensors", saved)):
            path = tmp_path / run / name
            path.parent.mkdir(exist_ok=True)
            path.touch()
            os.utime(path, (seconds, seconds))
    assert last_run(tmp_path).name == "00000-a" and find_snapshot(tmp_path).parent.name == "00001-b"


def test_the_vae_gets_the_time_of_the_gan_and_its_decoder(digits, monkeypatch):
    """With a clock by which a step of the GAN takes three times as long as one of the VAE."""
    gan = configuration("digits", {"kimg": 1.92, "network.widths": [8, 8, 8]})
    vae = configuration("vae-digits", shared_settings(gan) | {"network.z_dim": 64})
    assert vae.network.widths == gan.network.widths and vae.batch == gan.batch == 32
    costs = {"gan": 3.0 * 4, "vae": 1.0}  # a cycle of the GAN's lazy penalty is 4 steps

    def contest(calls, clock, repeats):
        for function in calls.values():
            function()
        return {key: type("T", (), {"median": 1000 * costs[key.split()[0]]}) for key in calls}, {}

    monkeypatch.setattr("launch.benchmark.timing.contest", contest)
    budget = equal_time(gan, vae, ImageDataset(digits), 1)
    assert budget["seconds"] == 60 * 3
    assert budget["vae"]["kimg"] == pytest.approx(3 * 1.92)


def test_steps_of_a_conditional_network_are_timed_with_labels(digits, monkeypatch):
    from gan import inputs

    given = []

    def step_inputs(of, now, images, labels):
        given.append(labels)
        return made(of, now, images, labels)

    made = inputs.step_inputs
    monkeypatch.setattr(inputs, "step_inputs", step_inputs)
    config = configuration("digits", {"network.widths": [8, 8, 8], "data.cond": True})
    of = baseline_benchmark.task(config, ImageDataset(digits))
    baseline_benchmark.cycle_of_steps(of, baseline_benchmark.moments_of_stages(of)[0][:1], ImageDataset(digits))()
    (labels,) = given
    assert labels.tolist() == ImageDataset(digits).labels[:32].tolist()


@pytest.mark.slow
def test_a_baseline_is_trained_scored_and_shown_once(digits, tmp_path, monkeypatch):
    tiny = ["--set=network.widths=[8,8,8]"]
    configured = baseline_benchmark.configuration
    monkeypatch.setattr(
        baseline_benchmark,
        "configuration",
        lambda name, values: configured(name, {"network.widths": [8, 8, 8], **values}),
    )
    called = training.call
    commands = []

    def call_of(command, ranks):
        commands.append(command)
        return called(command + tiny * ("--preset=digits" in command), ranks)

    monkeypatch.setattr(training, "call", call_of)
    monkeypatch.setattr(baseline_benchmark, "equal_time", lambda *of: {
        "seconds": 1.0, "clock": "CPU time", "gan": {"kimg": 0.64}, "vae": {"kimg": 0.96}
    })  # fmt: skip
    monkeypatch.setattr(likelihood_estimates, "QUICK_IMAGES", 20)
    flags = [f"--data={digits}", f"--outdir={tmp_path}", "--kimg=0.64", "--samples=200", f"--json={tmp_path}/r.json"]
    first = call(baseline_benchmark.main, *flags)
    monkeypatch.setattr(baseline_benchmark, "score_all", lambda *of: pytest.fail("they are kept"))
    with pytest.raises(pytest.fail.Exception, match="they are kept"):
        call(baseline_benchmark.main, *flags, "--seed=1")  # other networks have other scores
    again = call(baseline_benchmark.main, *flags)
    assert again.splitlines() == [line for line in first.splitlines() if not line.startswith("training a classifier")]
    found = json.loads((tmp_path / "r.json").read_text())
    by_name = {line[""]: line for line in found["rows"]}
    assert by_name["GAN"]["log p(x) >="] is None and np.isfinite(by_name["VAE"]["log p(x) >="])
    assert (by_name["GAN"]["kimg"], by_name["VAE"]["kimg"]) == (0.64, 0.96)
    page = (tmp_path / "baseline.html").read_text()
    assert page.count("data:image/png;base64,") == 4 and "http" not in page
    assert "--set=network.widths=[8, 8, 8]" in commands[1]


@pytest.mark.slow
def test_posteriors_are_trained_and_compared(digits, tmp_path):
    flags = [f"--data={digits}", f"--test={digits}", f"--outdir={tmp_path}", "--kimg=0.4", "--rows=vae,implicit"]
    sizes = ["--draws=20", "--images=12", "--compared=3"]
    call(posteriors_benchmark.main, *flags, *sizes, f"--json={tmp_path}/r.json")
    vae, implicit = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert vae["above vae"] == 0 and np.isfinite(vae["nats"]) and np.isfinite(vae["jackknife, few"])
    assert implicit["nats"] is None and np.isfinite(implicit["ais, few"])
    with pytest.raises(UserError, match="--rows=vea is unknown; known: vae, iwae-5"):
        call(posteriors_benchmark.main, *flags[:3], "--rows=vea")
