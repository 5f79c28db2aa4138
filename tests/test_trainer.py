"""The step and its state: what saving, stopping and watching do not change, and what non-finite values do."""

import ast
import copy
import inspect
import itertools
import json
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from devices import DEVICES
from tiny import broken_generator_loss, one_thread, tiny_config, tiny_feed, tiny_task  # noqa: F401 - a fixture
from torch.nn.functional import softplus

from gan.average import update_averages
from gan.checkpoint import load_snapshot, load_state, newest_state, save_snapshot, save_state
from gan.draws import Draws
from gan.inputs import step_inputs
from gan.methods.augment import adapt, augment, augment_some
from gan.parts import fade_weight, prepare_reals
from gan.ranks.distributed import Ranks, find_strangers, fingerprint
from gan.ranks.statistics import Statistics
from gan.run import loop, report
from gan.schedules import ema_beta, moment
from gan.state import initial_state
from gan.trainer import train_step
from gan.undo import frozen, undo_step, with_equal_buffers


def advance(state, task, count: int, poison: range = range(0)) -> list[dict]:
    """`count` steps from where the state is; images of the steps in `poison` are not finite."""
    losses = []
    for now in list(loop.steps(task, state.images_seen))[:count]:
        images, labels = loop.to_device(next(tiny_feed(iter([(*task.samples(now.images_seen), now.stage)]))), task)
        if now.step in poison:
            images = torch.full(images.shape, math.nan, device=images.device)
        stats = Statistics()
        train_step(state, task, now, step_inputs(task, now, images, labels), stats)
        losses.append(stats.take())
    return losses


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


PAIR = {"objective.name": "relativistic", "regularizer.name": "r1_r2", "data.cond": 1, "data.mirror": 1}
POSTHOC = {"ema.posthoc": [0.05, 0.1]}
ADA = {"data.aug": "ada", "data.aug_kimg": 1, "data.aug_target": 0.2}  # a step moves the strength by .032


# Stage 1 is steps 6-14 and fades until 9, stage 2 is steps 15-29 and fades until 20; the penalty is due every third.
@pytest.mark.parametrize(
    "values",
    [{}, PAIR, {"regularizer.name": "spectral_norm"}, PAIR | {"regularizer.share": 0.25}, ADA | POSTHOC],
    ids=["r1", "pair", "spectral", "share", "ada"],
)
def test_stopped_after_any_step_and_resumed_is_bit_equal(values, tmp_path):
    task = tiny_task(tiny_config({"regularizer.every": 3, **values}))
    whole, resumed = initial_state(task), initial_state(task)
    advance(whole, task, 22)
    for _ in range(22):
        advance(resumed, task, 1)
        save_state(tmp_path, resumed.images_seen, resumed.tensors(), {}, keep=1)
        tensors, about = load_state(newest_state(tmp_path)[0])
        resumed = initial_state(task)
        with torch.no_grad():
            for p in itertools.chain(*(network.parameters() for network in resumed.networks.values())):
                p.zero_()
        resumed.load_tensors(tensors, about["images_seen"])
    assert resumed.images_seen == whole.images_seen == 22 * 32
    assert equal(resumed.tensors(), whole.tensors())


def test_a_state_saved_before_there_was_a_strength_of_augmentation_still_loads():
    task = tiny_task(tiny_config({"data.aug": "diff"}))
    state = initial_state(task)
    advance(state, task, 2)
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    older = {name: tensor for name, tensor in before.items() if name != "augmentation"}
    restored = initial_state(task)
    restored.load_tensors(older, state.images_seen)
    assert equal(restored.tensors(), before) and len(older) == len(before) - 1


@pytest.mark.parametrize("values", [{}, {"regularizer.name": "none", "distributed.micro": 8}, {"distributed.exact": 1}])
def test_the_strength_of_augmentation_follows_the_verdicts_of_every_d_step(values):
    task = tiny_task(tiny_config({**ADA, "optimizer.n_critic": 2, **values}))
    state = initial_state(task)
    alone = torch.zeros(2)
    for loss in advance(state, task, 25):
        adapt(alone, torch.tensor(loss["Loss/signs/real"]), task.config)
    torch.testing.assert_close(state.augmentation, alone)
    assert 0 < alone[0] < 0.8


