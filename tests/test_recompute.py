"""Blocks that are computed again in the backward pass: the same numbers, from less memory."""

import pytest
import torch

from gan.config import TrainConfig
from gan.inputs import step_inputs
from gan.networks import ShrinkBlock
from gan.ranks.statistics import Statistics
from gan.recompute import recomputed
from gan.rehearsal import Rehearsal
from gan.schedules import moment
from gan.state import initial_state
from ops import setup_filter
from tests.tiny import one_thread, tiny_config, tiny_feed, tiny_format, tiny_task  # noqa: F401

METHODS = {
    "r1": {},
    "both penalties, relativistic": {"objective.name": "relativistic", "regularizer.name": "r1_r2"},
    "spectral normalization": {"regularizer.name": "spectral_norm"},
    "between reals and fakes, spectral normalization in parts": {
        "regularizer.name": "spectral_norm",
        "distributed.micro": 8,
    },
    "bf16": {"precision.compute": "bf16"},
    "fade": {"growth.mode": "progressive"},
}


def weights_after(config: TrainConfig, steps: int = 3) -> dict[str, torch.Tensor]:
    task = tiny_task(config)
    state = initial_state(task)
    first = task.schedule.stages[-1].start // config.batch
    for index in range(first, first + steps):
        now = moment(task.schedule, index * config.batch)
        (images, _), *_ = tiny_feed(iter([(*task.samples(now.images_seen), now.stage)]))
        task.family.step(state, task, now, step_inputs(task, now, torch.from_numpy(images), None), Statistics())
    return state.tensors()


@pytest.mark.parametrize("method", METHODS)
def test_the_weights_are_the_same_bit_for_bit(method):
    values = {"growth.mode": "none", "growth.shares": ()} | METHODS[method]
    if values["growth.mode"] == "progressive":
        del values["growth.shares"]
    kept = weights_after(tiny_config(values))
    again = weights_after(tiny_config(values | {"network.recompute": 1}))
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_the_second_derivative_is_the_same():
    block = ShrinkBlock(4, 6).double()
    filter = setup_filter([1, 3, 3, 1], dtype=torch.float64)
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64, requires_grad=True)

    def penalty_gradients(run):
        (slope,) = torch.autograd.grad(run(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), list(block.parameters()))

    expected = penalty_gradients(lambda x: block(x, filter))
    assert all(map(torch.equal, penalty_gradients(lambda x: recomputed(block, x, filter)), expected))
    assert all(gradient.abs().sum() > 0 for gradient in expected)


def test_a_pass_that_other_passes_followed_is_computed_as_it_was():
    """Buffers that a pass changes, as those of spectral normalization: the gradient is that of the weight it had."""

    class Changing(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("factor", torch.ones(()))

        def forward(self, x):
            if self.training:
                self.factor.mul_(2)
            return (x * self.factor.clone()).square()

    block = Changing()
    x = torch.ones((), requires_grad=True)
    y = recomputed(block, x)  # (2 x)^2
    recomputed(block, x)
    (gradient,) = torch.autograd.grad(y, x)
    assert gradient == 8 and block.factor == 4 and block.training


def test_it_saves_memory():
    """At the last of three stages most activations are those of the blocks."""
    kept, again = (
        Rehearsal(tiny_config({"network.recompute": first}), tiny_format()).cost(2, 256).peak for first in (0, 1)
    )
    assert again < 0.85 * kept
