"""The loop around the step: what a run does now and then. Nothing here changes the weights.

Once per tick statistics are reduced and logged, ranks compared, and the host waits for the device; every `snap` ticks
and at the end rank 0 saves a training state, a snapshot and a grid.
"""

import copy
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict
from functools import cache
from itertools import tee
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gan.checkpoint import SNAPSHOT, save_snapshot, save_state
from gan.files import write_json
from gan.ranks.distributed import find_strangers, fingerprint, from_first
from gan.ranks.signals import PREEMPTED, StopRequest, listening
from gan.ranks.statistics import Statistics
from gan.ranks.watchdog import Watchdog, naming
from gan.run.directories import EXIT
from gan.run.pictures import fake_grid, real_grid, save_image
from gan.run.report import Report
from gan.run.writer import Writer, check_space, remove_parts
from gan.schedules import Moment, moment
from gan.state import Batch, Feed, Task, TrainState

DONE = 0
REFUSED = 2
NOT_FINITE = 3


def train(state: TrainState, task: Task, feed: Feed, run: Path, about: dict[str, Any]) -> int:
    """Go on from `state` to the end of the schedule. -> the exit code, also written to `run/exit.json`.

    feed: maps requests (first sample, count, stage) to batches of uint8 images and labels, reading ahead. A batch is
    valid until the next one is asked for.
    about: plain values saved with every training state.
    """
    stats = Statistics()
    waited = 0.0
    moments, moments_ahead = tee(steps(task, state.images_seen))
    requests = ((*task.samples(now.images_seen), now.stage) for now in moments_ahead)
    with ExitStack() as stack:
        stopping = stack.enter_context(listening())
        config = task.config.run
        timeout = task.config.distributed.timeout
        watchdog = stack.enter_context(closing(Watchdog(task.ranks, run, config.watchdog, stopping, timeout)))
        stack.enter_context(naming(watchdog, lambda: f"after {state.images_seen} images"))
        report = stack.enter_context(closing(Report(task, run, state.images_seen))) if task.ranks.first else None
        writer = stack.enter_context(closing(Writer(report.say))) if report else None
        if report:
            remove_parts(run)
        if report and state.images_seen == 0:
            save_image(run / "reals.png", real_grid(task, feed))
            save_image(run / "fakes_init.png", fake_grid(state, task, stage=task.schedule.last, alpha=1.0))
        batches = stack.enter_context(closing(feed(requests)))
        asked = Arriving(state.stop)
        for now in moments:
            begin = time.perf_counter()
            images, labels = to_device(next(batches), task)
            waited += time.perf_counter() - begin
            task.family.step(state, task, now, images, labels, stats, float(bool(stopping)))
            # Read one step late, so that the host need not wait for this one; late alike on all ranks.
            stop = asked.read()
            asked = Arriving(state.stop)
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
        remedy = "lower the learning rates (optimizer.*_lr), or raise regularizer.gamma"
        return NOT_FINITE, f"{in_a_row} steps in a row not finite, in {blame(state)}; {remedy}"
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
    used = [images] if labels is None or not task.config.data.cond else [images, labels]
    host = [torch.from_numpy(part) for part in used]
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
    for name in reversed(state.trains.values()):  # D's update comes before G's
        for parameter, p in state.networks[name].named_parameters():
            if p.grad is not None and not torch.isfinite(p.grad).all():
                return f"{name}.{parameter}"
    return "no gradient of the last step"


def save(state: TrainState, task: Task, now: Moment, run: Path, about: dict[str, Any], writer: Writer) -> None:
    """A training state, a snapshot and a grid of the same moment: copied now, written while training goes on."""
    writer.wait()  # or there would be two copies
    seen = state.images_seen
    config = task.config
    tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.tensors().items()}
    G = copy.deepcopy(state.networks[task.family.average]).cpu()
    grid = fake_grid(state, task, now.stage, now.alpha)

    def write() -> None:
        check_space(run, [*tensors.values(), *G.state_dict().values()])
        snapshot = run / f"{SNAPSHOT}{seen:010d}.safetensors"
        save_snapshot(snapshot, G, asdict(config), task.images, now.stage, now.alpha, seen)
        save_image(run / f"fakes{seen:010d}.png", grid)
        # Last: a run that is killed goes on from its newest state, and would not write again what comes with it.
        save_state(run, seen, tensors, about, config.run.keep, round(1000 * config.run.milestone))

    writer.start(write)
