"""What a step puts back: D where a gradient is not finite, its buffers between parts, its gradients in G's turn."""

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


def changing(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Everything of a network that a step changes: parameters, what its optimizer keeps of them, buffers."""
    slots = [value for p in module.parameters() for value in optimizer.state.get(p, {}).values()]
    return [*module.parameters(), *slots, *module.buffers()]


@torch.no_grad()
def kept(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[Tensor, Tensor]:
    """Copies of what a step changes, for `put_back`: D moves before anybody knows whether G's gradient is finite."""
    tensors = changing(module, optimizer)
    return dict(zip(tensors, torch._foreach_mul(tensors, 1.0), strict=True))


@torch.no_grad()
def put_back(before: dict[Tensor, Tensor], module: nn.Module, optimizer: torch.optim.Optimizer, bad: Tensor) -> None:
    """Undo a step where `bad` is 1, leave it where it is 0, without the host knowing which. What the optimizer began to
    keep during the step becomes zero."""
    undo = bad > 0
    for t in changing(module, optimizer):  # no product with 0 or 1: a finite gradient may have made an infinite square
        t.copy_(torch.where(undo, before[t] if t in before else torch.zeros_like(t), t))


def rewinding(D: nn.Module, parts: Sequence[Part]) -> Iterator[Part]:
    """Each part; D's buffers, which spectral normalization moves at each pass, are for each what they were for the
    first. So parts see the D that the whole would, and ranks with more parts do not move D further."""
    first = [b.clone() for b in D.buffers()] if len(parts) > 1 else []
    for index, part in enumerate(parts):
        if index > 0:
            torch._foreach_copy_(list(D.buffers()), first)
        yield part
