"""Time what each regularizer adds to a D step."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launch.cli import run
from launch.tables import json_option, save_rows, text_table

if TYPE_CHECKING:
    import torch

    from gan.state import Task
    from launch.benchmark.timing import Call, Times

BASELINES = ("none", "r1")


@click.command()
@click.option(
    "--resolution",
    type=click.IntRange(8, 1024),
    default=32,
    show_default=True,
    help="Side of the images, a power of two.",
)
@click.option("--batch", type=click.IntRange(1), default=16, show_default=True, help="Images in a batch.")
@click.option(
    "--channels", type=click.IntRange(1), default=64, show_default=True, help="Most channels in a layer of D."
)
@click.option("--objective", default="f:gan", show_default=True, help="As in `saddle train`; roth needs an f:... one.")
@click.option("--regularizers", metavar="NAME,...", help="Regularizers to measure.  [default: all]")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option(
    "--threads",
    type=click.IntRange(1, 4096),
    default=1,
    show_default=True,
    help="Intra-op threads: one is measured in CPU time, several in wall time.",
)
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True, help="Timings of each.")
@json_option
def main(
    regularizers: str | None, device: str, threads: int, repeats: int, json_path: Path | None, **options: Any
) -> None:
    """Time D steps with each regularizer, in turns within one run.

    A step computes the loss and the penalty, the backward pass and the update, as in training, but its images are made
    beforehand. The last two columns are its time divided by that of a step without a regularizer, and with R1.
    """
    import torch

    from gan.methods.regularizers import REGULARIZERS
    from gan.methods.rows import split_names
    from launch.benchmark.timing import DeviceClock, HostClock, contest, describe_machine, find_device, machine_line

    target = find_device(device)
    torch.set_num_threads(threads)
    names = dict.fromkeys((*BASELINES, *(REGULARIZERS if regularizers is None else split_names(regularizers))))
    steps = {name: d_step(task(name, target, **options)) for name in names}
    machine = describe_machine(target)
    click.echo(machine_line(machine))
    clock = DeviceClock(keep=0) if device == "cuda" else HostClock(threads)
    clock.budget = math.inf  # --repeats decides
    times, left_out = contest(steps, clock, repeats)
    rows = regularizer_rows(times)
    click.echo(text_table(rows))
    for name, reason in left_out.items():
        click.echo(f"{name} left out: {reason}")
    save_rows(json_path, {"machine": machine, **options, "rows": rows, "left_out": left_out})


def task(name: str, device: "torch.device", resolution: int, batch: int, channels: int, objective: str) -> "Task":
    """Training of a whole network at one resolution. Raises UserError for what cannot be, as training does."""
    from gan.config import TrainConfig, override
    from gan.errors import UserError
    from gan.families import build_task
    from gan.methods.pairs import configured
    from gan.ranks.distributed import Ranks, set_precision
    from gan.schedules import build_schedule
    from launch.settings import noise_format

    images = noise_format(resolution)
    values = {"batch": batch, "growth.mode": "none", "network.channel_max": channels}
    config = override(TrainConfig(), values | {"objective.name": objective, "regularizer.name": name})
    ranks = Ranks(device=device)
    set_precision(ranks, config.distributed.deterministic)
    if configured(config)[0].discriminator is None:
        raise UserError(f"--objective={objective} has no critic, and so no D step")
    return build_task(config, build_schedule(config, images.last), images, ranks)


def d_step(task: "Task") -> "Call":
    """D's part of `train_step`, at a learning rate of 0: every call does the same work on the same images."""
    import torch

    from gan.methods.pairs import configured, critic_loss
    from gan.parts import Part
    from gan.ranks.gradients import GradientSum
    from gan.schedules import moment
    from gan.state import initial_state
    from gan.trainer import show

    objective, regularizer = configured(task.config)
    state = initial_state(task)
    D = state.networks["D"]
    now = moment(task.schedule, 0)
    gamma = torch.tensor(task.gamma(now), device=task.ranks.device)
    batch = task.config.batch
    height, width = task.images.size(task.images.last)
    generator = torch.Generator().manual_seed(0)
    real, fake = (2 * torch.rand(2, batch, 3, height, width, generator=generator) - 1).to(task.ranks.device)
    part = Part(real, None, task.draws(0))
    critic = show(D, part, task, now, 1.0, gamma, state.augmentation[0])

    def step() -> None:
        loss = critic_loss(objective, regularizer, critic, real, fake)
        gradients = GradientSum(D.parameters(), batch)
        gradients.add(loss.total(gamma / 2))
        gradients.step(state.optimizers["d_optimizer"], lr=0.0, void=torch.zeros_like(state.skipped[0]))
        if regularizer.constrain:
            regularizer.constrain(D, gamma)

    return step


def regularizer_rows(times: Mapping[str, "Times"]) -> list[dict[str, Any]]:
    """Milliseconds of a step, and what they are of the baselines' where those took part."""
    none, r1 = (times[name].median if name in times else math.nan for name in BASELINES)
    return [
        {
            "regularizer": name,
            "ms": t.median,
            "p10": t.p10,
            "p90": t.p90,
            "x none": t.median / none,
            "x r1": t.median / r1,
        }
        for name, t in times.items()
    ]


if __name__ == "__main__":
    run(main, "saddle benchmark penalties")
