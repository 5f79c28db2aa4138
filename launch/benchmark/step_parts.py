"""Where a step's time goes. None of this runs while steps are timed."""

from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from launch.benchmark.step_contest import Contestant, Ours, finish

LEAST = 2  # steps that show what a step takes
WATCHED = 0.2  # seconds that a GPU is watched for


class PartTimer:
    """Seconds by the clock `now` between `begin` and `end` of a part; on a GPU, those between the work queued then."""

    def __init__(self, device: torch.device, now: Callable[[], float]) -> None:
        self.device = device
        self.now = now
        self.begun: dict[str, Any] = {}
        self.pairs: list[tuple[str, Any, Any]] = []

    def begin(self, part: str) -> None:
        """A part begins."""
        self.begun[part] = self._now()

    def end(self, part: str) -> None:
        """It ends."""
        self.pairs.append((part, self.begun.pop(part), self._now()))

    def seconds(self) -> dict[str, float]:
        """Of each part in total."""
        finish(self.device)
        total: Counter[str] = Counter()
        for part, begin, end in self.pairs:
            total[part] += begin.elapsed_time(end) / 1e3 if self.device.type == "cuda" else end - begin
        return dict(total)

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return self.now()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@contextmanager
def watched(ours: Ours, timer: PartTimer):
    """Within the block the timer sees the forward passes of the networks that train, and the optimizers' updates."""

    def around(part: str) -> tuple[Callable[..., None], Callable[..., None]]:
        return lambda *_: timer.begin(part), lambda *_: timer.end(part)

    before, after = around("forward")
    hooks = []
    for name in set(ours.state.trains.values()):
        network = ours.state.networks[name]
        hooks += [network.register_forward_pre_hook(before), network.register_forward_hook(after)]
    before, after = around("optimizer")
    for optimizer in ours.state.optimizers.values():
        hooks += [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def time_parts(ours: Ours) -> dict[str, float]:
    """The share of a step that forward passes and optimizers take."""
    timer = PartTimer(ours.task.ranks.device, ours.now)
    steps = max(ours.period, LEAST)
    with watched(ours, timer):
        whole = steps * ours.sample(steps)
    parts = timer.seconds()
    return {part: parts.get(part, 0.0) / whole for part in ("forward", "optimizer")}


def profiler(device: torch.device) -> profile:
    """torch.profiler for calls of the host and kernels of the device."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    return profile(activities=activities, acc_events=True)  # without it torch 2.11 warns that it keeps no other trace


def ready_profiler(device: torch.device) -> None:
    """Start and stop the profiler. It may hang on CUDA graphs that were captured before its first start in a process
    (pytorch issue 75504)."""
    with profiler(device):
        pass


def trace(contestant: Contestant, file: Path | None) -> float | None:
    """Let torch.profiler watch a few steps, and write what it saw as a Chrome trace. -> the share of the time that the
    GPU computed, from the first of its kernels to the last one, None without a GPU."""
    device = contestant.task.ranks.device
    steps = max(contestant.period, LEAST)
    if device.type == "cuda":  # more of short ones, so that the first one's start does not count
        steps *= max(round(WATCHED / (steps * contestant.sample(steps))), 1)
    with profiler(device) as seen:
        contestant.sample(steps)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        seen.export_chrome_trace(str(file))
    if device.type != "cuda":
        return None
    kernels = [
        e.time_range
        for e in seen.events()
        if e.device_type == DeviceType.CUDA and not getattr(e, "is_user_annotation", 0)
    ]
    span = max(kernel.end for kernel in kernels) - min(kernel.start for kernel in kernels)
    return sum(kernel.elapsed_us() for kernel in kernels) / span
