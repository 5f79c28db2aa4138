"""What a step takes back: all of itself where a gradient is not finite, and D's buffers between parts of a batch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

Part = TypeVar("Part")


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No gradients for a module's parameters inside."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)


def changed_by_step(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Everything of a network that a step changes: parameters, what its optimizer keeps of them, buffers."""
    moments = [value for p in module.parameters() for value in optimizer.state.get(p, {}).values()]
    return [*module.parameters(), *moments, *module.buffers()]


@torch.no_grad()
def copy_before_step(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[Tensor, Tensor]:
    """Copies of what a step changes, for `undo_step`: D moves before anybody knows whether G's gradient is finite."""
    tensors = changed_by_step(module, optimizer)
    return dict(zip(tensors, torch._foreach_mul(tensors, 1.0), strict=True))


@torch.no_grad()
def undo_step(before: dict[Tensor, Tensor], module: nn.Module, optimizer: torch.optim.Optimizer, void: Tensor) -> None:
    """Undo a step where `void` is 1, leave it where it is 0; the host need not know which. What the optimizer began to
    keep during the step becomes zero."""
    undo = void > 0
    for tensor in changed_by_step(module, optimizer):
        old = before[tensor] if tensor in before else torch.zeros_like(tensor)
        # Selected, not multiplied by 0 or 1: a finite gradient may have made an infinite square.
        tensor.copy_(torch.where(undo, old, tensor))


def with_equal_buffers(D: nn.Module, parts: Sequence[Part]) -> Iterator[Part]:
    """Each part, with D's buffers as they were for the first one: spectral normalization moves them at every pass.

    So all parts see the D that an undivided batch would see, and ranks with more parts do not move D further.
    """
    first = [b.clone() for b in D.buffers()] if len(parts) > 1 else []
    for index, part in enumerate(parts):
        if index > 0:
            torch._foreach_copy_(list(D.buffers()), first)
        yield part
