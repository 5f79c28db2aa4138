"""Run under torchrun by test_distributed: train a few cases on this many ranks, and write what rank 0 has.

rank_worker.py OUTPUT CASE ...      a case is NAME;STEPS;KEY=VALUE;KEY=VALUE;...
"""

import sys

import torch
from tiny import tiny_config, tiny_feed, tiny_task

from gan import distributed
from gan.config import parse_assignment
from gan.loop import steps, to_device
from gan.statistics import Statistics
from gan.trainer import initial_state, train_step


def train_case(count: int, assignments: list[str], ranks: distributed.Ranks) -> dict:
    """-> the gradients after the first step, the losses of the first five, and the weights after `count`."""
    config = tiny_config(dict(parse_assignment(a) for a in assignments))
    task = tiny_task(config, ranks)
    state, losses, gradients = initial_state(task), [], {}
    for now in list(steps(task, 0))[:count]:
        images, labels = to_device(next(tiny_feed(iter([(*task.samples(now.images_seen), now.stage)]))), task)
        stats = Statistics()
        train_step(state, task, now, images, labels, stats)
        losses.append(stats.take())
        if not gradients:
            gradients = {
                net: {n: p.grad.clone() for n, p in getattr(state, net).named_parameters() if p.grad is not None}
                for net in ("G", "D")
            }
    weights = state.tensors() if count > 1 else {}
    return {"gradients": gradients, "losses": losses[:5], "weights": weights, "stage": now.stage}


def main() -> None:
    torch.set_num_threads(1)
    ranks = distributed.start()
    results = {}
    for case in sys.argv[2:]:
        name, count, *assignments = case.split(";")
        results[name] = train_case(int(count), assignments, ranks)
    if ranks.first:
        torch.save(results, sys.argv[1])
    distributed.stop()
    distributed.end_rank()


if __name__ == "__main__":
    main()
