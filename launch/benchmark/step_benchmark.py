"""Time the training step of each stage, beside a plain loop, the machine's limit, and several ranks."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import torch

from data.dataset import ImageDataset
from gan.config import TrainConfig, check_name, override, parse_assignment
from gan.errors import UserError
from gan.methods.pairs import configured
from gan.networks import network_widths
from gan.ranks import distributed
from gan.ranks.distributed import Ranks
from launch.benchmark.plain_loop import obstacle
from launch.benchmark.step_contest import (
    ALSO,
    PLAIN,
    PRODUCTS,
    Case,
    build,
    hold_contest,
    line_up,
    stage_row,
    time_sums,
)
from launch.benchmark.step_memory import peak_bytes
from launch.benchmark.step_model import ASSUMPTIONS, Fabric, Link, Step, read_steps
from launch.benchmark.step_parts import ready_profiler, time_parts, trace
from launch.benchmark.step_tables import busy_in_short, in_short, parts_row, prediction_rows, ranks_row, speed_row
from launch.benchmark.timing import describe_machine, machine_line
from launch.cli import run
from launch.ranks import call, end_with_parent, torchrun
from launch.settings import image_format, noise_format, read_preset
from launch.tables import json_option, save_rows, text_table

NARROW = 64  # channels at most where there is no GPU and nobody says otherwise
WORLDS = "8,64,512"
FABRIC = (("inside", "10,200", "GPUs of a host"), ("between", "10,25", "hosts"))
Row = dict[str, Any]  # one stage on one number of ranks


def link_options(command: Any) -> Any:
    """Decorator that adds the options of FABRIC."""
    for name, default, what in reversed(FABRIC):
        text = f"Microseconds and GB/s of a GPU between {what}, for predictions."
        command = click.option(f"--{name}", metavar="US,GB/S", default=default, show_default=True, help=text)(command)
    return command


@click.command()
@click.option("--preset", "presets", metavar="NAME,...", multiple=True, help="launch/presets or .toml. [default: 32]")
@click.option("--resolution", type=int, help="Final one, without --data. [default: by the preset's widths or name]")
@click.option("--batch", type=click.IntRange(1), default=16, show_default=True, help="Samples of each rank.")
@click.option(
    "--at",
    metavar="SIDE/N,...",
    help="Last stages to measure, each with a batch; for --resolution and --batch.",
)
@click.option("--data", type=click.Path(), help="Dataset to read. [default: noise, made beforehand]")
@click.option("--stages", metavar="N,...", help="Stages to measure. [default: all]")
@click.option("--gpus", metavar="N,...", help="Numbers of ranks on this host. [default: 1,2, or 1 on a single GPU]")
@click.option("--also", metavar="NAME,...", default="", help=f"More contestants: {', '.join(ALSO)}.")
@click.option(
    "--against",
    type=click.Choice(["all", "plain"]),
    default="all",
    show_default=True,
    help="plain: one rank's step and the plain loop alone, without their parts.",
)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Timings of each contestant.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Intra-op threads of each rank.")
@click.option("--profile", type=click.Path(path_type=Path, file_okay=False), help="Write a Chrome trace of each stage.")
@click.option("--steps", type=click.Path(path_type=Path), help="Measure nothing; predict from the steps in a .toml.")
@click.option("--predict", metavar="N,...", help=f"Numbers of GPUs to predict for. [default with --steps: {WORLDS}]")
@link_options
@click.option("--per-host", type=click.IntRange(1), default=8, show_default=True, help="GPUs of a host.")
@click.option(
    "--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Set a key of gan/config.py; repeatable."
)
@json_option
@click.option("--rows", type=click.Path(path_type=Path), hidden=True)
def main(**flags: Any) -> int:
    """Measure the training step of each preset and stage, and predict it for many GPUs.

    On one rank our step takes turns with a plain loop (the same step in plain PyTorch: float32, NCHW, eager, Adam, EMA)
    and with the step's convolutions and matrix products alone, whose speed is this machine's limit. On several ranks it
    takes turns with ranks that do not communicate. Memory and the parts of a step are measured apart from that.

    Penalties are the difference to a step without them. Peak memory is what a GPU has allocated, and on a CPU by how
    much a new process grows.
    """
    end_with_parent()
    names = [name for text in flags["presets"] or ("32",) for name in text.split(",") if name]
    if flags["steps"]:
        steps = read_steps(flags["steps"], read_config(names[0], flags, narrow=False))
        save_rows(flags["json_path"], show_predictions(steps, flags))
        return 0
    cases = [read_case(name, flags, at) for name in names for at in read_sizes(flags["at"])]
    if "WORLD_SIZE" in os.environ:
        rows = measure(cases, distributed.start(), flags)
        leave_rows(rows, flags)
        distributed.stop()
        distributed.end_rank()
    worlds = numbers("--gpus", flags["gpus"] or ("1" if torch.cuda.device_count() == 1 else "1,2"))
    distributed.check_devices(max(worlds))
    torch.set_num_threads(flags["threads"])
    machine = describe_machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    on_cpu_clock = machine["clock"] == "CPU time" and not flags["data"]  # see `step_contest.stopwatch`
    machine["clock"] = "CPU time of one rank, wall time of several" if on_cpu_clock else "wall time"
    click.echo(machine_line(machine))
    for case in cases:
        if 1 in worlds and (reason := obstacle(case.config)):
            click.echo(f"preset {case.preset}: there is no plain loop with {reason}")
    alone = Ranks(device=torch.device(machine["device"]))
    rows = [row for w in worlds for row in (measure(cases, alone, flags) if w == 1 else start_ranks(w, flags))]
    show(rows, flags)
    report = {"machine": machine, "configs": {case.preset: asdict(case.config) for case in cases}, "measured": rows}
    if flags["predict"]:
        report |= show_predictions([measured_step(row) for row in rows if row["gpus"] == 1], flags)
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


def read_sizes(text: str | None) -> list[tuple[int, int] | None]:
    """ "32/256,64/128" -> pairs of a resolution and a batch; [None] without a text. UserError for anything else."""
    if not text:
        return [None]
    pairs: list[tuple[int, int] | None] = []
    try:
        for part in text.split(","):
            side, batch = (int(number) for number in part.split("/"))
            pairs.append((side, batch))
            if batch < 1:
                raise ValueError
    except ValueError:
        raise UserError(f"--at={text}: write resolutions with batches, as in --at=32/256,64/128") from None
    return pairs


def read_config(preset: str, flags: Mapping[str, Any], narrow: bool = True) -> TrainConfig:
    """The preset and --set, at one resolution after the other without fading. narrow: fewer channels on a CPU."""
    values = dict(parse_assignment(text) for text in flags["assignments"])
    given = read_preset(preset)
    if narrow and not torch.cuda.is_available() and not {"network.widths", "network.channel_max"} & {*values, *given}:
        values["network.channel_max"] = NARROW
    wanted = {"batch": flags["batch"], "growth.mode": "none", "growth.shares": ()}
    return override(override(TrainConfig(), given | wanted), values)


def read_case(preset: str, flags: Mapping[str, Any], at: tuple[int, int] | None = None) -> Case:
    """One preset with its images and stages, or with its last stage and a batch `at` some resolution. Raises UserError
    for what does not fit."""
    if at:
        side, batch = at
        last = noise_format(side).last
        case = read_case(preset, {**flags, "resolution": side, "batch": batch, "stages": str(last)})
        return replace(case, preset=f"{preset}, batch {batch}")  # the name by which a report tells cases apart
    config = read_config(preset, flags)
    for name in names_of(flags["also"]):
        check_name("--also", name, ALSO)
    configured(config)
    dataset = ImageDataset(flags["data"]) if flags["data"] else None
    if dataset:
        images = image_format(dataset, config)
    else:
        widths = config.network.widths
        usual = 4 << (len(widths) - 1) if widths else int(preset) if preset.isdigit() else 32
        images = noise_format(flags["resolution"] or usual)
    network_widths(config, images)
    stages = numbers("--stages", flags["stages"], least=0) if flags["stages"] else range(images.last + 1)
    if max(stages) > images.last:
        raise UserError(f"--stages={flags['stages']}: the last one is {images.last}")
    return Case(preset, config, images, tuple(stages), dataset)


def names_of(text: str) -> list[str]:
    """The names in "a,b"."""
    return [name for name in text.split(",") if name]


def measure(cases: Sequence[Case], ranks: Ranks, flags: Mapping[str, Any]) -> list[Row]:
    """All stages of all presets, on this rank and those it is joined with."""
    distributed.set_threads(flags["threads"])
    distributed.set_precision(ranks, any(case.config.distributed.deterministic for case in cases))
    on_cpu = ranks.world == 1 and ranks.device.type == "cpu"
    grown = peak_bytes(cases, flags["threads"]) if on_cpu else {}
    stages = [(case, stage) for case in cases for stage in case.stages]
    rows = [measure_stage(*which, ranks, grown, flags) for which in stages]
    if flags["profile"] or ranks.device.type == "cuda":
        ready_profiler(ranks.device)
        rows = [watch_stage(row, *which, ranks, flags) for row, which in zip(rows, stages, strict=True)]
    return rows


def measure_stage(
    case: Case, stage: int, ranks: Ranks, grown: Mapping[tuple[str, int], Any], flags: Mapping[str, Any]
) -> Row:
    """One stage: the contest, what it came to in a line, and then what must not disturb it. grown: the memory that
    processes of the CPU take."""
    with ExitStack() as stack:
        only = PLAIN if flags["against"] == "plain" else None
        outcome = hold_contest(case, ranks, stage, names_of(flags["also"]), flags["rounds"], stack, only)
        peak = grown.get((case.preset, stage), outcome.peak_bytes)
        row = stage_row(outcome, case, ranks, stage) | {"gpu_busy": None, "peak_bytes": peak}
        for line in in_short([row]):
            click.echo(line)
        if ranks.world > 1:
            return row | {"sums": time_sums(row["messages"], ranks.device)}
        if only:
            return row
        return row | {"flops": outcome.contestants[PRODUCTS].flops, "part_shares": time_parts(outcome.eager)}


def watch_stage(row: Row, case: Case, stage: int, ranks: Ranks, flags: Mapping[str, Any]) -> Row:
    """A row with what the profiler saw. It watches new networks, whose graphs are captured after its first start."""
    ours = build(line_up(case, ranks, ())["ours"], case, stage)
    with closing(ours.batches):
        ours.sample(ours.warm_up)
        watched = row | {"gpu_busy": trace(ours, trace_file(flags["profile"], row, ranks))}
    for line in busy_in_short(watched):
        click.echo(line)
    return watched


def trace_file(folder: Path | None, row: Row, ranks: Ranks) -> Path | None:
    """Where the trace of a stage goes."""
    name = f"{Path(row['preset']).stem}-{row['size']}-gpus{ranks.world}-rank{ranks.rank}.json"
    return folder / name if folder else None


def start_ranks(world: int, flags: Mapping[str, Any]) -> list[Row]:
    """Measure on so many ranks of this host -> a row per stage."""
    passed = ("resolution", "batch", "at", "data", "stages", "also", "rounds", "threads", "profile")
    arguments = [f"--{name}={flags[name]}" for name in passed if flags[name] not in (None, "")]
    arguments += [f"--preset={name}" for name in flags["presets"]] + [f"--set={text}" for text in flags["assignments"]]
    with tempfile.TemporaryDirectory(prefix="saddle-step-") as folder:
        rows = Path(folder) / "rows"
        command = torchrun(world, "launch.benchmark.step_benchmark", [*arguments, f"--rows={rows}"])
        if call(command, world) or not rows.exists():
            raise UserError(f"--gpus={world}: the ranks did not finish; what they said is above")
        return torch.load(rows, weights_only=True)


def leave_rows(rows: Sequence[Row], flags: Mapping[str, Any]) -> None:
    """Of rank 0: for the command that started it, or as tables where torchrun was called by hand."""
    if int(os.environ["RANK"]):
        return
    if flags["rows"]:
        torch.save(rows, flags["rows"])
        return
    show(rows, flags)
    save_rows(flags["json_path"], {"measured": rows})


def show(rows: Sequence[Row], flags: Mapping[str, Any]) -> None:
    """Everything that was measured, as tables."""
    ones = [row for row in rows if row["gpus"] == 1]
    several = [row for row in rows if row["gpus"] > 1]
    if ones:
        click.echo(text_table([speed_row(row) for row in ones]))
    if ones and flags["against"] == "all":
        click.echo("\nmilliseconds of a step:\n" + text_table([parts_row(row) for row in ones]))
    if several:
        click.echo("\nseveral ranks, with the step that the model expects (alone + sums alone):")
        click.echo(text_table([ranks_row(row, names_of(flags["also"])) for row in several]))


def measured_step(row: Row) -> Step:
    """What the model needs of a row of one rank."""
    return Step(row["size"], row["share"], row["ms"]["ours"] / 1e3, tuple(row["messages"]))


def show_predictions(steps: Sequence[Step], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Print the predictions and what they assume -> the same for programs."""
    if not steps:
        raise UserError("--predict needs steps of one rank: add --gpus=1, or --steps=FILE")
    inside, between = (read_link(f"--{name}", flags[name]) for name, _, _ in FABRIC)
    fabric = Fabric(inside, between, flags["per_host"])
    rows = list(prediction_rows(steps, numbers("--predict", flags["predict"] or WORLDS), fabric))
    click.echo(f"\npredicted for GPUs that compute like this one, {flags['per_host']} to a host:")
    click.echo(text_table(rows))
    for assumption in ASSUMPTIONS:
        click.echo(f"assumed: {assumption}")
    return {"fabric": asdict(fabric), "assumptions": ASSUMPTIONS, "predictions": rows}


def read_link(what: str, text: str) -> Link:
    """ "10,200", microseconds and GB/s. UserError for anything else."""
    try:
        latency, bandwidth = (float(part) for part in text.split(","))
        if latency < 0 or bandwidth <= 0:
            raise ValueError
    except ValueError:
        raise UserError(f"{what}={text}: write microseconds and GB/s, as in {what}=10,200") from None
    return Link(latency / 1e6, bandwidth * 1e9)


if __name__ == "__main__":
    run(main, "saddle benchmark step")
