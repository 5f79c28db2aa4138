"""The loop around the step: what a run does now and then. Nothing here changes the weights.

Once per tick statistics are reduced and logged, ranks compared, and the host waits for the device; every `snap` ticks
and at the end rank 0 saves a training state, a snapshot and a grid.
"""

import copy
import json
import math
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gan.checkpoint import SNAPSHOT, save_snapshot, save_state
from gan.files import replacing, write_json
from gan.ranks.distributed import find_strangers, fingerprint, from_first
from gan.ranks.signals import PREEMPTED, StopRequest, listening
from gan.ranks.statistics import Statistics
from gan.ranks.watchdog import Watchdog, naming
from gan.run.directories import EXIT, drop_after
from gan.run.drift import Drift, resident_memory
from gan.run.writer import Writer, check_space, remove_parts
from gan.sampling import generate, grid_columns, seed_latents, tile, to_uint8
from gan.schedules import Moment, moment
from gan.trainer import Batch, Feed, Task, TrainState, train_step

DONE, REFUSED, NOT_FINITE = 0, 2, 3
GRID = 64  # most samples in a grid of fakes or reals


def train(state: TrainState, task: Task, feed: Feed, run: Path, about: dict[str, Any]) -> int:
    """Go on from `state` to the end of the schedule. -> the exit code, also written to `run/exit.json`.

    feed: maps requests (first sample, count, level) to batches of uint8 images and labels, reading ahead. A batch is
    valid until the next one is asked for.
    about: plain values saved with every training state.
    """
    stats, waited = Statistics(), 0.0
    plan = ((*task.samples(now.images_seen), now.stage) for now in steps(task, state.images_seen))
    with ExitStack() as stack:
        stopping = stack.enter_context(listening())
        config, timeout = task.config.run, task.config.distributed.timeout
        watchdog = stack.enter_context(closing(Watchdog(task.ranks, run, config.watchdog, stopping, timeout)))
        stack.enter_context(naming(watchdog, lambda: f"after {state.images_seen} images"))
        report = stack.enter_context(closing(Report(task, run, state.images_seen))) if task.ranks.first else None
        writer = stack.enter_context(closing(Writer(report.say))) if report else None
        if report:
            remove_parts(run)
        if report and state.images_seen == 0:
            save_image(run / "reals.png", real_grid(task, feed))
            save_image(run / "fakes_init.png", fake_grid(state, task, stage=task.schedule.last, alpha=1.0))
        batches = stack.enter_context(closing(feed(plan)))
        asked = Arriving(state.stop)
        for now in steps(task, state.images_seen):
            begin = time.perf_counter()
            images, labels = to_device(next(batches), task)
            waited += time.perf_counter() - begin
            train_step(state, task, now, images, labels, stats, float(bool(stopping)))
            # Read one step late, so that the host need not wait for this one; late alike on all ranks.
            stop, asked = asked.read(), Arriving(state.stop)
            watchdog.beat(now.step)
            tick, due = ticked(task, now, state.images_seen)
            done = state.images_seen == task.schedule.total
            if not (due or stop):
                continue
            means = stats.take()
            skipped, in_a_row = (int(n) for n in state.skipped.tolist())
            if report:
                report.tick(tick, now, state.images_seen, means, waited, skipped)
            waited = 0.0
            if wrong := fault(state, task, in_a_row):
                if report:
                    report.say(f"stopped: {wrong[1]}")
                return finish(task, run, state, *wrong)
            if report and writer and (tick % config.snap == 0 or done or stop):
                save(state, task, now, run, about, writer)
                report.saved()
            if stop and not done:
                return preempted(task, run, state, stopping, report, writer)
        failed = writer.wait() if writer else None
    return finish(task, run, state, REFUSED if failed else DONE, failed or "finished")


class Arriving:
    """A 0-dim tensor on its way to the host, which need not wait for what comes after it."""

    def __init__(self, value: Tensor):
        self.value = value.to("cpu", non_blocking=True)
        self.event = torch.cuda.Event() if value.is_cuda else None
        if self.event:
            self.event.record()

    def read(self) -> bool:
        """Is it more than zero? Waits until it is here."""
        if self.event:
            self.event.synchronize()
        return bool(self.value)


