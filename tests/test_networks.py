"""Shapes for every size, fading that begins and ends without a jump, groups that do not leak, labels that matter."""

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from gan.layers import Conv2d, Linear, minibatch_stddev, pixel_norm
from gan.networks import GrowBlock, ResNetDiscriminator, ResNetGenerator, ShrinkBlock, default_widths, stage_of
from ops import setup_filter


def pair(last=2, base=(4, 4), channels=3, classes=0, width=6, **options):
    torch.manual_seed(0)
    widths = [width] * (last + 1)
    G = ResNetGenerator(8, widths, channels, base, classes, **options)
    return G, ResNetDiscriminator(widths, channels, base, classes, **options)


SIZES = [(0, (4, 4), 1), (2, (4, 4), 4), (3, (3, 5), 2), (1, (7, 7), 1), (8, (4, 4), 3)]


@pytest.mark.parametrize("last,base,channels", [*SIZES, pytest.param(9, (4, 4), 3, marks=pytest.mark.slow)])
def test_shapes_up_to_2048_and_not_square(last, base, channels):
    G, D = pair(last, base, channels, width=2 if last > 5 else 4)
    with torch.no_grad():
        images = G(torch.randn(4, 8), last)
        assert images.shape == (4, channels, base[0] * 2**last, base[1] * 2**last)
        assert D(images, last).shape == (4,)


@pytest.mark.parametrize("shape", [{}, {"residual": 1.0}, {"residual": 0.01, "depth": 5}], ids=str)
def test_the_start_keeps_variances_near_one(shape):
    G, D = pair(last=5, width=64, **shape)
    with torch.no_grad():
        x = G(torch.randn(8, 8), 5)
        assert 0.1 < x.std() < 2
        logits = D(torch.randn(8, 3, 128, 128), 5)
        assert logits.isfinite().all() and logits.abs().max() < 10


def test_a_fade_begins_at_the_old_stage_and_ends_at_the_new():
    G, D = pair()
    z, x = torch.randn(4, 8), torch.randn(4, 3, 16, 16)
    up = torch.nn.functional.interpolate
    with torch.no_grad():
        torch.testing.assert_close(G(z, 2, torch.tensor(0.0)), up(G(z, 1), scale_factor=2))
        torch.testing.assert_close(G(z, 2, torch.tensor(1.0)), G(z, 2, 1.0))
        half = torch.nn.functional.avg_pool2d(x, 2)
        torch.testing.assert_close(D(x, 2, torch.tensor(0.0)), D(half, 1))
        torch.testing.assert_close(D(x, 2, torch.tensor(1.0)), D(x, 2, 1.0))


def plain(conv, x, gain):
    """A convolution and a leaky ReLU by torch's own functions."""
    weight = conv.weight / math.sqrt(conv.weight[0].numel())
    return F.leaky_relu(F.conv2d(x, weight, conv.bias, padding="same"), 0.2) * math.sqrt(2) * gain


@pytest.mark.parametrize("r", [0.5, 0.1, 1.0])
def test_convolutions_make_a_share_of_a_block_and_further_blocks_keep_its_size(r):
    torch.manual_seed(0)
    box = setup_filter([1, 1]).double()
    grow, shrink = GrowBlock(3, 5, r, depth=2).double(), ShrinkBlock(5, 3, r, depth=2).double()
    for parameter in (*grow.parameters(), *shrink.parameters()):
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)

    def share(block, x, y):
        return math.sqrt(1 - r) * x + plain(block.conv1, plain(block.conv0, y, 1), math.sqrt(r))

    def skip(block, x):
        return x.new_zeros(1) if block.skip is None else F.conv2d(x, block.skip.weight * block.skip.scale)

    assert (grow.skip is None) == (shrink.skip is None) == (r == 1)
    with torch.no_grad():
        up = F.interpolate(x, scale_factor=2)
        y = share(grow, skip(grow, up), up)
        y = share(grow.more[0], y, y)
        torch.testing.assert_close(grow(x, box), y)
        wide = share(shrink.more[0], y, y)
        torch.testing.assert_close(shrink(y, box), F.avg_pool2d(share(shrink, skip(shrink, wide), wide), 2))


@pytest.mark.parametrize("gain", [1.0, 0.3])
def test_the_class_makes_its_share_of_the_first_layer(gain):
    torch.manual_seed(0)
    G = ResNetGenerator(64, [64], classes=200, class_gain=gain)
    with torch.no_grad():
        class_mean = G.mean_first_layer(torch.arange(200))
        every = G.first_layer(torch.randn(200, 64), torch.arange(200))
    share = class_mean.var(0).mean() / every.var(0).mean()
    assert share == pytest.approx(gain**2 / (1 + gain**2), rel=0.1)


