"""The loop around the training step. It logs, checks and saves; it does not change the weights.

At each tick the host waits for the device, statistics are summed over ranks and logged, and the ranks' weights are
compared. Every `snap` ticks, and at the end, rank 0 saves a training state, a snapshot and a grid.
"""

import copy
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict
from functools import cache, partial
from itertools import tee
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gan.checkpoint import POSTHOC, SNAPSHOT, save_snapshot, save_state
from gan.ranks.distributed import find_strangers, fingerprint, from_first, on_first
from gan.ranks.signals import PREEMPTED, StopRequest, listening
from gan.ranks.statistics import Statistics
from gan.ranks.watchdog import Watchdog, naming
from gan.run.directories import check_exists, write_exit
from gan.run.likeness import Likeness
from gan.run.pictures import fake_grid, real_grid, save_image
from gan.run.report import Report
from gan.run.scoring import Scorer, Scoring, await_scores, start_scoring
from gan.run.stepper import Stepper
from gan.run.writer import Writer, check_space, remove_parts
from gan.schedules import Moment, moment
from gan.state import Batch, Feed, Task, TrainState

DONE = 0
REFUSED = 2
NOT_FINITE = 3


def train(
    state: TrainState, task: Task, feed: Feed, run: Path, about: dict[str, Any], scorer: Scorer | None = None
) -> int:
    """Train from `state` to the end of the schedule. -> the exit code, which is also written to `run/exit.json`.

    feed: maps requests (first sample, count, stage) to batches of uint8 images and labels, and reads ahead. A batch is
    valid until the next one is requested.
    about: plain values that are saved with every training state.
    scorer: scores snapshots beside the training.
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
        scoring = None
        if report:
            remove_parts(run)
        if report and scorer:
            scoring = stack.enter_context(closing(start_scoring(scorer, task, run, state.images_seen, report.say)))
        if report and state.images_seen == 0 and task.images.pictures:
            save_first_pictures(state, task, feed, run, report)
        batches = stack.enter_context(closing(feed(requests)))
        stop_requests = CopyToHost(state.stop)
        stepper = Stepper(state, task, stats, report.say if report else lambda line: None)
        likeness = Likeness(task, feed) if task.images.pictures else None
        for now in moments:
            begin = time.perf_counter()
            images, labels = to_device(next(batches), task)
            waited += time.perf_counter() - begin
            stepper.step(now, images, labels, float(bool(stopping)))
            # The request that was summed in the step before, so that the host need not wait for this step. All ranks
            # read it after the same step.
            stop = stop_requests.read()
            stop_requests = CopyToHost(state.stop)
            watchdog.beat(now.step)
            tick = completed_ticks(task, state.images_seen)
            before = completed_ticks(task, now.images_seen)
            done = state.images_seen == task.schedule.total
            if not (tick > before or done or stop):
                continue
            means = stats.take()
            skipped, in_a_row = (int(n) for n in state.skipped.tolist())
            means["Progress/augmentation"] = state.augmentation[0].item()
            failure = find_failure(state, task, in_a_row)
            alike = likeness.tick(state, now) if likeness and not failure else {}
            if report:
                report.tick(tick, now, state.images_seen, means | alike, waited, skipped)
                for line in likeness.warnings(alike, now) if likeness else ():
                    report.say(line)
            waited = 0.0
            on_first(task.ranks, partial(check_exists, run))
            if failure:
                code, reason = failure
                if report:
                    report.say(f"stopped: {reason}")
                return finish(task, run, state, code, reason)
            if report and writer and (tick // config.snap > before // config.snap or done or stop):
                save(state, task, now, run, about, writer, scoring)
                report.saved()
            if stop and not done:
                return preempted(task, run, state, stopping, report, writer)
        failed = writer.wait() if writer else None
        if scorer:
            await_scores(scoring, lambda: bool(stopping), lambda: watchdog.beat(watchdog.step))
    return finish(task, run, state, REFUSED if failed else DONE, failed or "finished")


class CopyToHost:
    """A copy of a 0-dim tensor to the host. It is started at once and read later, so that the host does not wait for
    work that was queued on the device after it."""

    def __init__(self, value: Tensor):
        self.value = value.to("cpu", non_blocking=True)
        self.event = torch.cuda.Event() if value.is_cuda else None
        if self.event:
            self.event.record()

    def read(self) -> bool:
        """Wait until the copy is complete. -> is the number more than zero?"""
        if self.event:
            self.event.synchronize()
        return bool(self.value)


def preempted(
    task: Task, run: Path, state: TrainState, stopping: StopRequest, report: "Report | None", writer: Writer | None
) -> int:
    """Wait until rank 0 has saved the state, then log why the run stops. -> the exit code."""
    reason = f"{stopping.by or 'another rank'} asked for it"
    failed = writer.wait() if writer else None
    code = finish(task, run, state, PREEMPTED, f"stopped: {reason}" + (f"; {failed}" if failed else ""))
    from_first(None)  # the other ranks end only after rank 0 has saved
    if report:
        saved = "the same command resumes from the state before" if failed else "saved, the same command resumes"
        report.say(f"stopped after {state.images_seen} images: {reason}; {saved}")
    return code


def find_failure(state: TrainState, task: Task, in_a_row: int) -> tuple[int, str] | None:
    """(exit code, reason) if the run must stop without saving, the same on all ranks.

    in_a_row: how many of the last steps were void because of non-finite values.
    """
    if in_a_row >= task.config.run.max_skipped:
        where = f"in {first_nonfinite_gradient(state)}; {task.family.remedy}"
        return NOT_FINITE, f"the gradients of {in_a_row} steps in a row were not finite, {where}"
    tensors = state.tensors()
    if strangers := find_strangers(fingerprint(tensors.values()), task.ranks):
        who = f"rank{'s' * (len(strangers) > 1)} {', '.join(map(str, strangers))}"
        reason = f"the weights on {who} differ from those on the other ranks: check memory and versions there"
        return REFUSED, f"{reason}; the same command resumes from the newest state"
    finite = torch.stack([tensor.isfinite().all() for tensor in tensors.values()]).tolist()
    if not all(finite):
        name = list(tensors)[finite.index(False)]
        return NOT_FINITE, f"{name} is not finite; the newest saved state is from before that"
    return None


def steps(task: Task, images_seen: int) -> Iterator[Moment]:
    """Every step from `images_seen` to the end of the run."""
    for seen in range(images_seen, task.schedule.total, task.schedule.batch):
        yield moment(task.schedule, seen)


def completed_ticks(task: Task, images_seen: int) -> int:
    """How many ticks are over. One step may end several, where a tick is shorter than a batch."""
    return math.floor(images_seen / (1000 * task.config.run.tick))


def to_device(batch: Batch, task: Task) -> tuple[Tensor, Tensor | None]:
    """A batch's uint8 images, and its labels if the run is conditional, as tensors on the rank's device.

    On a CPU they share the feed's memory, which is overwritten when the next batch is requested. On a GPU the copy is
    complete when this returns.
    """
    images, labels = batch
    device = task.ranks.device
    used = [images] if labels is None or not task.config.data.cond else [images, labels]
    host = [torch.from_numpy(part) for part in used]
    if device.type == "cuda":
        # On a stream of its own: the host waits for this copy, but not for the steps that were queued before it.
        stream = _copy_stream(device)
        with torch.cuda.stream(stream):
            host = [part.to(device, non_blocking=True) for part in host]
        copied = stream.record_event()
        copied.synchronize()
        for part in host:
            part.record_stream(torch.cuda.current_stream(device))
    return host[0], host[1] if len(host) > 1 else None


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def finish(task: Task, run: Path, state: TrainState, code: int, reason: str) -> int:
    """Write to exit.json how the run ended, and return `code`. Scripts need the file, as torchrun exits with 1 for
    every non-zero code of a rank."""
    if task.ranks.first:
        write_exit(run, code, reason, state.images_seen)
    return code


def save_first_pictures(state: TrainState, task: Task, feed: Feed, run: Path, report: Report) -> None:
    """Save grids of reals and of the untrained generator's images. The run goes on without them if that fails."""
    try:
        save_image(run / "reals.png", real_grid(task, feed))
        save_image(run / "fakes_init.png", fake_grid(state, task, stage=task.schedule.last, alpha=1.0))
    except OSError as error:
        report.say(f"note: no pictures of the start: {error}")