def test_networks_start_from_the_seed():
    starts = [initial_state(tiny_task(tiny_config({"seed": seed}))).tensors() for seed in (0, 0, 1)]
    assert equal(starts[0], starts[1])
    for net in ("G", "D"):
        name = f"{net}/blocks.0.conv.weight"
        assert not torch.equal(starts[0][name], starts[2][name])


@pytest.mark.parametrize("world", [2, 3, 5, 8])
def test_any_number_of_ranks_asks_for_the_same_samples_and_draws(world):
    config = tiny_config({"data.mirror": 1})
    alone, ranks = tiny_task(config), [tiny_task(config, Ranks(rank, world)) for rank in range(world)]
    for seen in (0, 5 * 32, 15 * 32, 28 * 32):
        wanted = [i for first, count in (task.samples(seen) for task in ranks) for i in range(first, first + count)]
        assert wanted == list(range(seen, seen + 32))
        for draw in (lambda d: d.latents("a", 5), lambda d: d.coins("b"), lambda d: d.noise("c", torch.ones(1, 2, 2))):
            assert torch.equal(torch.cat([draw(task.draws(seen)) for task in ranks]), draw(alone.draws(seen)))


def test_saving_and_reporting_do_not_change_the_trajectory(tmp_path):
    weights = []
    for name, values in {"quiet": {"run.tick": 100.0}, "loud": {"run.tick": 32 / 1000, "run.snap": 1}}.items():
        (tmp_path / name).mkdir()
        task = tiny_task(tiny_config({"run.kimg": 32 * 12 / 1000, **values}))
        state = initial_state(task)
        assert loop.train(state, task, tiny_feed, tmp_path / name, {}) == 0
        weights.append(state.tensors())
    assert equal(*weights)


def test_a_run_leaves_what_it_should(tmp_path):
    task = tiny_task(tiny_config())
    state = initial_state(task)
    assert loop.train(state, task, tiny_feed, tmp_path, {"threads": 1}) == 0
    names = {p.name for p in tmp_path.iterdir()}
    assert {"reals.png", "fakes_init.png", "log.txt", "stats.jsonl", "exit.json"} <= names
    assert {"fakes0000000960.png", "network-snapshot-0000000960.safetensors", "training-state-0000000960"} <= names
    assert len([n for n in names if n.startswith("training-state-")]) == 2  # run.keep
    assert not [n for n in names if ".part" in n]
    assert json.loads((tmp_path / "exit.json").read_text()) == {"code": 0, "reason": "finished", "images_seen": 960}
    lines = [json.loads(line) for line in (tmp_path / "stats.jsonl").read_text().splitlines()]
    assert [line["images_seen"] for line in lines] == [320, 640, 960]
    assert all(math.isfinite(line[k]) for line in lines for k in ("Loss/D/loss", "Loss/G/loss", "Loss/r1_penalty"))
    assert [line["Progress/augmentation"] for line in lines] == [0, 0, 0]

    snapshot = load_snapshot(tmp_path / "network-snapshot-0000000960.safetensors")
    assert (snapshot.stage, snapshot.alpha, snapshot.images_seen) == (2, 1.0, 960)
    fading = load_snapshot(tmp_path / "network-snapshot-0000000320.safetensors")
    assert (fading.stage, fading.alpha, fading.images_seen) == (1, 0.8, 320)
    z = torch.randn(3, 16)
    assert torch.equal(snapshot.G(z, 2), state.networks["G_ema"](z, 2))


def test_a_snapshot_keeps_every_bit_of_float64(tmp_path):
    task = tiny_task(tiny_config({"precision.dtype": "float64"}))
    G = initial_state(task).networks["G_ema"]
    for parameter in G.parameters():
        parameter.mul_(1 + 1e-12)
    save_snapshot(tmp_path / "a.safetensors", G, asdict(task.config), task.images, stage=1, alpha=0.25, images_seen=32)
    snapshot = load_snapshot(tmp_path / "a.safetensors")
    assert (snapshot.stage, snapshot.alpha, snapshot.images_seen) == (1, 0.25, 32)
    assert equal(snapshot.G.state_dict(), G.state_dict())


