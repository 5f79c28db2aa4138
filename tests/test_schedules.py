"""Schedules as tables: what holds at which point of the clock."""

import math

import numpy as np
import pytest

from gan.config import RegularizerConfig, TrainConfig, override
from gan.errors import UserError
from gan.schedules import build_schedule, ema_beta, learning_rate, linear_decay, moment, penalty_turns


def schedule(last=2, **values):
    defaults = {"batch": 10, "distributed.group": 5, "run.kimg": 1.0, "growth.shares": [0.2, 0.3, 0.5]}
    named = {k.replace("__", "."): v for k, v in values.items()}
    return build_schedule(override(TrainConfig(), defaults | {"growth.fade": 0.5} | named), last)


@pytest.mark.parametrize(
    "seen,stage,alpha",
    [
        (0, 0, 1.0),
        (190, 0, 1.0),
        (200, 1, 10 / 160),  # the fade of 150 images has 15 steps below 1, and the 16th is whole
        (270, 1, 80 / 160),
        (340, 1, 150 / 160),
        (350, 1, 1.0),
        (490, 1, 1.0),
        (500, 2, 10 / 260),
        (740, 2, 250 / 260),
        (750, 2, 1.0),
        (990, 2, 1.0),
    ],
)
def test_growth(seen, stage, alpha):
    now = moment(schedule(), seen)
    assert (now.stage, now.alpha, now.fading) == (stage, pytest.approx(alpha), alpha < 1)
    assert now.step == seen // 10


def test_alpha_rises_by_equal_steps_from_stage_to_stage():
    s = schedule()
    for before, after in zip(range(500, 740, 10), range(510, 750, 10), strict=True):
        assert moment(s, after).alpha - moment(s, before).alpha == pytest.approx(10 / 260)


def test_stages_begin_on_step_boundaries_for_any_batch():
    for batch in (4, 12, 52, 100):
        s = schedule(batch=batch, distributed__group=4, run__kimg=3.0)
        assert all(stage.start % batch == 0 and stage.fade % batch == 0 for stage in s.stages)
        assert s.total % batch == 0 and s.total >= 3000


def test_a_run_ends_with_the_step_that_its_length_names():
    assert (
        schedule(batch=32, distributed__group=4, run__kimg=64.224).total == 64224
    )  # 1000 * 64.224 is 64224.00000000001


def test_growth_in_kimg_does_not_move_with_the_length_of_the_run():
    short, long = (
        schedule(growth__shares=[], growth__kimg=[0.1, 0.2], growth__fade_kimg=0.05, run__kimg=k) for k in (1.0, 2.0)
    )
    assert short.stages == long.stages
    assert [(s.start, s.fade) for s in short.stages] == [(0, 0), (100, 50), (300, 50)]


def test_no_fade_is_no_step_of_it():
    s = schedule(growth__fade=0.0)
    assert [x.fade for x in s.stages] == [0, 0, 0]
    assert all(moment(s, i).alpha == 1 for i in range(0, 1000, 10))


def test_growth_none_is_one_stage():
    s = schedule(growth__mode="none", growth__shares=[])
    assert [(x.index, x.start, x.fade) for x in s.stages] == [(2, 0, 0)]


@pytest.mark.parametrize(
    "values,message",
    [
        ({"growth__shares": [1.0, 1.0]}, "2 values but there are 3 stages"),
        ({"growth__shares": [], "growth__kimg": [1.0]}, "1 values but 2 stages precede the last"),
        ({"growth__shares": [], "growth__kimg": [0.5, 0.5], "growth__fade_kimg": 0.1}, "raise run.kimg"),
        ({"growth__shares": [], "growth__kimg": [0.1, 0.1], "growth__fade_kimg": 0.2}, "longer than a stage"),
        ({"run__kimg": 0.02}, "too short for 3 stages"),
    ],
)
def test_a_run_that_cannot_reach_its_last_stage_is_refused(values, message):
    with pytest.raises(UserError, match=message):
        schedule(**values)


def test_linear_decay():
    assert [linear_decay(i, 50, 100, 0.1) for i in (0, 50, 75, 100, 200)] == pytest.approx([1, 1, 0.55, 0.1, 0.1])
    assert linear_decay(10**9, 0, 0, 1.0) == 1


def test_learning_rate_follows_the_clock():
    s = schedule(optimizer__decay_from=0.5, optimizer__decay_to=0.1)
    assert [moment(s, i).lr_scale for i in (0, 500, 750)] == pytest.approx([1, 1, 0.55])


def test_the_half_life_of_the_average():
    assert ema_beta(1000, since=10**9, half_life=1000, rampup=0.05) == pytest.approx(0.5)
    assert ema_beta(10, since=1000, half_life=1000, rampup=0.05) == pytest.approx(0.5 ** (10 / 50))
    assert ema_beta(10, since=0, half_life=1000, rampup=0.05) == 0
    assert math.prod(ema_beta(10, 10**9, 1000, 0.05) for _ in range(100)) == pytest.approx(0.5)


def test_blocks_take_turns_that_are_equally_frequent_and_spread_over_the_batch():
    for blocks in range(1, 20):
        for chosen in range(1, blocks + 1):
            turns = penalty_turns(RegularizerConfig(every=3, share=chosen / blocks), 4 * blocks, 4)
            table = np.array([[turns.due(3 * turn, block) for block in range(blocks)] for turn in range(blocks)])
            assert (table.sum(0) == chosen).all() and (table.sum(1) == chosen).all()
            for first in range(blocks):  # any stretch of blocks has its share, to less than one
                stretches = table[:, first:].cumsum(1)
                assert (abs(stretches - chosen / blocks * np.arange(1, blocks - first + 1)) < 1).all()
            assert not any(turns.due(step, block) for step in (1, 2, 4) for block in range(blocks))
            assert turns.weight == pytest.approx(3 * blocks / chosen)


@pytest.mark.parametrize("widths,expected", [((64, 64), 0.01), ((256, 128, 64), 0.005), ((1,), 0.08)])
def test_an_automatic_learning_rate_falls_with_the_root_of_the_width(widths, expected):
    assert learning_rate("auto", widths) == pytest.approx(expected)
    assert learning_rate(0.001, widths) == 0.001
