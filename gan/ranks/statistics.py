"""Means of the values that a run reports: summed on the device, and over ranks once per tick."""

from collections.abc import Mapping

import torch
from torch import Tensor

from gan.ranks.distributed import sum_over_ranks


class Statistics:
    """Means by name. Every rank adds the same names in the same order, so one flat sum over ranks serves them all.

    Sums stay in the same tensors, so that a captured step can add to them.
    """

    def __init__(self) -> None:
        self.sums: dict[tuple[str, ...], Tensor] = {}  # names that are added together -> float64 [2, names]
        self.counts: dict[tuple[int, ...], Tensor] = {}  # numbers of elements -> the same on the device

    @torch.no_grad()
    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add every element of each tensor."""
        # float64 costs nothing at this size and keeps long sums exact. (MPS lacks it, but is not supported.)
        totals = torch.stack([value.detach().sum(dtype=torch.float64) for value in values.values()])
        numbers = tuple(value.numel() for value in values.values())
        if numbers not in self.counts:
            self.counts[numbers] = torch.tensor(numbers, dtype=torch.float64).to(totals.device)
        if tuple(values) not in self.sums:
            self.sums[tuple(values)] = totals.new_zeros(2, len(values))
        sums = self.sums[tuple(values)]
        sums[0] += totals
        sums[1] += self.counts[numbers]

    def take(self) -> dict[str, float]:
        """Return the means, over all ranks, of the values since the last call; names of which no rank had a value are
        left out. Waits for the device."""
        if not self.sums:
            return {}
        totals, counts = sum_over_ranks(torch.cat(list(self.sums.values()), 1)).tolist()
        names = [name for group in self.sums for name in group]
        for sums in self.sums.values():
            sums.zero_()
        table: dict[str, tuple[float, float]] = {}
        for name, total, count in zip(names, totals, counts, strict=True):
            before = table.get(name, (0.0, 0.0))
            table[name] = (before[0] + total, before[1] + count)
        return {name: total / count for name, (total, count) in table.items() if count}