def preempted(
    task: Task, run: Path, state: TrainState, stopping: StopRequest, report: "Report | None", writer: Writer | None
) -> int:
    """Say why, once rank 0 has saved, on whose word all ranks end."""
    reason = f"{stopping.by or 'another rank'} asked for it"
    failed = writer.wait() if writer else None
    code = finish(task, run, state, PREEMPTED, f"stopped: {reason}" + (f"; {failed}" if failed else ""))
    from_first(None)
    if report:
        saved = "the same command goes on from the state before" if failed else "saved, the same command goes on"
        report.say(f"stopped after {state.images_seen} images: {reason}; {saved}")
    return code


def fault(state: TrainState, task: Task, in_a_row: int) -> tuple[int, str] | None:
    """(exit code, reason) where the run must stop, unsaved; the same on all ranks."""
    if in_a_row >= task.config.run.max_skipped:
        where, remedy = blame(state), "lower optimizer.d_lr and optimizer.g_lr, or raise --gamma"
        return NOT_FINITE, f"{in_a_row} steps in a row not finite, in {where}; {remedy}"
    tensors = state.tensors()
    if strangers := find_strangers(fingerprint(tensors.values()), task.ranks):
        who = f"rank{'s' * (len(strangers) > 1)} {', '.join(map(str, strangers))}"
        reason = f"the weights of {who} are not those of the others: look at the memory and the versions there"
        return REFUSED, f"{reason}; the same command goes on from the newest state"
    finite = torch.stack([tensor.isfinite().all() for tensor in tensors.values()]).tolist()
    if not all(finite):
        return NOT_FINITE, f"{list(tensors)[finite.index(False)]} is not finite; the newest state is from before"
    return None


def steps(task: Task, images_seen: int) -> Iterator[Moment]:
    """Every step from a point of the clock to the end of the run."""
    for seen in range(images_seen, task.schedule.total, task.schedule.batch):
        yield moment(task.schedule, seen)


def ticked(task: Task, now: Moment, images_seen: int) -> tuple[int, bool]:
    """(number of the tick that the step ended in, did it end a tick or the run?)."""
    every = 1000 * task.config.run.tick
    tick = math.floor(images_seen / every)
    return tick, tick > math.floor(now.images_seen / every) or images_seen == task.schedule.total


def to_device(batch: Batch, task: Task) -> tuple[Tensor, Tensor | None]:
    """Images as they are stored, labels where the run is conditional. On the CPU they are the feed's own memory, which
    it writes again when the next batch is asked for; a GPU has them before this returns."""
    images, labels = batch
    device = task.ranks.device
    host = [torch.from_numpy(part) for part in (images, labels if task.config.data.cond else None) if part is not None]
    if device.type == "cuda":
        stream = _copy_stream(device)  # its own: the host waits for the copy, not for the steps queued before it
        with torch.cuda.stream(stream):
            host = [part.to(device, non_blocking=True) for part in host]
        stream.synchronize()
        for part in host:
            part.record_stream(torch.cuda.current_stream(device))
    return host[0], host[1] if len(host) > 1 else None


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def finish(task: Task, run: Path, state: TrainState, code: int, reason: str) -> int:
    """Leave word of how it ended, for `saddle` and the launch scripts: torchrun turns every code of a worker into 1."""
    if task.ranks.first:
        write_json(run / EXIT, {"code": code, "reason": reason, "images_seen": state.images_seen})
    return code


def blame(state: TrainState) -> str:
    """The first parameter whose gradient is not finite."""
    for name in ("D", "G"):
        for parameter, p in getattr(state, name).named_parameters():
            if p.grad is not None and not torch.isfinite(p.grad).all():
                return f"{name}.{parameter}"
    return "no gradient of the last step"


def save(state: TrainState, task: Task, now: Moment, run: Path, about: dict[str, Any], writer: Writer) -> None:
    """A training state, a snapshot and a grid of the same moment: copied now, written while training goes on."""
    writer.wait()  # or there would be two copies
    seen, config = state.images_seen, task.config
    tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.tensors().items()}
    G, grid = copy.deepcopy(state.G_ema).cpu(), fake_grid(state, task, now.stage, now.alpha)

    def write() -> None:
        check_space(run, [*tensors.values(), *G.state_dict().values()])
        snapshot = run / f"{SNAPSHOT}{seen:010d}.safetensors"
        save_snapshot(snapshot, G, asdict(config), task.images, now.stage, now.alpha, seen)
        save_image(run / f"fakes{seen:010d}.png", grid)
        # Last: a run that is killed goes on from its newest state, and would not write again what comes with it.
        save_state(run, seen, tensors, about, config.run.keep, round(1000 * config.run.milestone))

    writer.start(write)


