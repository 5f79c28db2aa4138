"""The devices that tests of ops run on, and the dtypes with what can be asked of them."""

import os

import pytest
import torch

from ops.registry import kernels

kernels()  # some tests call torch.ops.gan_ops itself, which loads nothing

# Deterministic algorithms need it, and torch reads it once in a process, at its first matrix product on a GPU.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# cuDNN rounds the factors of float32 convolutions to 11 significant bits by default, and TOLERANCES allow for 24.
torch.backends.cudnn.allow_tf32 = False

CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here")],
)
DEVICES = ["cpu", CUDA]
TOLERANCES = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def in_layout(x: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """The same numbers in one of the two memory orders; only four dimensions have two."""
    return x.contiguous(memory_format=torch.channels_last) if channels_last and x.dim() == 4 else x.contiguous()
