"""Warnings about a run that takes more and more time per image, or more and more memory, tick after tick."""

import sys
from collections import deque
from itertools import pairwise
from pathlib import Path

SLOWER = 1.5  # times the best sec/kimg of the stage ...
SLOW_TICKS = 3  # ... in so many ticks in a row
GROWTH = 0.2  # share by which memory has grown ...
GROWING_TICKS = 10  # ... over so many ticks, in each of which it grew


class Drift:
    """Watches time and memory per tick. Each is judged within its stage, as a larger resolution needs more of both, and
    each warning is given once per stage."""

    def __init__(self) -> None:
        self.stage = -1

    def tick(self, stage: int, sec_per_kimg: float, memory: float) -> list[str]:
        """Note a tick's figures (memory: resident, in GB) -> new warnings, usually none."""
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
            and f"training has been slow for {self.slow} ticks in a row: {sec_per_kimg:.3g} sec/kimg, and the best at "
            f"this resolution was {self.best:.3g}; look for another job on this machine, heat, or slow storage",
            "memory": self._growing()
            and f"memory has grown in each of {GROWING_TICKS} ticks, from {self.sizes[0]:.3g} to {memory:.3g} GB; "
            "stop the run and resume it before memory runs out (nothing is lost), and please report this",
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
    """Resident memory of this process now, in GB; 0 on systems other than Linux."""
    if sys.platform != "linux":
        return 0.0
    import resource

    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e9
