"""How long a step takes on many GPUs, from what it takes on one and from what links them.

The step of one GPU is measured. The model adds the sums of the gradients, which wait for the backward pass to end. It
is checked on the ranks of one host (`local_step`): their step is what they take to compute at the same time without
communication, plus what the sums take while nothing is computed.
"""

import math
import tomllib
from dataclasses import dataclass
from pathlib import Path

from gan.config import TrainConfig
from gan.errors import UserError
from gan.families import find_family
from gan.networks import ImageFormat, stage_of
from gan.state import build_networks
from launch.settings import noise_format

WANTED = 0.93  # efficiency, of the images per second that as many separate GPUs would reach
ASSUMPTIONS = (
    "compute: each GPU takes as long as the one measured with that batch; none is slower, data is ready in time",
    "communication: one sum of D's float32 gradients and one of G's, none of it hidden behind the backward passes",
    "inside a host each sum is a ring, 2 (n-1) (latency + bytes / n / bandwidth) for n GPUs",
    "between hosts, GPU k of every host sums the k-th part of the bytes with the others, each over a network adapter "
    "of its own, by the faster of a ring and a tree, 2 ceil(log2 hosts) latency + 2 bytes / bandwidth",
    f"batch for {WANTED}: where the efficiency is below, the batch that would reach it if time grew in proportion",
)


@dataclass(frozen=True)
class Link:
    """Between two GPUs."""

    latency: float  # seconds from one to the next
    bandwidth: float  # bytes per second that a GPU sends, and as much that it receives


@dataclass(frozen=True)
class Fabric:
    """What GPUs are joined by."""

    inside: Link
    between: Link  # of hosts
    per_host: int  # GPUs


@dataclass(frozen=True)
class Step:
    """Of one stage, on one GPU."""

    size: str
    batch: int
    seconds: float
    messages: tuple[float, ...]  # bytes of each sum over ranks
    measured: bool = True  # or else estimated


def ring_seconds(size: float, ranks: int, link: Link) -> float:
    """To sum `size` bytes over ranks so that all have the sum, each passing on pieces to the next."""
    return 2 * (ranks - 1) * (link.latency + size / ranks / link.bandwidth)


def tree_seconds(size: float, ranks: int, link: Link) -> float:
    """The same up a tree and down again."""
    return 2 * (ranks - 1).bit_length() * link.latency + 2 * size / link.bandwidth


def sum_seconds(size: float, gpus: int, fabric: Fabric) -> float:
    """To sum `size` bytes over GPUs so that all have the sum: inside each host, and between hosts if there are several.
    Hosts are full, or there is only one."""
    inside = min(gpus, fabric.per_host)
    hosts = math.ceil(gpus / fabric.per_host)
    seconds = ring_seconds(size, inside, fabric.inside)
    if hosts > 1:
        piece = size / inside
        seconds += min(ring_seconds(piece, hosts, fabric.between), tree_seconds(piece, hosts, fabric.between))
    return seconds


def communication(step: Step, gpus: int, fabric: Fabric) -> float:
    """Seconds of all sums of a step."""
    return sum(sum_seconds(size, gpus, fabric) for size in step.messages)


def efficiency(step: Step, gpus: int, fabric: Fabric) -> float:
    """Images per second of all GPUs, over those that as many separate ones would reach."""
    return step.seconds / (step.seconds + communication(step, gpus, fabric))


def batch_for(wanted: float, step: Step, gpus: int, fabric: Fabric) -> int:
    """The batch of each GPU at which the efficiency is `wanted`, if compute takes time in proportion to it."""
    needed = communication(step, gpus, fabric) * wanted / (1 - wanted)
    return math.ceil(step.batch * needed / step.seconds)


def local_step(alone: float, sums: float) -> float:
    """Seconds of a step of ranks on one host. alone: what each takes while all compute and none communicates, so that
    they share cores, caches and memory as they will; sums: what the sums over them take while nothing is computed."""
    return alone + sums


def message_sizes(config: TrainConfig, images: ImageFormat) -> tuple[float, ...]:
    """Bytes of D's and of G's gradients at the last stage, in float32."""
    networks = build_networks(find_family(config), config, images)

    def trains(name: str) -> bool:
        return "_image." not in name or stage_of(name) == images.last

    return tuple(
        4.0 * sum(p.numel() for name, p in networks[key].named_parameters() if trains(name)) for key in ("D", "G")
    )


def read_steps(path: Path, config: TrainConfig) -> list[Step]:
    """The steps of a file like launch/benchmark/h200_steps.toml, with networks of `config` at the resolution of each.
    Raises UserError for a file that cannot be read or lacks something."""
    try:
        rows = tomllib.loads(path.read_text())["step"]
        return [_read_step(row, config) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else error
        raise UserError(
            f"--steps={path}: {what}; write [[step]] with resolution, batch and ms for each step"
        ) from error


def _read_step(row: dict[str, float], config: TrainConfig) -> Step:
    images = noise_format(int(row["resolution"]))
    return Step(
        images.size_name(images.last),
        int(row["batch"]),
        row["ms"] / 1e3,
        message_sizes(config, images),
        bool(row.get("measured", True)),
    )
