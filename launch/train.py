"""`saddle train`: train on a dataset, in one process, in N by `--gpus=N`, or as a rank of torchrun."""

import json
import math
import os
import platform
import sys
import time
import traceback
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from data.cache import cached
from data.dataset import Dataset, open_dataset
from data.errors import DataError
from data.loader import Check, load, pageable, unchecked
from data.sampler import ClassGroups
from data.vectors import VectorDataset
from gan.config import TrainConfig, flatten
from gan.errors import EverywhereError, PeerError, UserError
from launch.cli import of_system
from launch.cli import run as run_command
from launch.ranks import call, end_with_parent, leave, torchrun
from launch.scorer import find_scorer
from launch.settings import as_flags, chosen_preset, image_format, read_config, setting_options
from launch.tables import text_table

if TYPE_CHECKING:
    from gan.ranks.distributed import Ranks
    from gan.run.pace import Pace
    from gan.run.plan import RunPlan
    from gan.run.scoring import Scorer
    from gan.state import Feed


class Train(click.Command):
    """The click command. Its help lists every objective and every regularizer."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from gan.methods.objectives import OBJECTIVES
        from gan.methods.regularizers import REGULARIZERS
        from gan.methods.rows import help_lines
        from gan.vae.posteriors import POSTERIORS

        plain = {name: entry for name, entry in OBJECTIVES.items() if not name.startswith("f:")}
        family = {name: entry for name, entry in OBJECTIVES.items() if name not in plain}
        for title, table in (
            ("Objectives [with the parameters they take]", plain),
            ("f-GANs: form is paper or log_ratio, saturating=1 makes G descend the divergence itself", family),
            ("Regularizers", REGULARIZERS),
            ("Posteriors (vae.posterior)", POSTERIORS),
        ):
            with formatter.section(title):
                formatter.write_dl(help_lines(table), col_max=24)


@click.command(cls=Train, context_settings={"show_default": True, "max_content_width": 120})
@click.option("--data", required=True, type=click.Path(), help="Dataset made by `saddle prepare`.")
@click.option(
    "--outdir", required=True, type=click.Path(), help="Folder of the runs: each gets a numbered folder in it."
)
@click.option(
    "--preset",
    show_default="default, or vae with --model=vae",
    help="A name in launch/presets, or a .toml file.",
)
@click.option(
    "--gpus", type=click.IntRange(min=1), default=1, help="Processes on this host, each on a GPU if there are GPUs."
)
@click.option(
    "--resume",
    default="latest",
    help="latest: resume the newest run with the same settings, seed and dataset, or start one | none: start a new run "
    "| PATH: resume the run in this folder.",
)
@setting_options
@click.option(
    "-n",
    "--dry-run",
    is_flag=True,
    help="Print the configuration, which run would be used, and what each stage needs, and stop.",
)
def main(**flags: Any) -> int:
    """Train a model on a dataset. To resume a run that was stopped, run the same command again.

    On several GPUs of one machine use --gpus=N; on several machines launch/multi_node.sh with the same flags.
    """
    end_with_parent()
    flags["preset"] = chosen_preset(flags)
    if "WORLD_SIZE" in os.environ and not flags["dry_run"]:
        as_rank(flags)
    job = make_job(flags)
    if flags["dry_run"]:
        return dry_run(job, flags["gpus"])
    if flags["gpus"] > 1:
        return start_ranks(job, flags)
    from gan.ranks import distributed

    return work(job, distributed.start())


@dataclass(frozen=True)
class Job:
    """A checked command: errors in flags, preset or dataset are found before the first rank starts."""

    plan: "RunPlan"
    dataset: Dataset
    outdir: Path
    resume: str
    scorer: "Scorer | None"


def make_job(flags: Mapping[str, Any]) -> Job:
    """Read preset, flags and dataset. Raises UserError or DataError for what is wrong or does not fit together."""
    from gan.families import find_family
    from gan.ranks.distributed import Ranks, check_devices
    from gan.run.plan import plan_run
    from gan.run.room import check_fit, find_room

    config = read_config(flags)
    find_family(config).check(config)
    dataset = find_dataset(flags, config)
    if isinstance(dataset, VectorDataset) and not (config.vae.hidden and config.run.metrics == "none"):
        raise UserError(
            f"{dataset.path} has vectors, of which no pictures are made: train a VAE of fully connected layers "
            "(model=vae, vae.hidden), without run.metrics"
        )
    images = image_format(dataset, config)
    if config.batch > len(dataset):
        smallest = math.lcm(config.distributed.group, find_family(config).coupled(config))
        remedy = "add images or lower --batch" if len(dataset) >= smallest else f"add images, to {smallest} or more"
        raise UserError(
            f"{flags['data']} holds {len(dataset)} image{'s' * (len(dataset) != 1)}, fewer than one batch of "
            f"{config.batch}; {remedy}"
        )
    class_groups(dataset, config)
    data = Path(flags["data"])
    plan = plan_run(config, images, data.stem, flags["preset"], str(data.absolute()))
    world = int(os.environ.get("WORLD_SIZE", flags["gpus"]))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", flags["gpus"]))
    plan.task(Ranks(world=world))
    check_devices(local)
    if not flags["dry_run"]:  # which prints what it needs
        check_fit(plan.config, images, world, find_room(local))
    return Job(plan, dataset, Path(flags["outdir"]), flags["resume"], find_scorer(dataset, config.run))


def find_dataset(flags: Mapping[str, Any], config: TrainConfig) -> Dataset:
    """Open the dataset, or with --cache its copy on this node, made now if it is missing; a dry run makes no copy."""
    path = Path(flags["data"])
    if config.run.cache and not flags["dry_run"]:
        path = cached(path, config.run.cache, announce=partial(click.echo, err=True))
    return open_dataset(path, config.run.pages)


def dry_run(job: Job, ranks: int) -> int:
    """Print the options, the run that would be resumed or started, and what each stage needs. -> exit code 0."""
    from gan.run.directories import find_run

    click.echo(json.dumps(job.plan.options, indent=2))
    found = find_run(job.plan, job.outdir, job.resume)
    click.echo(f"would {f'resume {found}' if found else f'start {job.outdir}/NNNNN-{job.plan.name}'}")
    show_needs(job.plan, ranks)
    return 0


def show_needs(plan: "RunPlan", ranks: int) -> None:
    """Print a table with a line per stage: what it needs of each rank, on this machine."""
    from gan.run.room import find_room, plan_stages, resolve_micro

    config = plan.config
    room = find_room(ranks)
    if config.distributed.micro == "auto":
        micro = resolve_micro(config, plan.images, ranks, room)
        config = replace(config, distributed=replace(config.distributed, micro=micro))
        click.echo(f"distributed.micro=auto: {micro or 'all'} samples per backward pass")
    pace = find_pace(plan, ranks)
    rows = []
    for stage in plan_stages(config, plan.images, plan.schedule, ranks, room):
        parameters = {name: f"{count / 1e6:.3g}" for name, count in stage.parameters.items()}
        rows.append(
            {"size": plan.images.size_name(stage.stage)}
            | {f"M parameters {name}": text for name, text in parameters.items()}
            | {
                "GFLOP/image": f"{stage.cost.flops / stage.samples / 1e9:.2f}",
                "MB/image": f"{room.spread * stage.per_image / 1e6:.1f}",
                "GB that stay": f"{room.needed(stage.cost.state) / 1e9:.2f}",
                "GB at most": f"{room.needed(stage.cost.peak) / 1e9:.2f}",
                "largest batch": str(stage.largest * ranks or "none"),
                "sec/step": f"{pace.seconds(stage.cost):.3g}",
            }
        )
    click.echo(
        f"\nestimated for a rank with {stage.samples} of {config.batch} samples: memory to about 20 %, time roughly"
    )
    click.echo(f"memory of {room.name}: {room.total / 1e9:.1f} GB per rank")
    click.echo(text_table(rows))


def find_pace(plan: "RunPlan", ranks: int) -> "Pace":
    """The pace of this machine at the convolutions of a plan, with the threads that each rank would have."""
    import torch

    from gan.networks import network_widths
    from gan.precision import compute_dtype
    from gan.ranks.distributed import cores
    from gan.run.pace import measure_pace

    torch.set_num_threads(plan.config.run.threads or max(cores() // ranks, 1))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return measure_pace(device, compute_dtype(plan.config) or torch.float32, network_widths(plan.config, plan.images))


def start_ranks(job: Job, flags: Mapping[str, Any]) -> int:
    """Run the same command on N local ranks through torchrun. -> its exit code."""
    from gan.run.directories import hold, open_run
    from ops.registry import kernels

    kernels()  # compile them before ranks start: an error is then one line, and not one per rank
    run = open_run(job.plan, job.outdir, job.resume)
    with hold(run):  # raises UserError now, before ranks start, if the run is in use
        pass
    return call(torchrun(flags["gpus"], "launch.train", [*arguments(flags), f"--resume={run}"]), flags["gpus"])


def arguments(flags: Mapping[str, Any]) -> list[str]:
    """The flags of this command, as arguments for the same command."""
    single = {k: v for k, v in flags.items() if k not in ("assignments", "dry_run", "resume") and v is not None}
    return [f"--{k.replace('_', '-')}={v}" for k, v in single.items()] + [f"--set={a}" for a in flags["assignments"]]


def as_rank(flags: Mapping[str, Any]) -> None:
    """Train as one of torchrun's ranks, and end the process.

    If all ranks end for the same reason, they tell their launcher the exit code and exit with 0: after any other code
    torchrun would restart them, or exit with 1. If only this rank fails, it exits with 1, or 2 if the user can mend it.
    """
    from gan.ranks import distributed

    where = f"rank {os.environ['RANK']} on {platform.node()}"
    leave("ranks have begun")
    if flags["resume"] == "none" and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        flags = {**flags, "resume": "latest"}  # torchrun restarted us: the new run was begun before
    try:
        job, ranks = meet(flags)
        code = work(job, ranks, patience=15.0)
        if ranks.world > int(os.environ["LOCAL_WORLD_SIZE"]):
            time.sleep(1)  # a launcher that is about to let another host join must notice it before it sees us end
    except EverywhereError as error:
        if os.environ["RANK"] == "0":
            print(f"saddle train: error: {as_flags(str(error))}", file=sys.stderr)
        code = 2
    except (UserError, DataError, PeerError) as error:
        message = as_flags(str(error)).removeprefix(f"{where}: ")
        print(f"saddle train: {where}: {message}", file=sys.stderr)
        distributed.end_rank(1 if isinstance(error, PeerError) else 2)
    except OSError as error:
        print(f"saddle train: {where}: {of_system(error)}", file=sys.stderr)
        distributed.end_rank(2)
    except BaseException:
        traceback.print_exc()
        distributed.end_rank(1)
    distributed.end_rank(0 if leave(code) or code != 2 else 2)


def meet(flags: Mapping[str, Any]) -> tuple[Job, "Ranks"]:
    """Join the other ranks, which must all have the same job, code and versions. -> the job, and this rank.

    Raises EverywhereError if they differ, or if a rank cannot train; PeerError if a rank is missing.
    """
    from gan.ranks import distributed, selftest
    from gan.run.report import tell
    from ops.registry import kernels
    from ops.toolchain import BuildError

    job = None
    refusal = ""
    same = selftest.versions()
    try:
        job = make_job(flags)
        config = {f"config {key}": value for key, value in flatten(job.plan.options["config"]).items()}
        same |= {"dataset": job.plan.images.dataset_hash, "ops": kernels(), **config}
        selftest.check_address(int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"]))
    except (UserError, DataError, BuildError) as error:
        refusal = str(error)

    def check(store: Any, rank: int, world: int) -> None:
        hosts = selftest.compare(store, rank, world, same, refusal, distributed.MEETING.total_seconds())
        if rank == 0:
            tell(f"self-test: {world} ranks on {', '.join(sorted(set(hosts)))} agree on code, data and settings")

    timeout = job.plan.config.distributed.timeout if job else 60.0
    try:
        ranks = distributed.start(timeout, check)
    except PeerError:
        raise
    except RuntimeError as error:
        raise PeerError(f"cannot join the other ranks: {' '.join(str(error).split())[:200]}") from error
    assert job  # without a job there is a refusal, which `check` has raised on all ranks
    return job, ranks


def work(job: Job, ranks: "Ranks", patience: float = 0.0) -> int:
    """Find or make the run, lock it, and train to the end. -> the exit code. patience: seconds to wait for the process
    that has the lock, as ranks that have lost another host may take a while to end."""
    from gan.ranks import distributed
    from gan.run.directories import hold, open_run
    from gan.run.report import tell
    from gan.run.training import train_run

    with ExitStack() as stack:
        stack.callback(distributed.stop)

        def take() -> Path:
            run = open_run(job.plan, job.outdir, job.resume)
            stack.enter_context(hold(run, patience))
            return run

        run = distributed.on_first(ranks, take)
        if ranks.first:
            tell(f"{len(job.dataset)} images of {job.dataset.path}")
        feed = make_feed(job, ranks)
        return train_run(job.plan, run, feed, ranks, lambda line: tell(as_flags(line)), job.scorer)


def class_groups(dataset: Dataset, config: TrainConfig) -> ClassGroups | None:
    """The groups of one class each that the data is read in, with data.grouped. Raises UserError for a dataset without
    classes, and for a class that is smaller than a group."""
    if not config.data.grouped:
        return None
    size = config.distributed.group
    if dataset.labels is None or not dataset.manifest.classes:
        raise UserError(f"data.grouped=1 needs class labels and {dataset.path} has none; prepare a folder per class")
    for name, count in zip(dataset.manifest.classes, np.bincount(dataset.labels).tolist(), strict=False):
        if 0 < count < size:
            raise UserError(
                f"data.grouped=1: class {name} of {dataset.path} has {count} images, fewer than a group of {size}; "
                "lower distributed.group, or add images"
            )
    return ClassGroups.of(dataset.labels, size)


def make_feed(job: Job, ranks: "Ranks") -> "Feed":
    """A function that reads the batches for requests, into memory that is page-locked if a GPU copies from it."""
    import torch

    from gan.schedules import stage_start

    def pinned(size: int) -> Any:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()

    config = job.plan.config

    def in_first_epoch(first: int, stage: int) -> bool:
        length = len(job.dataset)
        whole = -(-stage_start(job.plan.schedule, stage) // length)  # the first epoch that lies in this stage only
        return first < (whole + 1) * length

    checks: dict[str, Check] = {"never": unchecked, "first": in_first_epoch, "always": lambda first, stage: True}
    return partial(
        load,
        job.dataset,
        seed=config.seed,
        block=config.data.block,
        groups=class_groups(job.dataset, config),
        workers=config.run.workers,
        check=checks[config.data.check],
        allocate=pinned if ranks.device.type == "cuda" else pageable,
    )


if __name__ == "__main__":
    run_command(main, "saddle train")
