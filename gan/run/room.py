"""What fits into a device's memory, found before a run by rehearsing its steps (gan/rehearsal.py)."""

import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from gan.config import TrainConfig
from gan.errors import UserError
from gan.networks import ImageFormat, network_widths
from gan.ranks.distributed import Ranks, least_over_ranks, on_first
from gan.rehearsal import Cost, Rehearsal
from gan.schedules import Schedule
from ops.memory import is_glibc

GB = 10**9
KEPT_FREE = 0.08  # share of the memory that a plan leaves alone
UNSURE = 0.15  # by how much an estimate may be wrong: a run is refused only if it could not fit even so
HEAP = 1.35  # bytes of the heap per byte of tensors, where freed pages are kept (ops/memory.py); docs/benchmarks.md
FRAGMENTED = 0.1  # share of a GPU's memory that is reserved and unused where memory is called fragmented
FAR = 1024  # samples with which activations certainly take more than weights do, and more at one moment of a step
CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True)
class Room:
    """The memory that one rank may use, in bytes."""

    name: str  # of the device
    total: int
    overhead: int  # of a process, before its first tensor
    spread: float = 1.0  # bytes of memory per byte of tensors

    def needed(self, peak: float) -> float:
        """Of a process whose tensors take `peak` bytes at most."""
        return self.overhead + self.spread * peak

    @property
    def free(self) -> float:
        """The largest peak that fits, with a margin."""
        return ((1 - KEPT_FREE) * self.total - self.overhead) / self.spread

    def holds(self, peak: float) -> bool:
        """Does it fit, with a margin?"""
        return peak <= self.free

    def lacks(self, peak: float) -> bool:
        """Is it certain that it does not fit?"""
        return (1 - UNSURE) * self.needed(peak) > self.total


def find_room(local_ranks: int = 1) -> Room:
    """The memory of each of so many ranks on this host: of the first GPU, or an equal part of the host's."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        return Room(device.name, device.total_memory, overhead=GB)
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    total = int(min([physical, *(_number(Path(name)) for name in CGROUPS)]))
    return Room("this machine", total // local_ranks, overhead=GB // 2, spread=HEAP if is_glibc() else 1.0)


def _number(path: Path) -> float:
    """The limit in a control group's file; infinite if there is none."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return math.inf


@dataclass(frozen=True)
class StagePlan:
    """What a stage needs of each rank."""

    stage: int
    samples: int  # of this rank in a step
    parameters: dict[str, int]  # of each network that trains
    cost: Cost  # of a step on this rank's share of the batch
    per_image: float  # bytes that each image of a backward pass adds to the peak
    largest: int  # samples of a rank in one backward pass that fit; 0: not even one block does


def plan_stages(
    config: TrainConfig, images: ImageFormat, schedule: Schedule, ranks: int, room: Room
) -> Iterator[StagePlan]:
    """The plan of each stage of a run, for the rank with the largest share of the batch."""
    rehearsal = Rehearsal(config, images)
    mine = largest_share(config.batch, rehearsal.block, ranks)
    for stage in schedule.stages:
        peak = partial(rehearsal.peak, stage.index, fading=stage.fade > 0)
        per_image, largest = most_samples(peak, rehearsal.block, room)
        yield StagePlan(
            stage.index,
            mine,
            {network: rehearsal.parameters(network, stage.index) for network in rehearsal.state.trains.values()},
            rehearsal.cost(stage.index, mine, as_number(config), stage.fade > 0),
            per_image,
            largest,
        )


def as_number(config: TrainConfig) -> int:
    """`distributed.micro`, with 0 for auto."""
    micro = config.distributed.micro
    return 0 if isinstance(micro, str) else micro


