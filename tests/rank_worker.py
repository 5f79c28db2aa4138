"""Run under torchrun by test_distributed: train a few cases on this many ranks, and write what rank 0 has.

rank_worker.py OUTPUT CASE ...      a case is NAME;STEPS;KEY=VALUE;KEY=VALUE;...
Keys of the last rank alone: poison.D, poison.G, a step at which that network's gradient is not finite; stop, steps at
which it is asked to stop.
"""

import hashlib
import math
import sys
from contextlib import nullcontext

import torch
import torch.distributed as dist
from tiny import broken_generator_loss, tiny_config, tiny_feed, tiny_task

from gan.config import parse_assignment
from gan.errors import UserError
from gan.inputs import step_inputs
from gan.ranks import distributed
from gan.ranks.statistics import Statistics
from gan.run.likeness import Likeness
from gan.run.loop import steps, to_device
from gan.state import initial_state


def train_case(count: int, assignments: list[str], ranks: distributed.Ranks) -> dict:
    """-> the gradients after the first step, the losses of the first five, and what `count` steps led to."""
    values = dict(parse_assignment(a) for a in assignments)
    mishaps = {k: values.pop(k) for k in ("poison.D", "poison.G", "stop") if k in values}
    mishaps = mishaps if ranks.rank == ranks.world - 1 else {}
    task = tiny_task(tiny_config(values), ranks)
    state = initial_state(task)
    losses, gradients, skipped, stops = [], {}, [], []
    for now in list(steps(task, 0))[:count]:
        images, labels = to_device(next(tiny_feed(iter([(*task.samples(now.images_seen), now.stage)]))), task)
        if now.step == mishaps.get("poison.D"):
            images = torch.full(images.shape, math.nan)
        stopping = float(str(now.step) in str(mishaps.get("stop", "")).split(","))
        stats = Statistics()
        now_broken = now.step == mishaps.get("poison.G")
        with broken_generator_loss() if now_broken else nullcontext():
            task.family.step(state, task, now, step_inputs(task, now, images, labels, stopping), stats)
        losses.append(stats.take())
        skipped.append(state.skipped.tolist())
        stops.append(state.stop.item())
        if not gradients:
            gradients = {
                net: {n: p.grad.clone() for n, p in state.networks[net].named_parameters() if p.grad is not None}
                for net in task.family.networks
            }
    weights = state.tensors() if count > 1 else {}
    distributed.same_on_all("weights", digest(weights))
    alike = Likeness(task, tiny_feed).tick(state, now)
    outcome = {"weights": weights, "stage": now.stage, "skipped": skipped, "stops": stops, "alike": alike}
    return {"gradients": gradients, "losses": losses[:5], **outcome}


def digest(tensors: dict[str, torch.Tensor]) -> str:
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors.values())).hexdigest()


def differing(ranks: distributed.Ranks) -> list[str]:
    """What every rank says where the last has other ops than the others, and then rank 1 other weights."""
    assert distributed.same_on_all("the dataset", "one") == "one"
    said = "nothing"
    try:
        distributed.same_on_all("the ops", "compiled" if ranks.rank < ranks.world - 1 else "reference")
    except UserError as error:
        said = str(error)
    value = distributed.fingerprint([torch.tensor([1.0, 2.0 + (ranks.rank == 1)])])
    rows = [""] * ranks.world
    dist.all_gather_object(rows, f"{said}; {distributed.find_strangers(value, ranks)}")
    return rows


def main() -> None:
    torch.set_num_threads(1)
    ranks = distributed.start()
    results = {}
    for case in sys.argv[2:]:
        name, count, *assignments = case.split(";")
        results[name] = train_case(int(count), assignments, ranks)
    if ranks.world > 2:
        results["differing"] = differing(ranks)
    if ranks.first:
        torch.save(results, sys.argv[1])
    distributed.stop()
    distributed.end_rank()


if __name__ == "__main__":
    main()