def test_statistics_are_means_of_what_was_added():
    stats = Statistics()
    stats.add({"a": torch.tensor([1.0, 2.0])})
    stats.add({"a": torch.tensor([6.0]), "b": torch.tensor(4.0)})
    assert stats.take() == {"a": 3.0, "b": 4.0} and stats.take() == {}


def images_of_the_first_step(task, G) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Reals and fakes of D's update, and fakes of G's."""
    real = torch.from_numpy(next(tiny_feed(iter([(0, 32, 0)])))[0]).permute(0, 3, 1, 2).double() / 127.5 - 1
    d_fake, g_fake = (G(task.draws(0).latents(f"latents of the {net} step", 16).double(), 0) for net in "DG")
    return real, d_fake, g_fake


def test_the_first_step_reports_and_descends_the_losses_of_the_objective_with_half_of_gamma():
    task = tiny_task(tiny_config({"precision.dtype": "float64", "regularizer.gamma": 3.0}))
    state = initial_state(task)
    G, D = (copy.deepcopy(state.networks[name]) for name in "GD")
    (reported,) = advance(state, task, 1)
    real, d_fake, g_fake = images_of_the_first_step(task, G)
    real.requires_grad_()
    for_real, for_fake = D(real, 0), D(d_fake, 0)
    expected = {
        "Loss/scores/real": for_real,
        "Loss/scores/fake": for_fake,
        "Loss/signs/real": for_real.sign(),
        "Loss/signs/fake": for_fake.sign(),
        "Loss/D/loss": softplus(-for_real) + softplus(for_fake),
        "Loss/r1_penalty": torch.autograd.grad(for_real.sum(), real, create_graph=True)[0].square().flatten(1).sum(1),
        "Loss/G/loss": softplus(-state.networks["D"](g_fake, 0)),  # shown to D after its update
    }
    assert reported == pytest.approx({name: values.mean().item() for name, values in expected.items()}, rel=1e-6)
    assert all(abs(reported[name]) < 1 for name in ("Loss/signs/real", "Loss/signs/fake"))  # of both kinds
    total = expected["Loss/D/loss"].mean() + 3.0 / 2 * 2 * expected["Loss/r1_penalty"].mean()  # due every other step
    ours = {name: p.grad for name, p in state.networks["D"].named_parameters() if p.grad is not None}
    wanted = torch.autograd.grad(total, [D.get_parameter(name) for name in ours])
    for name, gradient in zip(ours, wanted, strict=True):
        torch.testing.assert_close(ours[name], gradient, msg=name)


def d_gradient(state) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in state.networks["D"].parameters() if p.grad is not None])


# 32 samples are 8 groups; at turn t those groups get a penalty whose number is a multiple of 4 less t.
@pytest.mark.parametrize("turn,groups", [(0, (0, 4)), (1, (3, 7)), (2, (2, 6)), (3, (1, 5)), (4, (0, 4))])
@pytest.mark.parametrize("every", [1, 3])
def test_a_share_of_the_batch_gets_a_penalty_of_so_many_times_the_weight(turn, groups, every):
    """Against autograd on a whole batch, with the minibatch standard deviation that couples samples of a group."""
    values = {"precision.dtype": "float64", "regularizer.gamma": 3.0, "regularizer.every": every}
    task = tiny_task(tiny_config(values | {"regularizer.share": 0.25, "growth.mode": "none"}))
    state = initial_state(task)
    G, D = (copy.deepcopy(state.networks[name]) for name in "GD")
    state.images_seen = seen = 32 * every * turn
    (reported,) = advance(state, task, 1)

    images, _ = loop.to_device(next(tiny_feed(iter([(seen, 32, 2)]))), task)
    real = prepare_reals(images, None, 1.0, G).requires_grad_()
    fake = G(task.draws(seen).latents("latents of the D step", 16), 2).detach()
    scores = D(real, 2)
    (slope,) = torch.autograd.grad(scores.sum(), real, create_graph=True)
    penalties = slope.square().flatten(1).sum(1).view(8, 4)[list(groups)]
    loss = (softplus(-scores) + softplus(D(fake, 2))).mean() + 3.0 / 2 * every * 4 * penalties.sum() / 32
    loss.backward()
    wanted = d_gradient(replace(state, networks={"D": D}))
    assert (d_gradient(state) - wanted).norm() < 1e-12 * wanted.norm()
    assert reported["Loss/r1_penalty"] == pytest.approx(penalties.mean().item(), rel=1e-12)


@pytest.mark.parametrize("values", [{}, {"regularizer.name": "wgan_gp"}, PAIR, {"distributed.exact": True}])
def test_over_a_whole_rotation_a_share_has_the_gradient_of_the_whole_batch(values):
    """At the same weights and the same samples. Three of eight groups come round after eight turns."""

    def gradient(step: int, share: float) -> torch.Tensor:
        task = tiny_task(tiny_config({"precision.dtype": "float64", "regularizer.share": share, **values}))
        state = initial_state(task)
        images, labels = loop.to_device(next(tiny_feed(iter([(0, 32, 0)]))), task)
        now = replace(moment(task.schedule, 0), step=step)
        train_step(state, task, now, step_inputs(task, now, images, labels), Statistics())
        return d_gradient(state)

    whole = gradient(0, 1.0)
    shares = [gradient(step, 0.375) for step in range(0, 16, 2)]  # due at every other step
    assert (torch.stack(shares).mean(0) - whole).norm() < 1e-12 * whole.norm()
    assert all((share - whole).norm() > 1e-4 * whole.norm() for share in shares)


def test_only_the_share_of_the_images_that_gets_a_penalty_requires_grad():
    task = tiny_task(tiny_config({"regularizer.share": 0.25}))
    state = initial_state(task)
    seen = {True: 0, False: 0}

    def count(_, given):
        seen[given[0].requires_grad] += len(given[0])

    state.networks["D"].register_forward_pre_hook(count)
    advance(state, task, 1)
    assert seen == {True: 8 + 32, False: 24 + 32}  # reals of the D step and fakes of the G step, and the others


def noisy(images: torch.Tensor, draws: Draws, purpose: str) -> torch.Tensor:
    return images + 0.5 * draws.noise(f"instance noise: {purpose}", images)


def half_augmented(images: torch.Tensor, draws: Draws, purpose: str) -> torch.Tensor:
    return augment_some(images, draws, purpose, False, 0.5)


@pytest.mark.parametrize(
    "values,changed",
    [
        ({"data.aug": "diff"}, augment),
        ({"data.aug": "ada", "data.aug_kimg": 1e9}, half_augmented),
        ({"regularizer.name": "instance_noise", "regularizer.gamma": 0.25}, noisy),  # its variance
    ],
    ids=["diff", "ada", "noise"],
)
def test_d_sees_reals_and_fakes_of_both_steps_augmented_or_noisy(values, changed):
    task = tiny_task(tiny_config({"precision.dtype": "float64", **values}))
    state = initial_state(task)
    state.augmentation[0] = 0.5
    G, D = (copy.deepcopy(state.networks[name]) for name in "GD")
    (reported,) = advance(state, task, 1)
    real, d_fake, g_fake = images_of_the_first_step(task, G)
    draws = task.draws(0)
    scores = D(changed(real, draws, "reals of the D step"), 0), D(changed(d_fake, draws, "fakes of the D step"), 0)
    g_loss = softplus(-state.networks["D"](changed(g_fake, draws, "fakes of the G step"), 0))
    assert reported["Loss/scores/real"] == pytest.approx(scores[0].mean().item(), rel=1e-9)
    assert reported["Loss/scores/fake"] == pytest.approx(scores[1].mean().item(), rel=1e-9)
    assert reported["Loss/G/loss"] == pytest.approx(g_loss.mean().item(), rel=1e-9)


def test_clipping_keeps_the_weights_of_d_in_bounds_after_every_step():
    task = tiny_task(tiny_config({"regularizer.name": "clip", "regularizer.gamma": 0.05}))
    state = initial_state(task)
    for _ in range(3):
        advance(state, task, 1)
        layers = [module for module in state.networks["D"].modules() if hasattr(module, "weight")]
        assert layers and all((layer.weight * getattr(layer, "scale", 1)).abs().max() <= 0.0500001 for layer in layers)
    assert max(p.abs().max() for p in state.networks["G"].parameters()) > 1


def test_the_regularizer_is_due_every_other_step_and_weighs_as_much():
    task = tiny_task(tiny_config())
    assert ["Loss/r1_penalty" in loss for loss in advance(initial_state(task), task, 4)] == [True, False, True, False]

    # One lazy step has the gradient of loss + every * gamma / 2 * penalty.
    grads = []
    for values in (
        {"regularizer.every": 2, "regularizer.gamma": 3.0},
        {"regularizer.every": 1, "regularizer.gamma": 6.0},
    ):
        task = tiny_task(tiny_config(values))
        state = initial_state(task)
        advance(state, task, 1)
        grads.append(torch.cat([p.grad.flatten() for p in state.networks["D"].parameters() if p.grad is not None]))
    torch.testing.assert_close(*grads)


def test_learning_rates_of_both_networks_decay_with_the_schedule():
    task = tiny_task(tiny_config({"optimizer.decay_from": 0.0, "optimizer.decay_to": 0.4, "optimizer.d_lr": 0.01}))
    state = initial_state(task)
    advance(state, task, 16)
    now = moment(task.schedule, 15 * 32)
    assert now.lr_scale == pytest.approx(0.7)
    assert state.optimizers["g_optimizer"].param_groups[0]["lr"].item() == pytest.approx(0.005 * 0.7)
    assert state.optimizers["d_optimizer"].param_groups[0]["lr"].item() == pytest.approx(0.01 * 0.7)


def test_n_critic_counts_d_updates_per_g_update():
    task = tiny_task(tiny_config({"optimizer.n_critic": 3}))
    state = initial_state(task)
    assert ["Loss/G/loss" in loss for loss in advance(state, task, 7)] == [False, False, True] * 2 + [False]
    steps = {int(s["step"]) for s in state.optimizers["g_optimizer"].state.values()}
    assert max(steps) == 2 and max(int(s["step"]) for s in state.optimizers["d_optimizer"].state.values()) == 7


def test_parameters_of_later_stages_keep_their_own_step_count():
    task = tiny_task(tiny_config())
    state = initial_state(task)
    advance(state, task, 20)
    counts = {
        n: int(state.optimizers["g_optimizer"].state[p]["step"]) for n, p in state.networks["G"].named_parameters()
    }
    assert (
        counts["first.weight"] == 20 and counts["blocks.1.conv0.weight"] == 14 and counts["blocks.2.conv0.weight"] == 5
    )
    assert counts["to_image.0.weight"] == 6 + 4  # its own stage, and the steps that fade it out
    assert counts["to_image.1.weight"] == 9 + 5


def test_the_first_step_is_adams():
    """beta1 = 0 and bias correction: the first update is lr * g / (|g| + eps), whatever the gradient's size."""
    task = tiny_task(tiny_config({"precision.dtype": "float64"}))
    state = initial_state(task)
    before = {n: p.detach().clone() for n, p in state.networks["D"].named_parameters()}
    advance(state, task, 1)
    for name, p in state.networks["D"].named_parameters():
        if p.grad is not None:
            expected = before[name] - 0.005 * p.grad / (p.grad.abs() + 1e-8)
            torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "how",
    [{}, {"distributed.micro": 8}, {"distributed.exact": 1}, ADA | POSTHOC | {"data.aug_target": -0.9}],
    ids=["whole", "micro", "exact", "ada"],
)
def test_a_step_that_is_not_finite_changes_nothing_but_the_clock(how, device):
    task = tiny_task(tiny_config(how), Ranks(device=torch.device(device)))
    state = initial_state(task)
    advance(state, task, 3)
    before = copy.deepcopy(state.tensors())
    advance(state, task, 2, poison=range(3, 5))
    after = state.tensors()
    assert state.images_seen == 5 * 32
    assert after.pop("skipped").tolist() == [2, 2] and before.pop("skipped").tolist() == [0, 0]
    assert equal(before, after)
    assert state.augmentation.any() == ("data.aug" in how)
    advance(state, task, 1)
    assert state.skipped.tolist() == [2, 0]
    assert not equal(before, {k: v for k, v in state.tensors().items() if k != "skipped"})


