"""Starting or resuming a run: everything between a plan with its directory and the training loop."""

import platform
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import torch

from gan.checkpoint import initial_weights, load_state, newest_state
from gan.errors import UserError
from gan.files import write_json
from gan.ranks.distributed import Ranks, on_first, same_on_all, set_precision, set_threads
from gan.rehearsal import Rehearsal
from gan.run.directories import EXIT, OPTIONS, write_exit, writing
from gan.run.loop import REFUSED, finish, train
from gan.run.plan import RunPlan
from gan.run.room import is_out_of_memory, out_of_memory, settle_micro
from gan.run.scoring import Scorer, await_scores, start_scoring
from gan.state import Feed, initial_state
from gan.tensor_files import layout_of
from ops.registry import kernels


def train_run(
    plan: RunPlan,
    run: Path,
    feed: Feed,
    ranks: Ranks,
    say: Callable[[str], object] = print,
    scorer: Scorer | None = None,
) -> int:
    """Restore a run's newest undamaged state, or start it, and train to the end of its schedule. -> the exit code.

    feed: maps requests (first sample, count, stage) to batches. The caller must have locked the run by
    `gan.run.directories.hold`. An example for a notebook, with a dataset that `data.loader.load` reads:

        plan = plan_run(override(TrainConfig(), {"run.kimg": 80, "batch": 32}), images, "digits")
        run = open_run(plan, Path("runs"))
        with hold(run):
            train_run(plan, run, partial(load, dataset, seed=plan.config.seed), Ranks())
    """
    layout = layout_of(Rehearsal(plan.config, plan.images).state.tensors())
    batch = plan.config.batch
    path, passed_over = on_first(ranks, lambda: newest_state(run, layout, batch))
    tensors: dict[str, torch.Tensor] = {}
    saved: dict[str, Any] = {"images_seen": 0}
    if path:
        tensors, saved = load_state(path, layout, batch)
    if saved["images_seen"] >= plan.schedule.total:
        return finished(plan, run, saved["images_seen"], ranks, say, scorer)
    now = set_up(plan, ranks, saved)
    plan = replace(plan, config=settle_micro(plan.config, plan.images, ranks))
    task = plan.task(ranks)
    state = initial_state(task)
    if path:
        state.load_tensors(tensors, saved["images_seen"])
    elif plan.config.init_from:
        initial_weights(plan.config.init_from, state.networks)
    on_first(ranks, lambda: begin(plan, run))
    if ranks.first:
        for line in announcement(plan, run, now, saved, path, passed_over):
            say(line)
    try:
        return train(state, task, feed, run, now, scorer)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        message = f"after {state.images_seen} images: {out_of_memory(error, ranks.device)}"
        finish(task, run, state, REFUSED, message)
        raise UserError(f"{message}; the same command resumes from the newest state") from error


def begin(plan: RunPlan, run: Path) -> None:
    """Write the options of the run, which has not ended. Raises UserError if that is not possible."""
    with writing(str(run)):
        (run / EXIT).unlink(missing_ok=True)
        write_json(run / OPTIONS, plan.options)


def finished(
    plan: RunPlan, run: Path, images_seen: int, ranks: Ranks, say: Callable[[str], object], scorer: Scorer | None
) -> int:
    """Say that the run is finished already, and score its last snapshot if that is not done yet. -> exit code 0."""
    if ranks.first:
        say(f"{run} is finished ({images_seen / 1000:g} kimg); resume=none trains a new run")
        write_exit(run, 0, "finished", images_seen)
    if scorer:
        with ExitStack() as stack:
            scoring = None
            if ranks.first:
                task = plan.task(ranks)
                scoring = stack.enter_context(closing(start_scoring(scorer, task, run, images_seen, say)))
            await_scores(scoring)
    return 0


def set_up(plan: RunPlan, ranks: Ranks, saved: dict[str, Any]) -> dict[str, Any]:
    """Set threads and precision as they were when the state was saved. -> the values that must be the same as then for
    the resumed run to be bit-equal."""
    how = plan.config.distributed
    set_precision(ranks, how.deterministic or how.exact)
    same_world = saved.get("world_size") == ranks.world
    recorded = saved.get("threads", 0) if how.exact or same_world else 0
    now = {
        "world_size": ranks.world,
        "threads": set_threads(plan.config.run.threads or recorded or int(how.exact)),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "machine": f"{platform.machine()} {ranks.device.type}",
        "ops": same_on_all("the ops", kernels()),
    }
    return now


def announcement(
    plan: RunPlan,
    run: Path,
    now: dict[str, Any],
    saved: dict[str, Any],
    path: Path | None,
    passed_over: Sequence[str],
) -> list[str]:
    """The lines to print before training starts: what runs, where, and what the user should know."""
    lines = [f"run {run}"]
    lines += [f"passed over: {line}" for line in passed_over]
    lines.append(f"{plan.schedule.total / 1000:g} kimg, batch {plan.config.batch}")
    if plan.options["config"]["distributed"]["micro"] == "auto":
        lines.append(f"distributed.micro=auto: {plan.config.distributed.micro or 'all'} samples per backward pass")
    lines.append(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in now.items()))
    classes = len(plan.images.class_names)
    if classes and not plan.config.data.cond:
        lines.append(f"note: the dataset has {classes} classes, but training does not use them; data.cond=1 does")
    if plan.config.optimizer.decay_to != 1 and plan.config.optimizer.decay_from == 1:
        lines.append("note: optimizer.decay_to does nothing without optimizer.decay_from, where the decay begins")
    lines += [f"note: {line}" for line in plan.task(Ranks()).family.remarks(plan.config)]
    if path:
        lines.append(f"going on from {path.name}")
        alike = {"world_size"} if plan.config.distributed.exact else set()
        differ = [name for name in now if name not in alike and saved.get(name) != now[name]]
        if differ:
            changed = ", ".join(f"{name.replace('_', ' ')} was {saved.get(name)}" for name in differ)
            lines.append(f"note: {changed}: samples and draws stay the same; results are equal only up to rounding")
    return lines
