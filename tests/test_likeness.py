"""The figures by which a run sees its generator collapse, and when it says so."""

from dataclasses import replace
from itertools import islice

import pytest
import torch
from tiny import one_thread as one_thread
from tiny import tiny_config, tiny_feed, tiny_images, tiny_task

from gan.metrics.diversity import diversity, sums
from gan.run.likeness import FAKES, LEAST_SPREAD, MOST_COHERENCE, REALS, REPEAT, Likeness
from gan.run.loop import steps
from gan.sampling import generate, seed_latents, to_uint8
from gan.schedules import moment
from gan.state import initial_state


def likeness(**values):
    task = tiny_task(tiny_config({key.replace("_", "."): value for key, value in values.items()}))
    return Likeness(task, tiny_feed), initial_state(task), task


@pytest.mark.parametrize("cond", [False, True])
def test_figures_are_those_of_fixed_latents_and_of_the_first_reals(cond):
    watch, state, task = likeness(data_cond=cond)
    now = list(steps(task, 0))[-1]
    found = watch.tick(state, now)
    images, labels = tiny_images(0, REALS, now.stage)
    groups = torch.from_numpy(labels) if cond else torch.zeros(REALS).long()
    reals = diversity(sums(torch.from_numpy(images), groups, 3))
    G = state.networks["G_ema"]
    asked = torch.arange(FAKES) % 3 if cond else None
    pictures = to_uint8(generate(G, seed_latents(range(FAKES), G.z_dim), asked, stage=now.stage, alpha=1.0))
    fakes = diversity(sums(torch.from_numpy(pictures), torch.zeros(FAKES).long() if asked is None else asked, 3))
    expected = [fakes.coherence, reals.coherence, fakes.spread, reals.spread]
    assert list(found.values()) == pytest.approx(expected, abs=1e-4)  # pixels may round the other way


def test_a_generator_that_ignores_its_latents_is_warned_of():
    watch, state, task = likeness()
    with torch.no_grad():
        state.networks["G_ema"].first.weight.zero_()
    last = moment(task.schedule, task.schedule.total - task.config.batch)
    found = watch.tick(state, last)
    assert found["Diversity/spread"] == 0
    assert found["Diversity/coherence"] == pytest.approx(1, abs=1e-6)
    (warning,) = watch.warnings(found, last)
    assert "too much alike" in warning and "coherence 1.00" in warning


def figures(coherence: float, spread: float) -> dict[str, float]:
    return dict(zip(("coherence", "of reals", "spread", "of reals "), (coherence, 0.1, spread, 0.5), strict=True))


def test_a_warning_is_repeated_seldom_and_given_anew_after_a_recovery():
    watch, _, task = likeness()
    end = moment(task.schedule, task.schedule.total - task.config.batch)
    early = moment(task.schedule, 0)
    fading = replace(end, alpha=0.5)
    good = figures(0.99 * MOST_COHERENCE * 0.1, 1.01 * LEAST_SPREAD * 0.5)
    coherent = figures(1.01 * MOST_COHERENCE * 0.1, 0.5)
    narrow = figures(0.1, 0.99 * LEAST_SPREAD * 0.5)
    assert not list(watch.warnings(good, end))
    assert not list(watch.warnings(coherent, early))  # too early to tell
    assert not list(watch.warnings(coherent, fading))
    assert [len(list(watch.warnings(coherent, end))) for _ in range(REPEAT + 1)] == [1] + [0] * (REPEAT - 1) + [1]
    assert not list(watch.warnings(good, end))
    assert list(watch.warnings(narrow, end))


def test_reals_are_read_once_per_stage():
    watch, state, task = likeness()
    asked = []

    def counted(requests):
        for first, count, stage in requests:
            asked.append((first, count, stage))
            yield tiny_images(first, count, stage)

    watch.feed = counted
    for now in islice(steps(task, 0), 3):
        watch.tick(state, now)
    assert sum(count for _, count, _ in asked) == REALS
