"""Undoing: a whole step if a gradient is not finite, and changes of D's buffers between the parts of a batch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

Part = TypeVar("Part")


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Within the block, a module's parameters do not require gradients."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)


@torch.no_grad()
def undo_step(before: Sequence[Tensor], tensors: Sequence[Tensor], void: Tensor) -> None:
    """Restore the copies `before` of the tensors that a step changes if `void` is 1; if it is 0, change nothing. The
    host does not wait for the device to know which."""
    undo = void > 0
    for old, tensor in zip(before, tensors, strict=True):
        # Selected, not multiplied by 0 or 1: the square of a finite gradient may be infinite, and 0 * inf is NaN.
        tensor.copy_(torch.where(undo, old, tensor))


def with_equal_buffers(D: nn.Module, parts: Sequence[Part]) -> Iterator[Part]:
    """Yield each part after setting D's buffers to what they were for the first one.

    Spectral normalization changes its buffers at every pass of D. So all parts see the D that an undivided batch would
    see, and the buffers change equally on ranks with more parts and with fewer.
    """
    first = [b.clone() for b in D.buffers()] if len(parts) > 1 else []
    for index, part in enumerate(parts):
        if index > 0:
            torch._foreach_copy_(list(D.buffers()), first)
        yield part