@pytest.mark.parametrize("values", [{}, {"regularizer.name": "spectral_norm"}, ADA], ids=["r1", "spectral_norm", "ada"])
@pytest.mark.parametrize("steps_before", [0, 3])
def test_a_generator_loss_that_is_not_finite_voids_the_update_of_d_too(values, steps_before):
    task = tiny_task(tiny_config(values))
    state = initial_state(task)
    advance(state, task, steps_before)
    before = copy.deepcopy(state.tensors())
    with broken_generator_loss():
        advance(state, task, 1)
    after = state.tensors()
    assert after.pop("skipped").tolist() == [1, 1] and before.pop("skipped").tolist() == [0, 0]
    assert state.images_seen == (steps_before + 1) * 32
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert not any(after[k].any() for k in after.keys() - before.keys())  # what Adam began to keep is zero


def test_damaged_later_states_do_not_crowd_out_a_sound_one(tmp_path):
    tensors = {"a": torch.ones(1)}
    for seen in (10, 20, 30):
        save_state(tmp_path, seen, tensors, {}, keep=3)
    for seen in (20, 30):
        (tmp_path / f"training-state-{seen:010d}" / "tensors.safetensors").write_bytes(b"damaged")
    save_state(tmp_path, 15, tensors, {}, keep=1)
    newest, passed_over = newest_state(tmp_path)
    assert newest.name == "training-state-0000000015" and len(passed_over) == 2


