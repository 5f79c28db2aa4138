"""Time the training step of each stage on one rank and on several, and predict its time on many GPUs."""

import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch

from data.dataset import ImageDataset
from gan.config import TrainConfig, override, parse_assignment
from gan.errors import UserError
from gan.methods.pairs import configured
from gan.ranks import distributed
from launch.benchmark.step_contest import ALSO, measure_stages, noise_format
from launch.benchmark.step_model import ASSUMPTIONS, Link, StepCost, line, measure_link, predict
from launch.benchmark.timing import describe_machine, machine_line
from launch.cli import run
from launch.ranks import call, end_with_parent, torchrun
from launch.settings import image_format, read_preset
from launch.tables import json_option, save_rows, text_table

NARROW = 64  # channels at most where there is no GPU and nobody says otherwise
StageTimes = dict[str, Any]  # what `step_contest.stage_row` makes of one stage on one number of ranks


@click.command()
@click.option(
    "--gpus", metavar="N,...", default="1,2", show_default=True, help="Numbers of ranks on this host to measure."
)
@click.option("--preset", default="32", show_default=True, help="A name in launch/presets, or a .toml file.")
@click.option("--resolution", type=int, default=32, show_default=True, help="Final resolution, without --data.")
@click.option("--batch", type=click.IntRange(1), default=16, show_default=True, help="Samples of each rank.")
@click.option("--data", type=click.Path(), help="Dataset to read. [default: noise, made beforehand]")
@click.option("--stages", metavar="N,...", help="Stages to measure. [default: all]")
@click.option("--also", metavar="NAME,...", default="", help=f"More contestants: {', '.join(ALSO)}.")
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True, help="Timings of each contestant.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Intra-op threads of each rank.")
@click.option(
    "--predict",
    "worlds",
    metavar="N,...",
    default="8,64,512",
    show_default=True,
    help="Numbers of GPUs to predict for.",
)
@click.option(
    "--global-batch", type=int, default=0, help="Predict for this global batch, instead of --batch on each GPU."
)
@click.option(
    "--latency", type=float, default=10.0, show_default=True, help="Microseconds between GPUs, for the prediction."
)
@click.option(
    "--bandwidth", type=float, default=25.0, show_default=True, help="GB/s that a GPU sends, for the prediction."
)
@click.option(
    "--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Set a key of gan/config.py; repeatable."
)
@json_option
@click.option("--rows", type=click.Path(path_type=Path), hidden=True)
def main(**flags: Any) -> int:
    """Measure the training step of each stage: computing, communicating, waiting for data; and predict many GPUs.

    Contestants take turns in the same processes: `joined` ranks sum their gradients, ranks `alone` do the same work but
    do not communicate. Communication is the time that joined ranks take longer; "of alone" is the images per second
    of all joined ranks, divided by those of all ranks alone.
    """
    end_with_parent()
    config = read_config(flags)
    worlds = numbers("--gpus", flags["gpus"])
    stages = numbers("--stages", flags["stages"], least=0) if flags["stages"] else None
    also = [name for name in flags["also"].split(",") if name]
    if set(also) - set(ALSO):
        raise UserError(f"--also={flags['also']}: known are {', '.join(ALSO)}")
    configured(config)
    dataset = ImageDataset(flags["data"]) if flags["data"] else None
    images = image_format(dataset, config) if dataset else noise_format(flags["resolution"])
    stages = stages or list(range(images.last + 1))
    if max(stages) > images.last:
        raise UserError(f"--stages={flags['stages']}: the last one is {images.last}")
    if "WORLD_SIZE" in os.environ:
        ranks, rows = measure_stages(config, images, dataset, stages, also, flags["rounds"], flags["threads"])
        if ranks.first:
            leave_rows(rows, also, flags)
        distributed.stop()
        distributed.end_rank()
    distributed.check_devices(max(worlds))
    predicted = numbers("--predict", flags["worlds"])
    torch.set_num_threads(flags["threads"])
    machine = describe_machine(torch.device("cuda" if torch.cuda.is_available() else "cpu")) | {"clock": "wall time"}
    click.echo(machine_line(machine))
    measured = [row for world in worlds for row in start_ranks(world, flags)]
    click.echo(text_table([table_row(row, also) for row in measured]) + "\n")
    slots = math.inf if machine["device"] == "cuda" else machine["cores"] / flags["threads"]
    report: dict[str, Any] = {"machine": machine, "config": asdict(config), "measured": measured}
    costs = {row["stage"]: step_cost(row) for row in measured if row["gpus"] == 1}
    if costs:
        report |= {"assumptions": ASSUMPTIONS, "slots": slots, "checks": check_model(measured, costs, slots)}
        link = Link(flags["latency"] / 1e6, flags["bandwidth"] * 1e9)
        ones = [row for row in measured if row["gpus"] == 1]
        report["predictions"] = list(extrapolate(ones, predicted, flags, link))
        show_model(report, flags)
    save_rows(flags["json_path"], report)
    return 0