def first_nonfinite_gradient(state: TrainState) -> str:
    """The name of the first parameter whose gradient is not finite."""
    for name in reversed(state.trains.values()):  # D's update comes before G's
        for parameter, p in state.networks[name].named_parameters():
            if p.grad is not None and not torch.isfinite(p.grad).all():
                return f"{name}.{parameter}"
    return "no gradient of the last step"


def save(
    state: TrainState,
    task: Task,
    now: Moment,
    run: Path,
    about: dict[str, Any],
    writer: Writer,
    scoring: Scoring | None,
) -> None:
    """Save a training state, a snapshot and a grid: they are copied now and written while training continues. Then the
    snapshot is scored, unless its last stage is still fading in."""
    writer.wait()  # for the save before this one, so that memory holds one copy at a time
    seen = state.images_seen
    config = task.config
    tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.tensors().items()}
    snapshot = run / f"{SNAPSHOT}{seen:010d}.safetensors"
    files = {snapshot: task.family.average}
    files |= {run / f"{POSTHOC}{seen:010d}-{length:g}.safetensors": name for name, length in task.posthoc.items()}
    averages = {path: copy.deepcopy(state.networks[name]).cpu() for path, name in files.items()}
    grid = fake_grid(state, task, now.stage, now.alpha) if task.images.pictures else None

    def write() -> None:
        check_space(run, [*tensors.values(), *(p for G in averages.values() for p in G.state_dict().values())])
        for path, G in averages.items():
            save_snapshot(path, G, asdict(config), task.images, now.stage, now.alpha, seen)
        if grid is not None:
            save_image(run / f"fakes{seen:010d}.png", grid)
        # The state is written last: a run that is killed here resumes from the state before, and saves all again.
        save_state(run, seen, tensors, about, config.run.keep, round(1000 * config.run.milestone))
        if scoring and now.alpha == 1:
            scoring.submit(snapshot)

    writer.start(write)
