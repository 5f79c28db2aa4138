"""The VAE as a family: its step on ranks and in parts, what it learns, how it is saved, and what is refused."""

import math
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_distributed import by_itself, launch, relative
from test_trainer import equal
from tiny import one_thread, tiny_config, tiny_feed, tiny_images, tiny_task  # noqa: F401 - a fixture

from gan.checkpoint import load_snapshot, load_state, newest_state, save_snapshot, save_state
from gan.errors import UserError
from gan.inputs import step_inputs
from gan.ranks.statistics import Statistics
from gan.rehearsal import Rehearsal
from gan.run import loop
from gan.sampling import generate
from gan.state import initial_state
from gan.vae.posteriors import POSTERIORS
from launch.train import class_groups

VAE = {
    "model": "vae", "growth.mode": "none", "growth.shares": [], "regularizer.every": 1, "optimizer.d_lr": 0.002,
    "network.z_dim": 6,
}  # fmt: skip
SMALL = {"planar": ":layers=2", "householder": ":layers=2", "iaf": ":layers=2", "coupling": ":layers=2"}
SMALL |= {"hamiltonian": ":steps=2", "auxiliary": ":size=3", "implicit": ":size=3"}
SMALL |= {"grouped": ":content=3"}
CASES = {name: {"vae.posterior": name + SMALL.get(name, "")} for name in POSTERIORS}
CASES["grouped"]["data.grouped"] = True
CASES["iwae"] = {"vae.bound": "iwae", "vae.samples": 5, "vae.warmup_kimg": 0.5}
CASES["dense"] = {
    "network.widths": [],
    "vae.hidden": [10, 12],
    "vae.likelihood": "bernoulli",
    "vae.binarize": True,
    "data.cond": True,
}
CASES["logistic"] = {"vae.likelihood": "logistic", "data.mirror": True, "data.cond": True}
CASES["learned"] = {"vae.scale": "learned", "vae.free_bits": 2.0, "vae.samples": 2}


def vae_task(values, **how):
    return tiny_task(tiny_config(VAE | values), **how)


def advance(state, task, count):
    """`count` steps from where the state is -> their statistics."""
    seen = []
    for now in list(loop.steps(task, state.images_seen))[:count]:
        batch = next(tiny_feed(iter([(*task.samples(now.images_seen), now.stage)])))
        stats = Statistics()
        inputs = step_inputs(task, now, *loop.to_device(batch, task))
        task.family.step(state, task, now, inputs, stats)
        seen.append(stats.take())
    return seen


@pytest.mark.parametrize("name", CASES)
def test_stopped_after_any_step_and_resumed_is_bit_equal(name, tmp_path):
    task = vae_task(CASES[name])
    whole, resumed = initial_state(task), initial_state(task)
    advance(whole, task, 4)
    for _ in range(4):
        advance(resumed, task, 1)
        save_state(tmp_path, resumed.images_seen, resumed.tensors(), {}, keep=1)
        tensors, about = load_state(newest_state(tmp_path)[0])
        resumed = initial_state(task)
        with torch.no_grad():
            for network in resumed.networks.values():
                for p in network.parameters():
                    p.zero_()
        resumed.load_tensors(tensors, about["images_seen"])
    assert equal(resumed.tensors(), whole.tensors())
    assert not equal(initial_state(task).tensors(), whole.tensors())


def as_case(values):
    text = [
        f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in (VAE | values).items()
    ]
    return ";".join(["3", "precision.dtype=float64", *text])


@pytest.mark.slow
def test_ranks_compute_the_step_of_one(tmp_path):
    cases = {name: as_case(values) for name, values in CASES.items()}
    alone = by_itself(cases)
    together = launch(2, tmp_path / "two.pt", cases)
    for name in cases:
        ours, theirs = together[name]["gradients"]["VAE"], alone[name]["gradients"]["VAE"]
        assert relative(ours, theirs) < 1e-12, name
        for key, tensor in alone[name]["weights"].items():
            torch.testing.assert_close(together[name]["weights"][key], tensor, rtol=0, atol=1e-9, msg=f"{name} {key}")