def fake_grid(state: TrainState, task: Task, stage: int, alpha: float) -> np.ndarray:
    """Samples of the averaged generator for the seeds 0, 1, 2, ..., classes in turn -> uint8 [H, W, C]."""
    count = _grid_count(task)
    labels = torch.arange(count) % state.G_ema.classes if state.G_ema.classes else None
    z = seed_latents(range(count), state.G_ema.z_dim)
    images = generate(state.G_ema, z, labels, stage=stage, alpha=alpha)
    return tile(to_uint8(images), grid_columns(count))


def real_grid(task: Task, feed: Feed) -> np.ndarray:
    """The first reals of the run -> uint8 [H, W, C]."""
    count = _grid_count(task)
    with closing(feed(iter([(0, count, task.schedule.last)]))) as batches:
        return tile(next(batches)[0], grid_columns(count))


def _grid_count(task: Task) -> int:
    """Fewer at high resolutions, so that a grid stays under about four megapixels."""
    height, width = (side * 2**task.schedule.last for side in task.images.base)
    return int(min(max(4_194_304 // (height * width), 4), GRID))


def save_image(path: Path, image: np.ndarray) -> None:
    """uint8 [H, W, C] -> PNG; one, three or four channels, or else the first one or three of them."""
    channels = image.shape[2]
    kept = channels if channels in (1, 3, 4) else 3 if channels > 3 else 1
    with replacing(path) as part:
        Image.fromarray(image[:, :, 0] if kept == 1 else image[:, :, :kept]).save(part, "PNG")


class Report:
    """What rank 0 tells: status lines and log.txt, stats.jsonl, and TensorBoard events where it is installed."""

    def __init__(self, task: Task, run: Path, images_seen: int):
        self.task, self.start, self.images_start = task, time.time(), images_seen
        self.last, self.last_images, self.maintenance = self.start, images_seen, 0.0
        drop_after(run / "stats.jsonl", images_seen)
        self.jsonl: TextIO = (run / "stats.jsonl").open("a")
        self.log: TextIO = (run / "log.txt").open("a")
        self.board, self.drift = tensorboard(run, images_seen), Drift()

    def say(self, line: str) -> None:
        """To standard output and log.txt."""
        print(line, flush=True)
        append(self.log, line)

    def tick(
        self, tick: int, now: Moment, images_seen: int, means: dict[str, float], waited: float, skipped: int
    ) -> None:
        """One status line and one line of stats.jsonl."""
        clock = time.time()
        seconds, images = clock - self.last - self.maintenance, images_seen - self.last_images
        left = (self.task.schedule.total - images_seen) * (clock - self.start) / (images_seen - self.images_start)
        size = "x".join(str(side * 2**now.stage) for side in self.task.images.base)
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
        self.say(
            f"tick {tick:<5d} kimg {images_seen / 1000:<9.1f} time {duration(clock - self.start):<12s}"
            f" sec/tick {seconds:<7.1f} sec/kimg {1000 * seconds / images:<8.2f} maintenance {self.maintenance:<6.1f}"
            f" cpumem {cpu_memory():<6.2f} gpumem {gpu_memory():<6.2f} resolution {size:<9s} alpha {now.alpha:<5.2f}"
            f" loss/D {means.get('Loss/D/loss', math.nan):<7.3f} loss/G {means.get('Loss/G/loss', math.nan):<7.3f}"
            f" left {duration(left)}" + (f" skipped {skipped}" if skipped else "")
        )
        for warning in self.drift.tick(now.stage, 1000 * seconds / images, resident_memory()):
            self.say(f"note: {warning}")
        append(self.jsonl, json.dumps({"images_seen": images_seen, "timestamp": clock, **values}))
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(name, value, images_seen)
        self.last, self.last_images, self.maintenance = clock, images_seen, 0.0

    def close(self) -> None:
        """Close the files."""
        for file in filter(None, (self.log, self.jsonl, self.board)):
            with suppress(OSError):
                file.close()

    def saved(self) -> None:
        """What has passed since the tick was maintenance."""
        self.maintenance = time.time() - self.last


def append(file: TextIO, line: str) -> None:
    """Write a line. On a full disk it waits in the file's buffer until there is room, and the run goes on."""
    try:
        file.write(line + "\n")
        file.flush()
    except OSError as error:
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
    days, hours, minutes = s // 86400, s // 3600 % 24, s // 60 % 60
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
