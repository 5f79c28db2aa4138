"""The plain loop against our own step: the same arithmetic, written twice."""

import numpy as np
import pytest
import torch
from tiny import one_thread, tiny_config, tiny_images, tiny_task  # noqa: F401 - a fixture
from torch import nn

from gan.config import TrainConfig
from gan.inputs import step_inputs
from gan.ranks.statistics import Statistics
from gan.schedules import moment
from gan.state import initial_state
from gan.trainer import train_step
from launch.benchmark.plain_loop import PlainLoop, obstacle

STAGE = 2


def our_name(name: str) -> str:
    """The name in our networks of a parameter of the plain ones, whose last stage is STAGE."""
    if name.startswith("stem."):
        return name.replace("stem.", "blocks.0.conv.")
    if name.startswith(("conv.", "linear.")):
        return f"blocks.0.{name}"
    if name.startswith(("to_image.", "from_image.")):
        return name.replace("image.", f"image.{STAGE}.")
    kind, _, rest = name.partition(".")
    index, _, rest = rest.partition(".")
    return f"blocks.{index}.{rest}" if kind == "blocks" else name


def pairs(plain: nn.Module, ours: nn.Module, down: bool):
    """(parameter of the plain network, the same of ours)."""
    named = dict(ours.named_parameters())
    for name, p in plain.named_parameters():
        if name.startswith("blocks."):  # ours count from the coarsest stage, the plain ones in the order of the layers
            _, index, rest = name.split(".", 2)
            yield p, named[f"blocks.{STAGE - int(index) if down else int(index) + 1}.{rest}"]
        else:
            yield p, named[our_name(name)]


def values(**changed: object) -> TrainConfig:
    return tiny_config({"growth.mode": "none", "growth.shares": [], "precision.dtype": "float64", **changed})


@pytest.mark.parametrize(
    "changed",
    [
        {"objective.name": "nonsaturating", "regularizer.name": "r1"},
        {"objective.name": "relativistic", "regularizer.name": "r1_r2", "regularizer.every": 1},
        {"objective.name": "hinge", "regularizer.name": "r2", "network.filter": [1, 1], "optimizer.n_critic": 2},
        {"regularizer.name": "none", "network.filter": [1, 2, 4, 1], "network.minibatch_stddev": False},
    ],
    ids=["r1", "pair", "critic", "filter"],
)
def test_it_takes_the_steps_that_we_take(changed):
    task = tiny_task(values(**changed))
    config = task.config
    state = initial_state(task)
    plain = PlainLoop(config, task.images, STAGE, torch.device("cpu"))
    for network in (plain.G, plain.D, plain.G_ema):
        network.to(torch.float64)
    networks = [(plain.G, "G", False), (plain.G_ema, "G_ema", False), (plain.D, "D", True)]
    both = [pair for network, name, down in networks for pair in pairs(network, state.networks[name], down)]
    with torch.no_grad():
        for p, our in both:
            p.copy_(our)
    before = [p.detach().clone() for p, _ in both]
    for step in range(2):
        seen = step * config.batch
        images = torch.from_numpy(tiny_images(seen, config.batch, STAGE)[0])
        latents = [task.draws(seen).latents(f"latents of the {who} step", config.network.z_dim) for who in "DG"]
        now = moment(task.schedule, seen)
        train_step(state, task, now, step_inputs(task, now, images, None), Statistics())
        plain.step(images, *latents)
        for p, our in both:
            assert torch.allclose(p, our, rtol=1e-9, atol=1e-9)
            if our.grad is not None:
                assert torch.allclose(p.grad, our.grad, rtol=1e-9, atol=1e-9)
    moved = [float((p.detach() - old).abs().max()) for (p, _), old in zip(both, before, strict=True)]
    assert np.median(moved) > 1e-3  # by learning rates of .005


@pytest.mark.parametrize(
    "changed,named",
    [
        ({}, ""),
        ({"regularizer.name": "wgan_gp"}, "regularizer.name=wgan_gp"),
        ({"objective.name": "energy", "regularizer.name": "none"}, "objective.name=energy"),
        ({"network.filter": [1, 2, 1]}, "network.filter=[1.0, 2.0, 1.0]"),
        ({"data.aug": "diff"}, "data.aug=diff"),
        ({"data.cond": 1}, "data.cond=1"),
        ({"data.mirror": 1}, "data.mirror=1"),
    ],
)
def test_what_it_lacks_is_named(changed, named):
    assert obstacle(values(**changed)) == named