@pytest.mark.parametrize("name", CASES)
def test_parts_add_up_to_the_whole(name):
    whole, parts = (
        vae_task(CASES[name] | {"precision.dtype": "float64", "distributed.micro": micro}) for micro in (0, 8)
    )
    states = [initial_state(task) for task in (whole, parts)]
    for state, task in zip(states, (whole, parts), strict=True):
        advance(state, task, 1)
    gradients = [{n: p.grad for n, p in s.networks["VAE"].named_parameters() if p.grad is not None} for s in states]
    assert relative(gradients[1], gradients[0]) < 1e-12


@pytest.mark.parametrize("name", CASES)
def test_all_parameters_train_and_the_loss_falls(name):
    task = vae_task(CASES[name] | {"run.kimg": 32 * 60 / 1000})
    state = initial_state(task)
    first = {n: p.clone() for n, p in state.networks["VAE"].named_parameters()}
    seen = advance(state, task, 60)
    still = [n for n, p in state.networks["VAE"].named_parameters() if torch.equal(p, first[n])]
    unused = ("to_image.0.", "to_image.1.")  # of stages that this run does not stop at
    fixed = [] if task.config.vae.likelihood == "gaussian" else ["log_scale"]  # auto follows the error
    assert [n for n in still if not any(part in n for part in unused)] == fixed
    losses = [row["Loss/VAE/loss"] for row in seen]
    assert np.mean(losses[-10:]) < np.mean(losses[5:15])


def test_the_scale_follows_the_error():
    task = vae_task({"run.kimg": 32 * 200 / 1000, "optimizer.g_lr": 1e-9})
    state = initial_state(task)
    advance(state, task, 200)
    G = state.networks["VAE"]
    images, _ = tiny_images(0, 512, 2)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    noise = torch.randn(1, 512, G.posterior.noise)
    error = G.evidence(x, noise).squared_error.mean().sqrt()
    assert G.log_scale.exp().item() == pytest.approx(error.item(), rel=0.02)


@pytest.mark.parametrize("scale,moves", [(0.05, False), ("learned", True)])
def test_a_scale_that_is_a_number_stays_and_a_learned_one_moves(scale, moves):
    task = vae_task({"vae.scale": scale, "optimizer.g_lr": 0.01})
    state = initial_state(task)
    before = state.networks["VAE"].log_scale.item()
    advance(state, task, 5)
    after = state.networks["VAE"].log_scale.item()
    assert (after != before) == moves and (moves or after == pytest.approx(math.log(0.05)))


def test_the_scale_that_follows_the_error_is_the_average_alone():
    """It does not depend on the learning rate of a first step."""
    scales = []
    for rate in (1e-9, 0.01):
        task = vae_task({"optimizer.g_lr": rate})
        state = initial_state(task)
        advance(state, task, 1)
        scales.append(state.networks["VAE"].log_scale.item())
    assert scales[0] == scales[1]


def test_the_divergence_warms_up_and_free_bits_cost_nothing():
    task = vae_task({"vae.warmup_kimg": 0.32})
    betas = [task.family.numbers(task, now)["beta"] for now in list(loop.steps(task, 0))[:12]]
    assert betas[:3] == pytest.approx([0.1, 0.2, 0.3]) and betas[9:] == [1, 1, 1]
    free, paid = (vae_task({"vae.free_bits": bits, "vae.scale": 1.0}) for bits in (1000.0, 0.0))
    row, other = (advance(initial_state(task), task, 1)[0] for task in (free, paid))
    assert row["Loss/VAE/loss"] == pytest.approx(row["Loss/VAE/reconstruction"] + 1000 * math.log(2), rel=1e-6)
    assert other["Loss/VAE/loss"] == pytest.approx(
        other["Loss/VAE/reconstruction"] + other["Loss/VAE/divergence"], rel=1e-6
    )


