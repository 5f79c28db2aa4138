"""Precedence, types and names of the configuration."""

import math
from dataclasses import asdict, fields

import pytest

from gan.config import TrainConfig, flatten, from_dict, override, parse_assignment, settings, trajectory
from gan.errors import UserError


def test_overrides_reach_every_section_and_leave_the_rest():
    config = override(TrainConfig(), {"batch": 64, "regularizer.gamma": 3, "network.widths": [8, 4]})
    assert (config.batch, config.regularizer.gamma, config.network.widths) == (64, 3.0, (8, 4))
    assert isinstance(config.regularizer.gamma, float)
    assert config.optimizer == TrainConfig().optimizer


def test_every_key_survives_the_way_through_a_file():
    config = override(TrainConfig(), {"network.filter": [1, 1], "optimizer.betas": [0.5, 0.9], "data.cond": True})
    assert from_dict(asdict(config)) == config
    assert settings().keys() == flatten(asdict(config)).keys()


@pytest.mark.parametrize(
    "text,expected",
    [
        ("a.b=4", ("a.b", 4)),
        ("a=0.5", ("a", 0.5)),
        ("a=true", ("a", True)),
        ("a=[1, 2]", ("a", [1, 2])),
        ("a=r1", ("a", "r1")),
        ("a=x=y", ("a", "x=y")),
        ("a=", ("a", "")),
        ("run.desc=1e5", ("run.desc", "1e5")),  # where a word is wanted, it stays as it was written
        ("run.cache=1", ("run.cache", "1")),
        ('run.desc="1e5"', ("run.desc", "1e5")),
        ("seed=1#2", ("seed", "1#2")),  # and nothing is dropped
        ("seed=1\nbatch=2", ("seed", "1\nbatch=2")),
        pytest.param("a=" + "[" * 9999, ("a", "[" * 9999), id="deep"),
    ],
)
def test_assignments_are_read_as_toml_or_text(text, expected):
    assert parse_assignment(text) == expected


def test_tuples_may_be_written_with_commas():
    assert override(TrainConfig(), {"network.widths": "16,8"}).network.widths == (16, 8)
    assert override(TrainConfig(), {"network.widths": "16"}).network.widths == (16,)


@pytest.mark.parametrize(
    "values,message",
    [
        ({"regularizer.gama": 1}, "did you mean regularizer.gamma"),
        ({"optimiser.g_lr": 1}, "did you mean optimizer.g_lr"),
        ({"zzz": 1}, "known: batch"),
        ({"batch": 30}, "not a multiple of the coupling group of 4.*try batch=32"),
        ({"batch": 2}, "try batch=4"),
        ({"batch": 0}, "batch=0 must be at least 1"),
        ({"batch": "many"}, "wants int"),
        ({"batch": 1.5}, "wants int"),
        ({"data.cond": 2}, "wants bool"),
        ({"optimizer.betas": [0.5]}, "wants 2 values"),
        ({"run.kimg": 0}, "run.kimg=0.0 must be positive"),
        ({"run.kimg": math.inf}, "run.kimg=inf must be positive and at most 1e.09"),
        ({"run.max_skipped": 0}, "run.max_skipped=0 must be at least 1"),
        ({"run.workers": -1}, "run.workers=-1 must be at least 0 and at most 64"),
        ({"optimizer.d_lr": math.nan}, "optimizer.d_lr=nan must be positive"),
        ({"optimizer.betas": [2.0, 0.9]}, "optimizer.betas=2.0 must be at least 0 and at most 1"),
        ({"network.filter": [0]}, "network.filter .* sum must not be 0"),
        ({"network.filter": []}, "network.filter"),
        ({"network.filter": [1e308, 1e308]}, "network.filter .* of at most 1e.30"),
        ({"network.z_dim": 0}, "network.z_dim=0 must be at least 1"),
        ({"run.desc": "a/b"}, "leave out slashes"),
        ({"seed": 2**64}, "seed=.* must be"),
        ({"regularizer.gamma": -1}, "regularizer.gamma=-1.0 must be at least 0"),
        ({"regularizer.every": 0}, "regularizer.every=0 must be at least 1"),
        ({"regularizer.share": 0}, "regularizer.share=0.0 must be positive and at most 1"),
        ({"regularizer.share": 1.5}, "regularizer.share=1.5 must be positive and at most 1"),
        ({"growth.mode": "progresive"}, "did you mean progressive"),
        ({"precision.dtype": "float16"}, "unknown"),
        ({"distributed.group": 0}, "distributed.group=0 must be at least 1"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"distributed.micro": -4}, "distributed.micro=-4 must be at least 0"),
        ({"distributed.compress": "fp8"}, "distributed.compress=fp8 is unknown"),
        ({"distributed.exact": 1, "distributed.compress": "bf16"}, "distributed.exact works neither with"),
        ({"distributed.exact": 1, "distributed.micro": 8}, "distributed.exact works neither with"),
        ({"distributed.exact": 1, "distributed.micro": "auto"}, "distributed.exact works neither with"),
        ({"distributed.micro": "most"}, "distributed.micro=most is unknown; .*auto; or give a number"),
        ({"distributed.micro": 1.5}, "wants int"),
        ({"network.recompute": -1}, "network.recompute=-1 must be at least 0"),
        ({"network.widths": [1 << 40]}, "network.widths=1099511627776 must be at least 1 and at most 65536"),
        ({"run.cache": []}, r"run.cache: wants str, got \[\]"),
        ({"run.desc": True}, "run.desc: wants str, got True"),
        ({"run.milestone": -1}, "run.milestone=-1.0 must be at least 0"),
        ({"growth.shares": [1, 1], "growth.kimg": [1]}, "were both given"),
    ],
)
def test_bad_values_are_answered_in_one_line(values, message):
    with pytest.raises(UserError, match=message) as caught:
        override(TrainConfig(), values)
    assert "\n" not in str(caught.value)


def test_a_list_that_is_none_says_how_to_write_one():
    with pytest.raises(UserError, match=r"growth.shares=\[.5,.5\] is no list; write it like \[0.5, 1\]"):
        parse_assignment("growth.shares=[.5,.5]")
    assert parse_assignment("run.desc=[x") == ("run.desc", "[x")


def test_a_number_of_thousands_of_digits_is_refused_as_any_word_is():
    key, value = parse_assignment("seed=" + "1" * 5000)
    with pytest.raises(UserError, match="seed: wants int, got"):
        override(TrainConfig(), {key: value})


def test_an_assignment_without_a_value_says_how_to_write_one():
    with pytest.raises(UserError, match="KEY=VALUE"):
        parse_assignment("regularizer.gamma")


def test_how_a_run_is_watched_is_no_part_of_its_trajectory():
    config = TrainConfig()
    for name in (f.name for f in fields(config.run)):
        assert f"run.{name}" in settings()
    watched = override(config, {"run.tick": 1.0, "run.snap": 3, "run.keep": 9, "run.threads": 3, "run.desc": "x"})
    assert trajectory(watched) == trajectory(config) == trajectory(override(config, {"distributed.micro": 8}))
    saving = {"distributed.micro": "auto", "network.recompute": 2}
    assert trajectory(config) == trajectory(override(config, saving))
    assert override(config, {"distributed.micro": "8"}).distributed.micro == 8
    assert trajectory(override(config, {"seed": 1})) != trajectory(config)