def test_many_void_steps_stop_the_run_and_name_the_layer(tmp_path, capsys):
    task = tiny_task(tiny_config({"run.max_skipped": 5}))
    state = initial_state(task)

    def poisoned(requests):
        for images, labels in tiny_feed(requests):
            yield np.full(images.shape, np.nan) if state.images_seen >= 320 else images, labels

    assert loop.train(state, task, poisoned, tmp_path, {}) == 3
    ended = json.loads((tmp_path / "exit.json").read_text())
    assert ended["code"] == 3 and "10 steps in a row were not finite, in D." in ended["reason"]
    tensors, about = load_state(newest_state(tmp_path)[0])
    assert about["images_seen"] == 320 and all(t.isfinite().all() for t in tensors.values())


def test_a_run_whose_images_are_not_finite_stops_for_its_gradients(tmp_path):
    """Ticks that end before enough steps were void look at such images too."""
    task = tiny_task(tiny_config({"run.tick": 0.032, "run.max_skipped": 5}))
    state = initial_state(task)
    with torch.no_grad():
        for name in ("G", "G_ema"):
            state.networks[name].first.weight.fill_(1e38)
    assert loop.train(state, task, tiny_feed, tmp_path, {}) == 3
    ended = json.loads((tmp_path / "exit.json").read_text())
    assert "5 steps in a row were not finite" in ended["reason"]
    lines = (tmp_path / "stats.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=pytest.fail)["Loss/D/loss"] for line in lines] == [None] * 5


def test_snapshots_are_as_far_apart_as_asked_where_a_tick_is_shorter_than_a_step(tmp_path):
    task = tiny_task(tiny_config({"run.tick": 0.02, "run.snap": 6}))  # a step is .032 kimg
    assert loop.train(initial_state(task), task, tiny_feed, tmp_path, {}) == 0
    seen = [int(path.stem[-10:]) for path in sorted(tmp_path.glob("network-snapshot-*"))]
    assert seen == [-(-k * 120 // 32) * 32 for k in range(1, 9)]


def test_the_average_ramps_up_from_the_beginning_of_each_stage():
    task = tiny_task(tiny_config())
    state = initial_state(task)
    G = state.networks["G"]
    average = state.networks["G_ema"]
    now = moment(task.schedule, 16 * 32)
    with torch.no_grad():
        for p in G.parameters():
            p.fill_(1)
        for p in average.parameters():
            p.zero_()
    flat = state.flat
    numbers = step_inputs(task, now, torch.zeros(0), None).numbers
    update_averages(flat, flat["G"], numbers, torch.zeros(()))
    for name, start in (("first.weight", 0), ("blocks.1.conv0.weight", 6 * 32), ("to_image.2.weight", 15 * 32)):
        weight = 1 - ema_beta(32, 17 * 32 - start, 10_000, 0.05)
        found = average.get_parameter(name)
        torch.testing.assert_close(found, torch.full_like(found, weight))
    before = copy.deepcopy(average.state_dict())
    update_averages(flat, flat["G"], numbers, void=torch.ones(()))
    assert equal(before, average.state_dict())


def test_parameters_begin_where_a_gpu_reads_16_bytes_at_once_and_the_gaps_between_them_stay_zero():
    """The biases of two numbers, of images with two channels, would shift all that follows."""
    task = tiny_task(tiny_config())
    state = initial_state(task)
    advance(state, task, 16)  # to the second stage
    moments = {state.trains[name]: slots[1:] for name, slots in state.moments.items()}
    for network, flat in state.flat.items():
        used = torch.zeros_like(flat.data)
        for view in flat.views(used):
            view += 1
        assert set(used.tolist()) == {0, 1}, "there are gaps, and no two parameters share a number"
        for numbers in (flat.data, *moments.get(network, ())):
            assert not numbers[used == 0].any()
            assert all(view.data_ptr() % 16 == 0 for view in flat.views(numbers))
        assert [p.data_ptr() for p in flat.parameters] == [view.data_ptr() for view in flat.views(flat.data)]


def test_reals_are_scaled_flipped_and_faded():
    task = tiny_task(tiny_config({"data.mirror": 1, "network.filter": [1, 1]}))
    G = initial_state(task).networks["G"]
    images = torch.from_numpy(tiny_feed(iter([(0, 32, 1)])).__next__()[0])
    plain = prepare_reals(images, None, 1.0, G)
    torch.testing.assert_close(plain, images.permute(0, 3, 1, 2) / 127.5 - 1)
    assert plain.is_contiguous(memory_format=torch.channels_last)
    flipped, coins = prepare_reals(images, task.draws(0), 1.0, G), task.draws(0).coins("mirror")
    for i in range(32):
        assert torch.equal(flipped[i], plain[i].flip(2) if coins[i] else plain[i])
    white = prepare_reals(
        torch.full_like(images, 255), None, torch.tensor(0.25), initial_state(tiny_task(tiny_config())).networks["G"]
    )
    torch.testing.assert_close(white, torch.ones_like(white))  # whatever the filter of the features, no dark borders
    faded = prepare_reals(images, None, torch.tensor(0.25), G)
    coarse = torch.nn.functional.interpolate(torch.nn.functional.avg_pool2d(plain, 2), scale_factor=2)
    torch.testing.assert_close(faded, 0.75 * coarse + 0.25 * plain)


def test_a_fingerprint_changes_with_any_bit_and_with_the_order():
    a, b = torch.randn(5), torch.randn(3, dtype=torch.float64)
    whole = fingerprint([a, b])
    assert torch.equal(fingerprint([a.clone(), b.clone()]), whole) and find_strangers(whole, Ranks()) == []
    for tensor, bits in ((a, torch.int32), (b, torch.int64)):
        changed = tensor.clone()
        changed.view(bits)[-1] ^= 1
        assert not torch.equal(fingerprint([changed if t is tensor else t for t in (a, b)]), whole)
    assert not torch.equal(fingerprint([a, a + 1]), fingerprint([a + 1, a]))


@pytest.mark.parametrize(
    "seconds,text",
    [(4.2, "4s"), (64, "1m 04s"), (7384, "2h 03m 04s"), (2 * 86400 + 3 * 3600 + 240, "2d 03h 04m"), (59.7, "1m 00s")],
)
def test_durations(seconds, text):
    assert report.duration(seconds) == text


def test_a_void_step_restores_optimizer_state_that_became_infinite():
    """Finite gradients may do that: Adam squares them."""
    task = tiny_task(tiny_config({}))
    state = initial_state(task)
    advance(state, task, 1)
    start = {name: tensor.clone() for name, tensor in state.tensors().items()}
    changed = state.changed_by("d_optimizer")
    before = [tensor.clone() for tensor in changed]
    for tensor in changed:
        tensor.fill_(torch.inf)
    undo_step(before, changed, torch.ones(()))
    assert all(torch.equal(tensor, start[name]) for name, tensor in state.tensors().items())


def statement_lines(function) -> dict[int, int]:
    """Line of the file -> number of the statement of `function` that it belongs to, blocks by their first line."""
    lines, first = inspect.getsourcelines(function)
    numbers = {}
    nodes = [n for n in ast.walk(ast.parse("".join(lines)).body[0]) if isinstance(n, ast.stmt)]
    for node in sorted(nodes, key=lambda n: (n.lineno, -n.end_lineno)):
        last = node.body[0].lineno - 1 if hasattr(node, "body") else node.end_lineno
        numbers |= dict.fromkeys(range(first + node.lineno - 1, first + last), node.lineno)
    return numbers


@pytest.mark.parametrize("values", [{}, {"distributed.exact": True}, {"regularizer.name": "bcr", "data.aug": "ada"}])
def test_the_step_runs_in_the_order_in_which_it_is_written(values):
    """Of one D and one G step: what the step calls is entered as the step names it, and nothing that it calls comes
    back up into the trainer."""
    task = tiny_task(tiny_config({"batch": 4, "regularizer.every": 1, **values}))
    state = initial_state(task)
    now = next(loop.steps(task, 0))
    images, labels = loop.to_device(next(tiny_feed(iter([(0, 4, now.stage)]))), task)
    statements = statement_lines(train_step)
    stats = Statistics()
    order, entered, climbed = [], set(), []

    def watch(frame, event, _):
        path = Path(frame.f_code.co_filename)
        if (
            event != "call"
            or path.parent.name not in ("gan", "methods", "ranks")
            or frame.f_code is train_step.__code__
        ):
            return
        above = [frame]
        while above[-1].f_back and above[-1].f_code is not train_step.__code__:
            above.append(above[-1].f_back)
        # The head of a loop or a `with` is entered again after its body.
        if frame.f_code not in (with_equal_buffers.__code__, inspect.unwrap(frozen).__code__):
            order.append(statements[above[-1].f_lineno])
        entered.add(path.stem)
        own = [f.f_code.co_filename.endswith("gan/trainer.py") for f in above]
        if own[0] and not all(own):  # the trainer, called by something that the trainer called
            climbed.append(frame.f_code.co_name)

    inputs = step_inputs(task, now, images, labels)
    sys.setprofile(watch)
    try:
        train_step(state, task, now, inputs, stats)
    finally:
        sys.setprofile(None)
    assert order == sorted(order)
    assert climbed == []
    assert {"parts", "networks", "critic", "pairs", "gradients", "statistics", "average", "undo"} <= entered


def test_in_float64_alpha_the_learning_rate_and_the_average_are_float64():
    third = 1 / 3
    values = {"precision.dtype": "float64", "optimizer.d_lr": third / 1000, "ema.kimg": 0.1, "ema.rampup": 0.0}
    task = tiny_task(tiny_config(values))
    state = initial_state(task)
    fading = next(now for now in loop.steps(task, 0) if now.fading and now.alpha != round(now.alpha, 3))
    assert fade_weight(fading, step_inputs(task, fading, torch.zeros(0), None)).item() == fading.alpha
    advance(state, task, 1)
    assert state.optimizers["d_optimizer"].param_groups[0]["lr"].item() == third / 1000
    start = initial_state(task).networks["G"].first.bias
    beta = 0.5 ** (32 / 100)
    wanted = beta * start + (1 - beta) * state.networks["G"].first.bias
    torch.testing.assert_close(state.networks["G_ema"].first.bias, wanted.detach(), rtol=1e-15, atol=1e-18)


def test_reals_and_fakes_shown_at_once_are_judged_as_apart():
    """Without a penalty D is shown one batch of both; with gamma 0 the penalty changes nothing but that."""
    changes = {"data.cond": 1, "data.aug": "diff", "precision.dtype": "float64", "regularizer.every": 1}
    states = []
    for values in ({"regularizer.name": "none"}, {"regularizer.name": "r1_r2", "regularizer.gamma": 0.0}):
        task = tiny_task(tiny_config(changes | values))
        state = initial_state(task)
        advance(state, task, 3)
        states.append(state.tensors())
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], rtol=1e-9, atol=1e-12)
