"""Means of the values that a run reports: summed on the device, and over ranks once per tick."""

from collections.abc import Mapping

import torch
from torch import Tensor

from gan.ranks.distributed import sum_over_ranks


class Statistics:
    """Means by name. Every rank adds the same names in the same order, so one flat sum over ranks serves them all."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}  # name -> [sum, count]

    @torch.no_grad()
    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add every element of each tensor."""
        for name, value in values.items():
            # float64 costs nothing at this size and keeps long sums exact. (MPS lacks it, but is not supported.)
            total = value.detach().double().sum()
            new = torch.stack([total, torch.full_like(total, value.numel())])
            self.sums[name] = self.sums[name] + new if name in self.sums else new

    def take(self) -> dict[str, float]:
        """Return the means, over all ranks, of the values since the last call; names of which no rank had a value are
        left out. Waits for the device."""
        if not self.sums:
            return {}
        table = sum_over_ranks(torch.stack(list(self.sums.values()))).tolist()
        means = {name: total / count for name, (total, count) in zip(self.sums, table, strict=True) if count}
        self.sums.clear()
        return means
