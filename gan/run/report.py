"""How rank 0 reports on a run: status lines and log.txt, stats.jsonl, and TensorBoard events."""

import json
import math
import resource
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import torch

from gan.files import drop
from gan.run.directories import drop_after
from gan.run.drift import Drift, resident_memory
from gan.schedules import Moment
from gan.state import Task


class Report:
    """Writes status lines and log.txt, stats.jsonl, and TensorBoard events if tensorboard is installed."""

    def __init__(self, task: Task, run: Path, images_seen: int):
        self.task = task
        self.start = time.monotonic()
        self.images_start = images_seen
        self.last = self.start
        self.last_images = images_seen
        self.maintenance = 0.0
        drop_after(run / "stats.jsonl", images_seen)
        self.jsonl: TextIO = (run / "stats.jsonl").open("a")
        self.log: TextIO = (run / "log.txt").open("a")
        self.board = tensorboard(run, images_seen)
        self.drift = Drift()
        self.noted = False  # does log.txt say that standard output is closed?

    def say(self, line: str) -> None:
        """Write a line to standard output and log.txt."""
        if not tell(line) and not self.noted:
            append(self.log, "note: standard output is closed; the run goes on, and its lines are in log.txt")
            self.noted = True
        append(self.log, line)

    def tick(
        self, tick: int, now: Moment, images_seen: int, means: dict[str, float], waited: float, skipped: int
    ) -> None:
        """One status line and one line of stats.jsonl."""
        clock = time.monotonic()
        seconds = clock - self.last - self.maintenance
        images = images_seen - self.last_images
        left = (self.task.schedule.total - images_seen) * (clock - self.start) / (images_seen - self.images_start)
        size = self.task.images.size_name(now.stage)
        values = means | {
            "Progress/tick": tick,
            "Progress/kimg": images_seen / 1000,
            "Progress/stage": now.stage,
            "Progress/alpha": now.alpha,
            "Progress/lr_scale": now.lr_scale,
            "Progress/skipped_steps": skipped,
            "Timing/total_sec": clock - self.start,
            "Timing/sec_per_tick": seconds,
            "Timing/sec_per_kimg": 1000 * seconds / images,
            "Timing/data_wait": waited / max(seconds, 1e-9),
            "Timing/maintenance_sec": self.maintenance,
            "Resources/cpu_mem_gb": cpu_memory(),
            "Resources/peak_gpu_mem_gb": gpu_memory(),
        }
        losses = " ".join(f"{name} {means.get(key, math.nan):<7.3f}" for name, key in self.task.family.status.items())
        self.say(
            f"tick {tick:<5d} kimg {images_seen / 1000:<9.1f} time {duration(clock - self.start):<12s}"
            f" sec/tick {seconds:<7.1f} sec/kimg {1000 * seconds / images:<8.2f} maintenance {self.maintenance:<6.1f}"
            f" cpumem {cpu_memory():<6.2f} gpumem {gpu_memory():<6.2f} resolution {size:<9s} alpha {now.alpha:<5.2f}"
            f" {losses}{diversity_words(means)} left {duration(left)}" + (f" skipped {skipped}" if skipped else "")
        )
        for warning in self.drift.tick(now.stage, 1000 * seconds / images, resident_memory()):
            self.say(f"note: {warning}")
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}  # JSON has no NaN
        append(self.jsonl, json.dumps({"images_seen": images_seen, "timestamp": time.time(), **finite}))
        self.plot(values, images_seen)
        self.last = clock
        self.last_images = images_seen
        self.maintenance = 0.0

    def plot(self, values: dict[str, float], images_seen: int) -> None:
        """Write values for TensorBoard, until that fails once, as on a full disk."""
        try:
            for name, value in values.items() if self.board else ():
                self.board.add_scalar(name, value, images_seen)
        except OSError as error:
            self.board = None
            self.say(f"note: events for TensorBoard cannot be written ({error.strerror}); the run goes on without them")

    def close(self) -> None:
        """Close the files."""
        for file in filter(None, (self.log, self.jsonl, self.board)):
            with suppress(OSError):
                file.close()

    def saved(self) -> None:
        """Count the time since the last tick as maintenance."""
        self.maintenance = time.monotonic() - self.last


def diversity_words(means: dict[str, float]) -> str:
    """Coherence and spread for the status line, or "" where nothing of the kind was measured, as of vectors."""
    if "Diversity/coherence" not in means:
        return ""
    spread = means["Diversity/spread"] / max(means["Diversity/spread_of_reals"], 1e-9)
    return f" coherence {means['Diversity/coherence']:<5.2f} spread {spread:<5.2f}"


def tell(line: str) -> bool:
    """Write a line to standard output. -> False once its reader is gone, as after `| head`: from then on lines are
    dropped, and the run goes on."""
    try:
        print(line, flush=True)
    except OSError:
        drop(sys.stdout)
        lost.append(line)
    return not lost


lost: list[str] = []  # the line that could not be written to standard output, if there was one


def append(file: TextIO, line: str) -> None:
    """Write a line. If the disk is full, the line stays in the file's buffer until there is room; the run goes on."""
    try:
        file.write(line + "\n")
        file.flush()
    except OSError as error:
        with suppress(OSError):  # the reader of standard error may be gone
            print(f"{file.name} cannot be written: {error.strerror}", file=sys.stderr, flush=True)


def tensorboard(run: Path, images_seen: int) -> Any:
    """A SummaryWriter, or None where tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(run, purge_step=images_seen + 1)


def duration(seconds: float) -> str:
    """ "1d 02h 03m", "2h 03m 04s", "3m 04s", "4s": two or three units, as StyleGAN's status lines have them."""
    s = round(seconds)
    days = s // 86400
    hours = s // 3600 % 24
    minutes = s // 60 % 60
    if days:
        return f"{days}d {hours:02d}h {minutes:02d}m"
    if hours:
        return f"{hours}h {minutes:02d}m {s % 60:02d}s"
    return f"{minutes}m {s % 60:02d}s" if minutes else f"{s}s"


def cpu_memory() -> float:
    """Peak resident memory of this process, in GB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def gpu_memory() -> float:
    """Peak memory allocated on this process's GPU, in GB; 0 without one."""
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
