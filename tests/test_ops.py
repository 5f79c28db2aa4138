"""What holds of all ops: both sets of kernels, torch.export, torch.compile, and CUDA sources that compile."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from devices import DEVICES

import ops
from ops.build import CSRC
from ops.registry import kernels
from ops.toolchain import BuildError, find_compiler, find_nvcc

ROOT = Path(__file__).resolve().parent.parent
OF_OPS = ["tests/test_upfirdn2d.py", "tests/test_bias_leaky_relu.py", "tests/test_gradient_penalty.py"]
FILTER = ops.setup_filter([1, 3, 3, 1])


def test_this_suite_tests_the_compiled_kernels():
    if os.environ.get("SADDLE_OPS") == "reference":
        pytest.skip("SADDLE_OPS=reference")
    try:
        find_compiler()
    except BuildError as error:
        pytest.skip(str(error))
    assert kernels() == "compiled"


@pytest.mark.slow
def test_the_reference_kernels_pass_the_same_tests():
    """In a process of their own: loaded kernels cannot be unloaded."""
    command = [sys.executable, "-m", "pytest", "-x", "-m", "not cuda", "-k", "not every_dtype_layout_factor", *OF_OPS]
    env = os.environ | {"SADDLE_OPS": "reference", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and re.search(r"\d+ passed", done.stdout), done.stdout[-3000:]


class EveryOp(torch.nn.Module):
    """[N, 4, 8, 8] -> [N], through every op."""

    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.linspace(-1, 1, 4))
        self.register_buffer("filter", FILTER)

    def forward(self, x):
        y = ops.upsample2d(x, self.filter)
        y = ops.downsample2d(ops.bias_leaky_relu(y, self.bias), self.filter)
        y = ops.interpolate_samples(x, y, ops.squared_norm(x) / 256)
        return ops.gradient_penalty(y, 1.0)


@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # torch's own, at import of inductor
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_a_graph_break_forward_and_backward(backend, channels_last, device):
    torch.manual_seed(0)
    model, x = EveryOp().to(device), torch.randn(3, 4, 8, 8, device=device)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    x.requires_grad_()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for run in (model, compiled):
        y = run(x)
        gradients = torch.autograd.grad(y.sum(), (x, model.bias))
        if run is model:
            want = (y, *gradients)
    torch.testing.assert_close((y, *gradients), want)


@pytest.mark.parametrize("device", DEVICES)
def test_exports(device):
    model, x = EveryOp().to(device), torch.randn(3, 4, 8, 8, device=device)
    exported = torch.export.export(model, (x,))
    called = {str(node.target) for node in exported.graph.nodes if "gan_ops" in str(node.target)}
    assert {name.split(".")[1] for name in called} == {
        "upfirdn2d",
        "bias_leaky_relu",
        "sample_lerp",
        "sample_squared_norm",
    }
    torch.testing.assert_close(exported.module()(x), model(x))


def test_a_double_backward_through_a_compiled_graph_is_refused_and_not_zero():
    """torch's limit, and its message: gradient penalties run eagerly."""
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    compiled = torch.compile(lambda x: ops.upsample2d(x, FILTER).square().sum(), fullgraph=True, backend="aot_eager")
    (gradient,) = torch.autograd.grad(compiled(x), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        gradient.square().sum().backward()


def test_the_derivative_of_every_op_is_an_op_with_a_derivative():
    """No op of ours is a dead end, where a second derivative would silently be zero."""
    names = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("gan_ops::"))
    assert len(names) == 10
    for name in names:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "AutogradCPU") or (
            torch._C._dispatch_has_kernel_for_dispatch_key(name, "Autograd")
        )


@pytest.mark.slow
def test_cuda_sources_compile_for_every_architecture_without_spills(tmp_path):
    """nvcc needs no GPU for this. Registers that spill to memory would cost the bandwidth the kernels are there for."""
    nvcc = find_nvcc()
    if nvcc is None or not nvcc.has_headers:
        pytest.skip("there is no nvcc here, or no CUDA headers")
    wanted = [arch for arch in (80, 90, 100, 120) if arch in nvcc.architectures]
    for source in sorted(CSRC.glob("*.cu")):
        flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in wanted]
        command = [shutil.which("nvcc", path=f"{nvcc.home}/bin"), "-O3", "-std=c++20", "-Xptxas=-v", *flags]
        command += ["-c", str(source), "-o", str(tmp_path / "kernel.o")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "Used" in done.stderr, "ptxas says what it used"
        for kernel in re.split(r"(?=ptxas info\s+: Compiling entry function)", done.stderr)[1:]:
            spilled = [int(n) for n in re.findall(r"(\d+) bytes spill", kernel)]
            of_float_or_bfloat16 = not re.search("kernelId|kernelI6__half", kernel.splitlines()[0])
            assert not (of_float_or_bfloat16 and any(spilled)), kernel[:600]