def largest_share(batch: int, block: int, ranks: int) -> int:
    """Samples of the rank that has most of them."""
    return -(-(batch // block) // ranks) * block


def most_samples(peak: Callable[[int], int], block: int, room: Room) -> tuple[float, int]:
    """(bytes that a sample adds to the peak, the most samples in whole blocks that fit; 0 if not even one block does).

    The peak is the largest of a few moments of a step, each of which grows linearly. With many samples it is always the
    same moment; with fewer it may be another, so there the answer is tried, and lowered.
    """
    far = max(FAR // block, 1) * block
    far_peak = peak(far)
    per_sample = (peak(2 * far) - far_peak) / far
    found = far + math.floor((room.free - far_peak) / per_sample / block) * block
    while 0 < found < far and (excess := peak(found) - room.free) > 0:
        found -= math.ceil(excess / per_sample / block) * block
    return per_sample, max(found, 0)


def resolve_micro(config: TrainConfig, images: ImageFormat, ranks: int, room: Room) -> int:
    """What `distributed.micro=auto` stands for: 0 if a rank's whole share fits, else the size of as few backward passes
    of equal size as fit, in whole blocks. Raises UserError if not even one block fits."""
    if surely_fits(config, images, ranks, room):
        return 0
    rehearsal = Rehearsal(config, images)
    block = rehearsal.block
    mine = largest_share(config.batch, block, ranks)
    peak = partial(rehearsal.peak, images.last, fading=config.growth.mode == "progressive")
    if room.holds(peak(mine)):
        return 0
    waiting = peak(mine, block) - peak(block)  # bytes of the images that wait for their turn
    _, most = most_samples(lambda samples: peak(samples) + waiting, block, room)
    if most == 0:
        raise UserError(too_large(config, images, peak(mine, block), room, 0))
    passes = math.ceil(mine / most)
    return math.ceil(mine / passes / block) * block


def surely_fits(config: TrainConfig, images: ImageFormat, ranks: int, room: Room) -> bool:
    """Is a run so small that nobody needs to rehearse it? Counted as if each layer kept a hundred activations."""
    widths = network_widths(config, images)
    pixels = [math.prod(images.size(stage)) for stage in range(len(widths))]
    activations = sum(100 * width * size for width, size in zip(widths, pixels, strict=True))
    ends = pixels[0] * widths[0] * (config.network.z_dim + widths[0])
    parameters = 2 * ends + 40 * sum(width**2 for width in widths)
    samples = config.batch / ranks + config.distributed.group
    return room.holds(8 * (samples * activations + 16 * parameters))


def check_fit(config: TrainConfig, images: ImageFormat, ranks: int, room: Room) -> None:
    """Raises UserError, with the largest batch that fits, if a step of the last stage certainly does not fit."""
    if surely_fits(config, images, ranks, room):
        return
    rehearsal = Rehearsal(config, images)
    block = rehearsal.block
    mine = largest_share(config.batch, block, ranks)
    micro = block if config.distributed.micro == "auto" else as_number(config)
    peak = partial(rehearsal.peak, images.last, fading=config.growth.mode == "progressive")
    needed = peak(mine, micro)
    if room.lacks(needed):
        _, most = most_samples(peak, block, room)
        raise UserError(too_large(config, images, needed, room, most * ranks))


def too_large(config: TrainConfig, images: ImageFormat, peak: float, room: Room, batch: int) -> str:
    """What does not fit, and what would. batch: the largest that does."""
    if batch:
        remedies = f"the largest batch that does is batch={batch}; distributed.micro=auto splits a larger one"
    else:
        remedies = "not even the smallest batch does: lower data.resolution or network.channel_max"
    return (
        f"batch={config.batch} at {images.size_name(images.last)} does not fit into memory: a rank needs about "
        f"{room.needed(peak) / GB:.1f} GB, and {room.name} has {room.total / GB:.1f} GB for it; {remedies}"
        + ("; network.recompute=1 saves some" if not config.network.recompute else "")
    )


def settle_micro(config: TrainConfig, images: ImageFormat, ranks: Ranks) -> TrainConfig:
    """`resolve_micro` on all ranks, with the same answer, for the rank that has the least memory."""
    if config.distributed.micro != "auto":
        return config
    room = find_room(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    room = replace(room, total=least_over_ranks(room.total, ranks))
    micro = on_first(ranks, lambda: resolve_micro(config, images, ranks.world, room))
    return replace(config, distributed=replace(config.distributed, micro=micro))


def is_out_of_memory(error: RuntimeError) -> bool:
    """Did a device, or the host, have no memory left?"""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def out_of_memory(error: RuntimeError, device: torch.device) -> str:
    """One line: what was asked for, what there is, and what helps."""
    asked = re.search(r"[Tt]ried to allocate [\d.]+ \w+", str(error))
    parts = [f"out of memory on {device}" + (f", {asked[0].lower()}" if asked else "")]
    remedies = ["lower the batch", "set distributed.micro=auto", "set network.recompute=1"]
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        parts.append(f"{free / GB:.1f} of {total / GB:.1f} GB are free, and {unused / GB:.1f} GB reserved in pieces")
        if unused > FRAGMENTED * total:
            remedies.insert(0, "the pieces are too small: set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True")
    return "; ".join([*parts, ", or ".join(remedies)])
