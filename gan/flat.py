"""A network's parameters in one tensor, and the state of their optimizer in a few more.

A training step copies, averages and restores whole networks. One operation on one long tensor replaces one on each of
many short ones, whose fixed cost is larger than their work.
"""

import torch
from torch import Tensor, nn

from gan.networks import stage_of

ALIGNED = 4  # each parameter begins at a multiple of so many numbers: the 16 bytes of float32 that a GPU reads at once


class Flat:
    """Moves a network's parameters into one tensor, stage by stage, with zeros in the gaps between them; the parameters
    become views of it.

    They keep their values and memory order. Call it after the network has got its device and dtype: changing these
    gives the parameters memory of their own again.
    """

    def __init__(self, network: nn.Module) -> None:
        named = list(network.named_parameters())
        self.parameters = [p for _, p in named]
        self.offsets = [0] * len(named)
        self.stages: dict[int, slice] = {}  # the elements of `data` that belong to a stage
        end = 0
        for stage in sorted({stage_of(name) for name, _ in named}):
            start = end
            for index, (name, p) in enumerate(named):
                if stage_of(name) == stage:
                    self.offsets[index] = end
                    end += -(-p.numel() // ALIGNED) * ALIGNED
            self.stages[stage] = slice(start, end)
        first = self.parameters[0]
        self.data = torch.zeros(end, dtype=first.dtype, device=first.device)
        for p, view in zip(self.parameters, self.views(self.data), strict=True):
            view.copy_(p.data)
            p.data = view

    def views(self, flat: Tensor) -> list[Tensor]:
        """Cut a tensor that is as long as `data` as that one is cut: a view for each parameter, in the network's
        order."""
        return [
            flat.as_strided(p.shape, p.stride(), offset)
            for p, offset in zip(self.parameters, self.offsets, strict=True)
        ]


def set_up_adam(optimizer: torch.optim.Optimizer, flat: Flat) -> list[Tensor]:
    """Give Adam the state it begins with, all zeros, as views of three tensors. -> these tensors."""
    steps = torch.zeros(len(flat.parameters), device=flat.data.device)
    first_moments = torch.zeros_like(flat.data)
    second_moments = torch.zeros_like(flat.data)
    slots = zip(steps, flat.views(first_moments), flat.views(second_moments), strict=True)
    for p, (step, first, second) in zip(flat.parameters, slots, strict=True):
        optimizer.state[p] = {"step": step, "exp_avg": first, "exp_avg_sq": second}
    return [steps, first_moments, second_moments]
