"""The count of a step's arithmetic against closed forms, and each product alone against what the step computed."""

import math

import pytest
import torch
from devices import DEVICES
from tiny import one_thread, tiny_config, tiny_task  # noqa: F401 - a fixture
from torch.nn import functional as F

from gan.families import build_task
from gan.networks import ImageFormat
from gan.ranks.distributed import Ranks
from gan.schedules import build_schedule
from launch.benchmark.step_contest import Ours
from launch.benchmark.step_work import Like, Work, flops_of, seconds_alone

N, C, K, H = 2, 3, 5, 8  # batch, channels before and after a convolution, side


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_of_every_order(device, groups):
    x = torch.randn(N, 4, H, H, device=device, requires_grad=True)
    weight = torch.randn(6, 4 // groups, 3, 3, device=device, requires_grad=True)
    one = 2 * N * 6 * H * H * 4 // groups * 9  # of any convolution here: forward, or gradient by x or by the weight
    with Work() as forward:
        y = F.conv2d(x, weight, padding=1, groups=groups)
    with Work() as first:
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with Work() as both:
        torch.autograd.grad(y.sum(), [x, weight], retain_graph=True)
    assert [flops_of(work.products) for work in (forward, first, both)] == [one, one, 2 * one]
    if groups == 1:
        with Work() as second:
            dx.square().sum().backward(inputs=[weight])
        # d|dx|^2/dweight through dx directly, and through dx's y: a weight gradient, a forward, another weight gradient
        assert flops_of(second.products) == 3 * one


def test_resampling_by_transposed_convolutions():
    x = torch.randn(N, C, H, H, requires_grad=True)
    with Work() as work:
        y = F.conv_transpose2d(x, torch.randn(C, 1, 4, 4), stride=2, padding=1, groups=C)
        torch.autograd.grad(y.sum(), x)
    assert flops_of(work.products) == 2 * (2 * N * C * H * H * 16)  # each input value is spread over 16, and back


def test_matrix_products():
    x = torch.randn(N, C)
    with Work() as work:
        F.linear(x, torch.randn(K, C), torch.randn(K))
        torch.bmm(torch.randn(7, N, C), torch.randn(7, C, K))
    assert flops_of(work.products) == 2 * N * C * K + 7 * 2 * N * C * K


def step_flops(regularizer: str, width: int, batch: int, z_dim: int) -> int:
    """Of one step at 4x4 without minibatch deviation, by hand: the layers of both networks, and how often each is used.

    A gradient by inputs, and one by weights, costs as much as the layer itself.
    """
    conv, image, features, logit, latent = (
        2 * batch * n
        for n in (16 * 9 * width * width, 16 * 3 * width, 16 * width * width, width, z_dim * 16 * width)
    )  # fmt: skip
    inner = conv + features + logit  # D after its first layer
    generator = latent + conv + image
    d_forward = 2 * (image + inner) + generator  # reals, fakes, and making the fakes
    d_backward = 2 * (image + 2 * inner)  # the first layer needs no gradient by its input
    g_step = generator + (image + inner) + (image + inner) + (2 * conv + 2 * image + latent)
    penalty = 0
    if regularizer == "r1":
        # The gradient by the reals, and the gradient of its square: by each layer's weight and by what enters its
        # transpose, which for the last layer are constant ones. The second derivative of a leaky ReLU is zero.
        penalty = (image + inner) + 2 * (image + inner) - logit
    return d_forward + d_backward + g_step + penalty


@pytest.mark.parametrize("regularizer", ["none", "r1"])
def test_a_whole_step(regularizer):
    width, batch, z_dim = 6, 8, 10
    config = tiny_config(
        {
            "batch": batch,
            "growth.mode": "none",
            "growth.shares": [],
            "network.widths": [width],
            "network.z_dim": z_dim,
            "network.minibatch_stddev": False,
            "regularizer.name": regularizer,
            "regularizer.every": 1,
        }
    )
    images = ImageFormat(channels=3, base=(4, 4), last=0, class_names=(), dataset_hash="")
    ours = Ours(build_task(config, build_schedule(config, 0), images, Ranks()), stage=0)
    with Work() as work:
        ours.step()
    assert flops_of(work.products) == step_flops(regularizer, width, batch, z_dim)


@pytest.mark.parametrize("device", DEVICES)
def test_products_are_repeated_in_their_dtype_and_memory_order(device):
    x = torch.randn(N, C, H, H, device=device).to(torch.bfloat16, memory_format=torch.channels_last)
    weight = torch.randn(K, C, 3, 3, device=device, dtype=torch.bfloat16).expand(K, C, 3, 3)
    with Work() as work:
        y = F.conv2d(x, weight, padding=1)
    ((product, times),) = work.products.items()
    again = product.call()()
    assert times == 1 and again.shape == y.shape and again.dtype == y.dtype and again.stride() == y.stride()
    assert 0 < seconds_alone(work.products, torch.device(device)) < math.inf


def test_tensors_that_repeat_themselves_can_be_made_again():
    expanded = torch.randn(3, 1).expand(3, 4)
    made = Like((3, 4), expanded.stride(), torch.float32, torch.device("cpu")).make()
    assert made.shape == (3, 4) and made.stride() == expanded.stride()
