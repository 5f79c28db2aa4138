"""Means of the values that a run reports: summed on the device, and over ranks once per tick."""

from collections.abc import Mapping

import torch
from torch import Tensor

from gan.ranks.distributed import sum_over_ranks


class Statistics:
    """Means by name. Every rank adds the same names in the same order, so one flat sum over ranks serves them all."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}  # float64, 0-dim
        self.counts: dict[str, int] = {}

    @torch.no_grad()
    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add every element of each tensor."""
        for name, value in values.items():
            # float64 costs nothing at this size and keeps long sums exact. (MPS lacks it, but is not supported.)
            total = value.sum(dtype=torch.float64)
            self.sums[name] = self.sums[name] + total if name in self.sums else total
            self.counts[name] = self.counts.get(name, 0) + value.numel()

    def take(self) -> dict[str, float]:
        """Return the means, over all ranks, of the values since the last call; names of which no rank had a value are
        left out. Waits for the device."""
        if not self.sums:
            return {}
        sums = torch.stack(list(self.sums.values()))
        counts = torch.tensor(list(self.counts.values()), dtype=sums.dtype, device=sums.device)
        table = sum_over_ranks(torch.stack([sums, counts], 1)).tolist()
        means = {name: total / count for name, (total, count) in zip(self.sums, table, strict=True) if count}
        self.sums.clear()
        self.counts.clear()
        return means
