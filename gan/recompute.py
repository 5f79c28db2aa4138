"""Blocks whose activations are not kept for the backward pass, but computed there again: `network.recompute`.

The graph is the same, and so are its numbers bit for bit, derivatives of gradients included.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def recomputed(block: nn.Module, *inputs: Tensor) -> Tensor:
    """block(*inputs), of which only the inputs are kept until the backward pass. A block draws no random numbers."""
    return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=lambda: _twice(block))


def _twice(block: nn.Module) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """What surrounds a pass, and what surrounds the same pass computed again, which may be several times."""
    left: list[Tensor] = []
    return _remember(block, left), _AsItWas(block, left)


@contextmanager
def _remember(block: nn.Module, left: list[Tensor]) -> Iterator[None]:
    yield
    left.extend(buffer.clone() for buffer in block.buffers())


class _AsItWas:
    """Within it, the block has the buffers that a pass has left, and does not change them.

    Spectral normalization changes its buffers at every pass in training, and other passes may have followed.
    """

    def __init__(self, block: nn.Module, left: Sequence[Tensor]) -> None:
        self.block = block
        self.left = left

    def __enter__(self) -> None:
        self.now = [buffer.clone() for buffer in self.block.buffers()]
        self.was_training = self.block.training
        self._set(self.left)
        self.block.eval()

    def __exit__(self, *_: object) -> None:
        self.block.train(self.was_training)
        self._set(self.now)

    @torch.no_grad()
    def _set(self, values: Sequence[Tensor]) -> None:
        for buffer, value in zip(self.block.buffers(), values, strict=True):
            buffer.copy_(value)
