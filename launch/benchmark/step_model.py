"""How long a step takes on many ranks, from what it takes on one and from what the link between them can do."""

from dataclasses import dataclass

ASSUMPTIONS = (
    "compute: fixed + per_sample x batch of a rank, a line through two batches measured on one rank alone; more ranks "
    "on a host than cores / threads share them evenly",
    "communication: one sum of D's gradients and one of G's, each the faster of a ring, 2 (N-1) latency + 2 (N-1)/N "
    "bytes / bandwidth, and a tree, 2 ceil(log2 N) latency + 2 bytes / bandwidth; none of it overlaps with compute",
    "one latency and one bandwidth for every pair of ranks: take those of the slowest link; nothing else uses it",
    "no rank is slower than another, data is ready in time, caches and memory are not shared between ranks",
)


@dataclass(frozen=True)
class Link:
    """Between any two ranks."""

    latency: float  # seconds from one to the next
    bandwidth: float  # bytes per second that a rank sends, and as much that it receives


@dataclass(frozen=True)
class StepCost:
    """Of one stage, on one rank alone."""

    fixed: float  # seconds, whatever the batch
    per_sample: float  # seconds
    messages: tuple[float, ...]  # bytes of each sum over ranks, mean over steps


@dataclass(frozen=True)
class Prediction:
    """Of one step."""

    compute: float  # seconds
    communication: float  # seconds, all of it exposed

    @property
    def seconds(self) -> float:
        return self.compute + self.communication


def line(small: tuple[float, float], large: tuple[float, float]) -> tuple[float, float]:
    """(fixed, per_sample) of the line through two (batch, seconds); through the larger, neither negative, where noise
    would make it so."""
    slope = (large[1] - small[1]) / (large[0] - small[0])
    per_sample = min(max(slope, 0.0), large[1] / large[0])
    return large[1] - per_sample * large[0], per_sample


def all_reduce_seconds(size: float, ranks: int, link: Link) -> float:
    """To sum `size` bytes over `ranks` so that all have the sum."""
    hops = (ranks - 1).bit_length()
    ring = 2 * (ranks - 1) * (link.latency + size / ranks / link.bandwidth)
    tree = 2 * hops * link.latency + 2 * size / link.bandwidth
    return min(ring, tree) if ranks > 1 else 0.0


def predict(cost: StepCost, ranks: int, share: float, link: Link, slots: float = float("inf")) -> Prediction:
    """A step of `ranks` that have `share` samples each. slots: how many of them can compute at the same time."""
    compute = (cost.fixed + cost.per_sample * share) * max(ranks / slots, 1)
    return Prediction(compute, sum(all_reduce_seconds(size, ranks, link) for size in cost.messages))


def measure_link(small: float, large: float, size: float, ranks: int) -> Link:
    """From the seconds that sums of nearly nothing and of `size` bytes took: what makes `all_reduce_seconds` say so."""
    hops = min(2 * (ranks - 1), 2 * (ranks - 1).bit_length())
    return Link(small / hops, 2 * (ranks - 1) / ranks * size / max(large - small, 1e-9))