@pytest.mark.parametrize("name", CASES)
def test_a_snapshot_makes_the_same_images_and_judges_alike(name, tmp_path):
    task = vae_task(CASES[name])
    state = initial_state(task)
    advance(state, task, 2)
    G = state.networks["VAE_ema"]
    path = tmp_path / "snapshot.safetensors"
    save_snapshot(path, G, asdict(task.config), task.images, 2, 1.0, 64)
    again = load_snapshot(path).G
    z = torch.randn(4, 6)
    labels = torch.tensor([0, 1, 2, 0]) if G.classes else None
    made = generate(G, z, labels, stage=2, alpha=1.0)
    assert made.shape == (4, 2, 16, 16) and torch.equal(generate(again, z, labels, stage=2, alpha=1.0), made)
    x = torch.rand(4, 2, 16, 16).round() * 2 - 1
    noise = torch.randn(3, 4, G.posterior.noise)
    weights = [model.evidence(x, noise, labels, masses=True).log_weights for model in (G.eval(), again)]
    assert torch.equal(*weights) and weights[0].isfinite().all()


REFUSED = {
    "objective.name=hinge does nothing with model=vae": {"objective.name": "hinge"},
    "regularizer.gamma=2.0 does nothing": {"regularizer.gamma": 2.0},
    "data.aug=ada does nothing": {"data.aug": "ada"},
    "give growth.mode=none": {"growth.mode": "progressive"},
    "black and white pixels; give vae.binarize=1": {"vae.likelihood": "bernoulli"},
    "vae.binarize=1 leaves nothing": {"vae.binarize": True},
    "vae.gradient=doubly is a gradient of vae.bound=iwae": {"vae.gradient": "doubly"},
    "posteriors whose density is known": {
        "vae.gradient": "doubly", "vae.bound": "iwae", "vae.posterior": "planar"
    },
    "vae.free_bits is of the divergence": {"vae.free_bits": 1.0, "vae.bound": "iwae"},
    "give data.grouped=1 and vae.bound=elbo": {"vae.posterior": "grouped:content=3"},
    "regularizer.name=spectral_norm is no penalty on points": {
        "vae.posterior": "implicit", "regularizer.name": "spectral_norm"
    },
    "vae.scale=learned does nothing": {"vae.scale": "learned", "vae.likelihood": "logistic"},
    r"network.widths=\(12, 8, 8\) does nothing with the fully connected layers of vae.hidden": {"vae.hidden": [8]},
    "network.filter=.* does nothing with the fully": {
        "vae.hidden": [8], "network.widths": [], "network.filter": [1, 1]
    },
    "vae.samples=0 must be at least 1": {"vae.samples": 0},
    "needs a posterior's density, and implicit has none": {"vae.posterior": "implicit", "vae.bound": "iwae"},
    "no half": {"vae.posterior": "coupling", "network.z_dim": 1},
    "vae.posterior=planr is unknown; did you mean planar": {"vae.posterior": "planr"},
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_settings_that_cannot_be_are_refused(message):
    with pytest.raises(UserError, match=message):
        vae_task(REFUSED[message])


def test_a_gan_refuses_what_is_of_a_vae():
    with pytest.raises(UserError, match=r"vae.samples=5 does nothing with model=gan; leave it out"):
        tiny_task(tiny_config({"vae.samples": 5}))


class Labeled:
    """What the order of groups asks of a dataset."""

    path = "x.lmdb"

    def __init__(self, labels, classes=("a", "b", "c")):
        self.labels = labels
        self.manifest = SimpleNamespace(classes=classes)


def test_groups_need_classes_that_fill_them():
    config = tiny_config({"data.grouped": True})
    groups = class_groups(Labeled(np.repeat([0, 1], 5)), config)
    assert len(groups) == 8 and class_groups(Labeled(None), tiny_config()) is None
    with pytest.raises(UserError, match=r"class b of x.lmdb has 3 images, fewer than a group of 4"):
        class_groups(Labeled(np.repeat([0, 1], [5, 3])), config)
    with pytest.raises(UserError, match=r"data.grouped=1 needs class labels and x.lmdb has none"):
        class_groups(Labeled(None, None), config)


@pytest.mark.parametrize("name", CASES)
def test_what_a_run_needs_is_found_without_numbers(name):
    task = vae_task(CASES[name])
    rehearsal = Rehearsal(task.config, task.images)
    expected = {name: tuple(t.shape) for name, t in initial_state(task).tensors().items()}
    assert {name: tuple(t.shape) for name, t in rehearsal.state.tensors().items()} == expected
    assert rehearsal.cost(2, 32).flops > 0