def numbers(what: str, text: str, least: int = 1) -> list[int]:
    """ "1,2" -> [1, 2]. UserError for anything else."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < least:
        raise UserError(f"{what}={text}: write numbers of at least {least}, as in {what}=1,2")
    return values


def read_config(flags: Mapping[str, Any]) -> TrainConfig:
    """The preset and --set, at one resolution after the other without fading."""
    values = dict(parse_assignment(text) for text in flags["assignments"])
    if not torch.cuda.is_available() and not {"network.widths", "network.channel_max"} & values.keys():
        values["network.channel_max"] = NARROW
    wanted = {"batch": flags["batch"], "growth.mode": "none", "growth.shares": ()}
    return override(override(TrainConfig(), read_preset(flags["preset"]) | wanted), values)


def start_ranks(world: int, flags: Mapping[str, Any]) -> list[StageTimes]:
    """Measure on so many ranks of this host -> a row per stage."""
    passed = ("preset", "resolution", "batch", "data", "stages", "also", "rounds", "threads")
    arguments = [f"--{name}={flags[name]}" for name in passed if flags[name] not in (None, "")]
    with tempfile.TemporaryDirectory(prefix="saddle-step-") as folder:
        rows = Path(folder) / "rows"
        given = [*arguments, *(f"--set={text}" for text in flags["assignments"]), f"--rows={rows}"]
        if call(torchrun(world, "launch.benchmark.step_benchmark", given), world) or not rows.exists():
            raise UserError(f"--gpus={world}: the ranks did not finish; what they said is above")
        return torch.load(rows, weights_only=True)


def leave_rows(rows: Sequence[StageTimes], also: Sequence[str], flags: Mapping[str, Any]) -> None:
    """Of rank 0: for the command that started it, or as the table where torchrun was called by hand."""
    if flags["rows"]:
        torch.save(rows, flags["rows"])
        return
    click.echo(text_table([table_row(row, also) for row in rows]))
    save_rows(flags["json_path"], {"measured": rows})


def table_row(row: StageTimes, also: Sequence[str]) -> dict[str, Any]:
    """A stage's times for people."""
    joined = row["ms"]["joined"]
    alone = row["ms"]["alone"]
    cells = {
        "gpus": row["gpus"],
        "stage": row["size"],
        "step ms": round(joined, 1),
        "compute ms": round(alone, 1),
        "communication ms": round(max(joined - alone, 0.0), 1),
        "data wait ms": round(row["data_wait_ms"], 2),
        "MB summed": round(sum(row["messages"]) / 1e6, 3),
        "img/s": round(row["images_per_second"], 1),
        "of alone": f"{row['of_alone']:.3f}",
    }
    return cells | {f"{name} / joined": f"{row['over_joined'][name]:.2f}" for name in also}


def step_cost(row: StageTimes) -> StepCost:
    """What one rank alone takes, from its whole batch and half of it."""
    points = [(row["shares"][name], row["ms"][name] / 1e3) for name in ("half", "alone")]
    fixed, per_sample = line(*points) if points[0][0] < points[1][0] else (0.0, points[1][1] / points[1][0])
    return StepCost(fixed, per_sample, tuple(row["messages"]))


def check_model(measured: Sequence[StageTimes], costs: Mapping[int, StepCost], slots: float) -> list[dict[str, Any]]:
    """Steps of several local ranks, predicted from one rank's, beside what they took."""
    rows = []
    for row in measured:
        if row["gpus"] == 1 or row["stage"] not in costs:
            continue
        small, large, size = row["link"]
        link = measure_link(small, large, size, row["gpus"])
        guess = predict(costs[row["stage"]], row["gpus"], row["shares"]["joined"], link, slots)
        step = 1e3 * guess.seconds
        took = row["ms"]["joined"]
        cells = {"gpus": row["gpus"], "stage": row["size"], "predicted ms": round(step, 1), "took ms": round(took, 1)}
        rows.append(cells | {"off by": f"{step / took - 1:+.0%}", "link us": round(link.latency * 1e6),
                             "link GB/s": round(link.bandwidth / 1e9, 2)})  # fmt: skip
    return rows


def extrapolate(
    rows: Sequence[StageTimes], worlds: Sequence[int], flags: Mapping[str, Any], link: Link
) -> Iterator[dict[str, Any]]:
    """A row for each stage and number of GPUs; efficiency is of the images per second of one rank with --batch."""
    for row in rows:
        cost = step_cost(row)
        best = flags["batch"] / predict(cost, 1, flags["batch"], link).seconds
        for world in worlds:
            share = flags["global_batch"] / world if flags["global_batch"] else flags["batch"]
            guess = predict(cost, world, share, link)
            yield {
                "stage": row["size"],
                "gpus": world,
                "samples each": share,
                "compute ms": round(1e3 * guess.compute, 2),
                "communication ms": round(1e3 * guess.communication, 3),
                "img/s": round(world * share / guess.seconds),
                "efficiency": round(share / guess.seconds / best, 3),
            }


def show_model(report: Mapping[str, Any], flags: Mapping[str, Any]) -> None:
    """The model's checks, predictions and assumptions."""
    if report["checks"]:
        click.echo(f"the model against what was measured here, {report['slots']:g} ranks computing at a time:")
        click.echo(text_table(report["checks"]) + "\n")
    apart = f"{flags['latency']:g} us and {flags['bandwidth']:g} GB/s apart"
    click.echo(f"predicted for GPUs that each compute as one rank does here, {apart}:")
    click.echo(text_table(report["predictions"]))
    for assumption in ASSUMPTIONS:
        click.echo(f"assumed: {assumption}")


if __name__ == "__main__":
    run(main, "saddle benchmark step")
