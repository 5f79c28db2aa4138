"""Memory order. Kernels take dense tensors in one of two orders, and give back what they were given."""

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LARGEST = 2**62  # bytes: sizes and addresses inside the kernels are signed 64-bit numbers


def is_channels_last(x: Tensor) -> bool:
    """NHWC in memory, and not NCHW at the same time."""
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def memory_format(channels_last: bool) -> torch.memory_format:
    """torch's name for one of the two orders."""
    return torch.channels_last if channels_last else torch.contiguous_format


def dense(x: Tensor, channels_last: bool) -> Tensor:
    """x itself, or a copy, without gaps and in the order asked for."""
    return x.contiguous(memory_format=memory_format(channels_last))


def check_tensor(op: str, name: str, x: Tensor, planes: bool = False) -> None:
    """Raise ValueError unless x is a strided, floating, non-empty [N, C, ...], or with `planes` [N, C, H, W]."""
    dims = "[N, C, H, W]" if planes else "[N, C, ...]"
    fits = x.dim() == 4 if planes else x.dim() >= 2
    if x.layout != torch.strided or x.dtype not in DTYPES or not fits or x.numel() == 0:
        kinds = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise ValueError(
            f"{op}: {name} must be a dense, non-empty {dims} tensor in one of {kinds}, "
            f"got {x.layout} {x.dtype} {list(x.shape)}"
        )
