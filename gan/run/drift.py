"""Warnings of a run that slowly gets worse: more time per image, or more memory, tick after tick."""

import sys
from collections import deque
from itertools import pairwise
from pathlib import Path

SLOWER = 1.5  # times the best sec/kimg of the stage ...
SLOW_TICKS = 3  # ... in so many ticks in a row
GROWTH = 0.2  # share by which memory has grown ...
GROWING_TICKS = 10  # ... over so many ticks, in each of which it grew


class Drift:
    """Watches two series. Each warning is given once per stage: a larger resolution takes more of both, rightly."""

    def __init__(self) -> None:
        self.stage = -1

    def tick(self, stage: int, sec_per_kimg: float, memory: float) -> list[str]:
        """A tick's figures (memory: resident, GB) -> what to say of them, mostly nothing."""
        if stage != self.stage:
            self.stage = stage
            self.slow = 0
            self.said = set[str]()
            self.best: float = sec_per_kimg
            self.sizes: deque[float] = deque(maxlen=GROWING_TICKS + 1)
        self.best = min(self.best, sec_per_kimg)
        self.slow = self.slow + 1 if sec_per_kimg > SLOWER * self.best else 0
        self.sizes.append(memory)
        warnings = {
            "speed": self.slow >= SLOW_TICKS
            and f"{self.slow} ticks in a row took {sec_per_kimg:.3g} sec/kimg and the best of this resolution was "
            f"{self.best:.3g}; look for another job on this machine, heat, or slow storage",
            "memory": self._growing()
            and f"memory has grown in each of {GROWING_TICKS} ticks, from {self.sizes[0]:.3g} to {memory:.3g} GB; "
            "stop and start again before it runs out (nothing is lost), and please report it",
        }
        new = [text for kind, text in warnings.items() if text and kind not in self.said]
        self.said |= {kind for kind, text in warnings.items() if text}
        return new

    def _growing(self) -> bool:
        sizes = list(self.sizes)
        if len(sizes) <= GROWING_TICKS or sizes[-1] < (1 + GROWTH) * sizes[0]:
            return False
        return all(before < after for before, after in pairwise(sizes))


def resident_memory() -> float:
    """Memory of this process now, in GB; 0 where the system does not say."""
    if sys.platform != "linux":
        return 0.0
    import resource

    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e9
