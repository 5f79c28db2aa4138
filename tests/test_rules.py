"""The autograd rules that exist twice, in Python and in C++: the same derivatives, bit for bit, of the same kernels."""

import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import pytest
import torch
from devices import in_layout
from torch._library.autograd import Info, make_autograd_impl

import ops
from ops.registry import kernels

ROOT = Path(__file__).resolve().parent.parent
# The package has functions of the modules' names.
conv2d, bias_leaky_relu, upfirdn2d = (
    import_module(f"ops.{name}") for name in ("conv2d", "bias_leaky_relu", "upfirdn2d")
)
PYTHON_RULES = {
    "conv2d": (conv2d._forward_backward, conv2d._save),
    "conv2d_input_gradient": (conv2d._input_gradient_backward, conv2d._save),
    "conv2d_weight_gradient": (conv2d._weight_gradient_backward, conv2d._save),
    "upfirdn2d": (upfirdn2d._backward, upfirdn2d._setup),
    "bias_leaky_relu": (bias_leaky_relu._forward_backward, bias_leaky_relu._forward_setup),
    "bias_leaky_relu_backward": (bias_leaky_relu._backward_backward, bias_leaky_relu._backward_setup),
}
FILTER = ops.setup_filter([1, 2, 4, 1])
compiled = pytest.mark.skipif(kernels() != "compiled", reason="needs the compiled kernels")


@contextmanager
def python_rules(ran: set[str]) -> Iterator[None]:
    """Within the block the CPU's rules are those in Python; the name of one that records a call is put into `ran`."""
    library = torch.library.Library("gan_ops", "IMPL")

    def replaced(name: str, backward, setup) -> None:
        def noted(ctx, inputs, output):
            ran.add(name)
            return setup(ctx, inputs, output)

        rule = make_autograd_impl(getattr(torch.ops.gan_ops, name).default, Info(backward, noted))
        library.impl(name, rule, "AutogradCPU", with_keyset=True, allow_override=True)

    with warnings.catch_warnings(action="ignore"):  # torch says once per process that a rule is replaced
        for name, (backward, setup) in PYTHON_RULES.items():
            replaced(name, backward, setup)
    try:
        yield
    finally:
        library._destroy()


def block(x, weight, bias, filter, gain):
    """A layer of every op whose rule exists twice."""
    y = ops.bias_leaky_relu(ops.conv2d(x, weight, 1), bias, gain=gain)
    return ops.downsample2d(ops.upsample2d(y, filter), filter, gain=gain)


def derivatives(x, weight, bias, first_by, second_by):
    """[y, first derivatives, derivatives of these], by the tensors at these places, of two layers."""
    inputs = [x.detach(), weight.detach(), bias.detach()]
    variables = [inputs[i].requires_grad_() for i in second_by]
    y = block(block(*inputs, FILTER, 1.5), inputs[1], None, FILTER.outer(FILTER), 0.5)
    first = torch.autograd.grad(y.pow(3).sum(), [inputs[i] for i in first_by], create_graph=True)
    total = sum(g.pow(3).sum() for g in first)
    return [y, *first, *torch.autograd.grad(total, variables)]


def tensors(kernel, channels_last, dtype):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 5, 6, generator=generator)
    weight = torch.randn(4, 4, kernel, kernel, generator=generator)
    bias = torch.randn(4, generator=generator)
    return in_layout(x, channels_last).to(dtype), in_layout(weight, channels_last).to(dtype), bias.to(dtype)


@compiled
@pytest.mark.parametrize(
    ("first_by", "second_by"),
    [((0, 1, 2),) * 2, ((0,), (0, 1, 2)), ((1,), (0, 1, 2)), ((0,), (0,)), ((1,), (1,)), ((2,), (2,)), ((2,), (1, 2))],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kernel", [1, 3])
def test_both_rules_give_the_same_bits(kernel, channels_last, dtype, first_by, second_by):
    inputs = tensors(kernel, channels_last, dtype)
    ours = derivatives(*inputs, first_by, second_by)
    ran: set[str] = set()
    with python_rules(ran):
        theirs = derivatives(*inputs, first_by, second_by)
    assert "upfirdn2d" in ran and (len(ran) == len(PYTHON_RULES) or len(first_by) < 3)
    for a, b in zip(ours, theirs, strict=True):
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    ran.clear()
    derivatives(*inputs, first_by, second_by)
    assert not ran, "the rules in C++ are back"


@compiled
@pytest.mark.parametrize("channels_last", [False, True])
def test_both_kernels_of_a_convolution_give_the_same_bits(channels_last):
    """Those in C++ are the ones in Python, call by call."""
    op = torch.ops.gan_ops
    for kernel, padding, groups in ((1, 0, 1), (1, 1, 1), (3, 1, 1), (3, 0, 2), (1, 0, 2)):
        x, weight, _ = tensors(kernel, channels_last, torch.float32)
        weight = weight[:, : 4 // groups]
        how = ([padding, padding], groups)
        y = op.conv2d(x, weight, *how)
        pairs = [
            (y, conv2d._forward_kernel(x, weight, *how)),
            (
                op.conv2d_input_gradient(y, weight, [5, 6], *how),
                conv2d._input_gradient_kernel(y, weight, [5, 6], *how),
            ),
            (
                op.conv2d_weight_gradient(y, x, [kernel] * 2, *how),
                conv2d._weight_gradient_kernel(y, x, [kernel] * 2, *how),
            ),
        ]
        for compiled, python in pairs:
            assert compiled.stride() == python.stride()
            torch.testing.assert_close(compiled, python, rtol=0, atol=0)


def test_only_what_is_needed_is_saved_and_nothing_without_gradients():
    saved = []
    x, weight, bias = tensors(3, True, torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        ops.conv2d(x, weight.requires_grad_(), 1)
        assert saved == [x.data_ptr()]
        saved.clear()
        ops.conv2d(x.requires_grad_(), weight.detach(), 1)
        assert saved == [weight.data_ptr()]
        saved.clear()
        with torch.no_grad():
            assert not block(x, weight, bias, FILTER, 1.0).requires_grad
        assert not block(x.detach(), weight.detach(), bias, FILTER, 1.0).requires_grad
        assert saved == []


def test_compiles_for_batches_of_any_size():
    """Sizes that torch.compile leaves open reach the rules, too."""
    x, weight, bias = tensors(3, True, torch.float32)
    weight.requires_grad_()
    bias.requires_grad_()

    def loss(x):
        return block(x, weight, bias, FILTER, 1.5).square().sum()

    run = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for n in (2, 3, 5):
        more = x.repeat(n, 1, 1, 1)
        torch._dynamo.mark_dynamic(more, 0)  # an error if anything fixes it
        ours = torch.autograd.grad(run(more), (weight, bias))
        torch.testing.assert_close(ours, torch.autograd.grad(loss(more), (weight, bias)))


@compiled
def test_the_python_rules_pass_the_derivative_tests():
    """With the reference kernels, in a process of their own, where no others are loaded. The quick ones of each op."""
    files = [f"tests/test_{name}.py" for name in ("conv2d", "bias_leaky_relu", "upfirdn2d")]
    chosen = "first_and_second and (case1 or case3 or case7)"
    chosen += " or value_and_derivatives and (shape0 or shape1) or exact and padding1 and up3"
    command = [sys.executable, "-m", "pytest", "-x", "-m", "not cuda and not slow", "-k", chosen, *files]
    env = os.environ | {"SADDLE_OPS": "reference", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and re.search(r"\d+ passed", done.stdout), done.stdout[-3000:]