def with_gradient(module: torch.nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("fading", [False, True])
def test_which_parameters_train_is_a_function_of_stage_and_fading(stage, fading):
    G, D = pair()
    alpha = torch.tensor(0.5) if fading else 1.0
    D(G(torch.randn(4, 8), stage, alpha), stage, alpha).sum().backward()
    rgb = {stage, stage - 1} if fading and stage else {stage}
    for net in (G, D):
        active = {stage_of(n) for n in with_gradient(net) if "_image" in n}
        assert active == rgb
        assert {stage_of(n) for n in with_gradient(net) if "blocks" in n} == set(range(stage + 1))


def test_growing_by_a_stage_changes_nothing_below():
    """The parameters of a stage keep their names: 'blocks.1' belongs to stage 1 in G and in D."""
    G, D = pair()
    assert stage_of("blocks.2.conv0.weight") == 2 and stage_of("from_image.1.bias") == 1
    assert stage_of("first.weight") == stage_of("logit.bias") == stage_of("embedding.weight") == 0
    assert {stage_of(n) for n, _ in G.named_parameters()} == {stage_of(n) for n, _ in D.named_parameters()} == {0, 1, 2}


def test_minibatch_stddev_is_the_deviation_inside_each_group():
    x = torch.randn(8, 3, 5, 5, dtype=torch.float64)
    y = minibatch_stddev(x, 4)
    for group in (slice(0, 4), slice(4, 8)):
        expected = (x[group].var(0, unbiased=False) + 1e-8).sqrt().mean()
        torch.testing.assert_close(y[group], expected.expand(4))
    with pytest.raises(ValueError, match="groups of 4"):
        minibatch_stddev(x[:6], 4)


def test_the_deviation_enters_the_convolution_as_one_more_channel():
    """Karras et al. 2018 append it to x; the head adds that channel's share of the convolution instead."""
    head = pair()[1].blocks[0].double()
    x = torch.randn(8, 6, 4, 4, dtype=torch.float64, requires_grad=True)
    deviation = minibatch_stddev(x, 4).view(-1, 1, 1, 1).expand(8, 1, 4, 4)
    appended = head.linear(head.conv(torch.cat([x, deviation], 1)).flatten(1))
    torch.testing.assert_close(head(x), appended)
    inputs = [x, head.conv.weight]
    ours, theirs = (torch.autograd.grad(y.square().sum(), inputs) for y in (head(x), appended))
    torch.testing.assert_close(ours, theirs)


def test_groups_do_not_see_each_other():
    _, D = pair()
    x = torch.randn(8, 3, 16, 16)
    changed = torch.cat([x[:4], torch.randn(4, 3, 16, 16)])
    with torch.no_grad():
        torch.testing.assert_close(D(x, 2)[:4], D(changed, 2)[:4])
        mixed = torch.cat([x[:2], changed[4:6], x[2:4], changed[6:]])
        assert not torch.allclose(D(mixed, 2)[:2], D(x, 2)[:2])  # inside a group they do


def test_equalized_learning_rate():
    """Weights N(0, 1) and the scale 1 / sqrt(fan-in): outputs of variance one for inputs of variance one."""
    torch.manual_seed(0)
    for layer, x in ((Linear(400, 200), torch.randn(200, 400)), (Conv2d(50, 60, 3), torch.randn(8, 50, 20, 20))):
        assert abs(layer.weight.std() - 1) < 0.05
        inner = layer(x)[..., 1:-1, 1:-1] if x.dim() == 4 else layer(x)
        assert abs(inner.std() - 1) < 0.1


def test_pixel_norm():
    z = torch.randn(5, 7, dtype=torch.float64)
    torch.testing.assert_close(pixel_norm(z).square().mean(1), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(pixel_norm(3 * z), pixel_norm(z))


def test_the_discriminator_can_be_differentiated_twice():
    _, D = pair(last=1, channels=1, width=2)
    D.double()
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: D(x, 1), (x,), fast_mode=True)
    assert gradgradcheck(lambda x: D(x, 1), (x,), fast_mode=True)


def test_labels_matter_and_must_match():
    G, D = pair(classes=3)
    z, x = torch.randn(1, 8).expand(4, -1), torch.randn(1, 3, 16, 16).expand(4, -1, -1, -1)
    labels = torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        images, logits = G(z, 2, labels=labels), D(x, 2, labels=labels)
    assert torch.allclose(images[0], images[3]) and not torch.allclose(images[0], images[1])
    assert torch.isclose(logits[0], logits[3]) and not torch.isclose(logits[0], logits[2])
    with pytest.raises(ValueError, match="needs labels"):
        G(z, 2)
    with pytest.raises(ValueError, match="takes no labels"):
        pair()[0](z, 2, labels=labels)


def test_a_class_adds_its_projection_to_the_logit():
    """Over the root of the width, so that it has the variance of the features."""
    _, D = pair(classes=3)
    x, labels, seen = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0]), []
    D.blocks[0].register_forward_hook(lambda module, given, features: seen.append(features))
    with torch.no_grad():
        logits = D(x, 2, labels=labels)
        (features,) = seen
        expected = D.logit(features).squeeze(1) + (features * D.embedding(labels)).mean(1) * features.shape[1] ** 0.5
    torch.testing.assert_close(logits, expected)


def test_latents_and_classes_weigh_alike_however_large_either_is():
    G, _ = pair(classes=3)
    z, labels = torch.randn(4, 8), torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        before = G.first_layer(z, labels)
        G.embedding.weight.mul_(7)
        torch.testing.assert_close(G.first_layer(5 * z, labels), before)


def test_the_truncation_mean_is_the_mean_over_latents():
    G, _ = pair(classes=3)
    z = torch.randn(20_000, 8)
    for label in range(3):
        many = G.first_layer(z, torch.full((len(z),), label)).mean(0)
        torch.testing.assert_close(G.mean_first_layer(torch.tensor([label]))[0], many, rtol=0, atol=0.05)


def test_default_widths():
    assert default_widths((4, 4), 8, 16384, 512) == (512, 512, 512, 512, 256, 128, 64, 32, 16)
    assert default_widths((4, 6), 1, 60, 512) == (10, 5)
