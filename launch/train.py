"""`saddle train`: join a dataset and the trainer, alone, by `--gpus=N`, or as a rank under torchrun."""

import json
import math
import os
import platform
import re
import sys
import time
import tomllib
import traceback
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click

from data.cache import cached
from data.dataset import ImageDataset
from data.errors import DataError
from data.loader import load, pageable
from gan.config import OUTSIDE, TrainConfig, choice, flatten, override, parse_assignment, trajectory
from gan.errors import EverywhereError, PeerError, UserError
from launch.cli import run as run_command
from launch.ranks import call, end_with_parent, leave, on_first, torchrun

PRESETS = Path(__file__).resolve().parent / "presets"
FLAGS = {  # flag -> key of the configuration
    "batch": "batch",
    "kimg": "run.kimg",
    "seed": "seed",
    "resolution": "data.resolution",
    "objective": "objective.name",
    "regularizer": "regularizer.name",
    "gamma": "regularizer.gamma",
    "cond": "data.cond",
    "mirror": "data.mirror",
    "aug": "data.aug",
    "init_from": "init_from",
    "tick": "run.tick",
    "snap": "run.snap",
    "workers": "run.workers",
    "cache": "run.cache",
    "desc": "run.desc",
}


class Train(click.Command):
    """The command, whose help lists every objective and every regularizer."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from gan.methods.objectives import OBJECTIVES
        from gan.methods.regularizers import REGULARIZERS
        from gan.methods.rows import help_lines

        plain = {name: entry for name, entry in OBJECTIVES.items() if not name.startswith("f:")}
        family = {name: entry for name, entry in OBJECTIVES.items() if name not in plain}
        for title, table in (
            ("Objectives [with the parameters they take]", plain),
            ("f-GANs: form is paper or log_ratio, saturating=1 makes G descend the divergence itself", family),
            ("Regularizers", REGULARIZERS),
        ):
            with formatter.section(title):
                formatter.write_dl(help_lines(table), col_max=24)


@click.command(cls=Train, context_settings={"show_default": True, "max_content_width": 120})
@click.option("--data", required=True, type=click.Path(), help="Dataset made by `saddle prepare`.")
@click.option("--outdir", required=True, type=click.Path(), help="Where runs are kept, numbered.")
@click.option("--preset", default="default", help="A name in launch/presets, or a .toml file.")
@click.option("--resolution", type=int, help="Side at which training ends. [default: the dataset's largest]")
@click.option("--batch", type=int, help="Global batch, over all ranks.")
@click.option("--kimg", type=float, help="Length of the run in thousands of real images shown to D.")
@click.option("--objective", help="A name below, with parameters as in f:jsw:pi=0.3. [default: nonsaturating]")
@click.option("--regularizer", help="A name below, with parameters as in wgan_gp:target=1. [default: r1]")
@click.option(
    "--gamma", help="Weight of the penalty: D's loss adds gamma / 2 * penalty; auto: 0.0002 * pixels / batch."
)
@click.option("--cond", type=bool, help="Condition on the class labels.")
@click.option("--mirror", type=bool, help="Flip reals left-right at random.")
@click.option("--aug", help="none | diff: D sees reals and fakes changed at random. [default: none]")
@click.option(
    "--gpus", type=click.IntRange(min=1), default=1, help="Ranks on this host (processes where it has no GPU)."
)
@click.option("--workers", type=int, help="Threads per rank that read and decode ahead; 0: the step does. [default: 1]")
@click.option(
    "--cache", type=click.Path(), help="Folder on this node's disk for a copy of the dataset, to read from there."
)
@click.option("--seed", type=int, help="Of the weights, the data order and every draw.")
@click.option("--tick", type=float, help="kimg between status lines.")
@click.option("--snap", type=int, help="Ticks between snapshots, grids and training states.")
@click.option(
    "--resume", default="latest", help="latest (the newest run like this one) | none (a new run) | a run's PATH."
)
@click.option("--init-from", type=click.Path(), help="Start from the weights of a snapshot or a training state.")
@click.option("--desc", help="Added to the name of the run's directory.")
@click.option(
    "--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Set any key of gan/config.py; repeatable."
)
@click.option("-n", "--dry-run", is_flag=True, help="Print what would be done, and stop.")
@click.pass_context
def main(ctx: click.Context, **flags: Any) -> int:
    """Train a GAN on a dataset. The same command again goes on where the run was stopped.

    On many GPUs: --gpus=N, or torchrun ... -m launch.train with the same flags.
    """
    end_with_parent()
    if "WORLD_SIZE" in os.environ and not flags["dry_run"]:
        as_rank(flags)
    plan = make_plan(flags)
    if flags["dry_run"]:
        return dry_run(plan, flags["resume"])
    if flags["gpus"] > 1:
        return spawn(plan, flags)
    from gan.ranks import distributed

    return work(plan, flags["resume"], distributed.start())


@dataclass(frozen=True)
class Plan:
    """A checked command: everything that can be wrong is found before the first rank starts."""

    config: TrainConfig
    schedule: Any
    images: Any
    dataset: ImageDataset
    outdir: Path
    name: str
    options: dict[str, Any]  # what training_options.json holds


def make_plan(flags: Mapping[str, Any]) -> Plan:
    """Read preset, flags and dataset; raises UserError or DataError for whatever does not fit together."""
    from gan.checkpoint import network_widths
    from gan.methods.pairs import configured
    from gan.ranks.distributed import Ranks, check_devices, share
    from gan.run.directories import fingerprint
    from gan.schedules import build_schedule

    config = read_config(flags)
    objective, _ = configured(config)
    dataset = find_dataset(flags, config)
    images = image_format(dataset, config)
    if config.batch > len(dataset):
        raise UserError(
            f"{flags['data']} holds {len(dataset)} image{'s' * (len(dataset) != 1)}, fewer than one batch of "
            f"{config.batch}; add images or lower --batch"
        )
    schedule = build_schedule(config, images.last)
    network_widths(config, images)
    unit = math.lcm(config.distributed.group, objective.group)
    share(config.batch // unit, Ranks(world=int(os.environ.get("WORLD_SIZE", flags["gpus"]))))
    check_devices(int(os.environ.get("LOCAL_WORLD_SIZE", flags["gpus"])))
    options = {
        "data": str(Path(flags["data"]).absolute()),
        "preset": flags["preset"],
        "config": asdict(config),
        "images": asdict(images),
        "schedule": asdict(schedule),
    }
    # A schedule made of shares of the run moves with --kimg, so its length belongs to the trajectory; one made of
    # kimg does not, and the run can be made longer.
    resolved = {k: v for k, v in options["schedule"].items() if k != "total"}
    options["trajectory_hash"] = fingerprint([trajectory(config), resolved, options["images"]])
    height, width = (side * 2**images.last for side in images.base)
    size = str(width) if height == width else f"{height}x{width}"
    # A colon in a folder's name reads as a host's name elsewhere.
    rows = [re.sub("[:,=]+", "_", row) for row in (config.objective.name, config.regularizer.name)]
    parts = [Path(flags["preset"]).stem, Path(flags["data"]).stem, *rows, size]
    name = "-".join([*parts, f"b{config.batch}", *filter(None, [config.run.desc])])
    return Plan(config, schedule, images, dataset, Path(flags["outdir"]), name, options)


def find_dataset(flags: Mapping[str, Any], config: TrainConfig) -> ImageDataset:
    """The dataset, or its copy on this node, which is made now unless nothing is to be done."""
    path = Path(flags["data"])
    if config.run.cache and not flags["dry_run"]:
        path = cached(path, config.run.cache, announce=partial(click.echo, err=True))
    return ImageDataset(path, config.run.pages)


def read_config(flags: Mapping[str, Any]) -> TrainConfig:
    """Defaults < preset < flags < --set."""
    values = {key: flags[flag] for flag, key in FLAGS.items() if flags[flag] is not None}
    values |= dict(parse_assignment(text) for text in flags["assignments"])
    for key in ("init_from", "run.cache"):
        if values.get(key):
            values[key] = str(Path(values[key]).absolute())
    try:
        config = override(TrainConfig(), read_preset(flags["preset"]))
    except UserError as error:
        raise UserError(f"preset {flags['preset']}: {error}") from error
    return override(config, values)


def read_preset(name: str) -> dict[str, Any]:
    """The dotted keys of a preset, by name or by path."""
    path = Path(name)
    if path.suffix != ".toml":
        known, message = choice("--preset", name, [p.stem for p in PRESETS.glob("*.toml")])
        if not known:
            raise UserError(message)
        path = PRESETS / f"{name}.toml"
    try:
        return flatten(tomllib.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise UserError(f"--preset={name} cannot be read: {error}") from error


def image_format(dataset: ImageDataset, config: TrainConfig) -> Any:
    """What the networks must know of the dataset; refuses resolutions and labels that it does not have."""
    from gan.checkpoint import ImageFormat

    manifest = dataset.manifest
    sides = {max(manifest.size(level)): level for level in manifest.levels}
    wanted = config.data.resolution or max(sides)
    stored = ", ".join(str(side) for side in sorted(sides))
    if wanted not in sides:
        raise UserError(f"--resolution={wanted}: {dataset.path} holds {stored}; choose one or prepare it anew")
    last = sides[wanted]
    if config.growth.mode == "progressive" and set(range(last)) - set(manifest.levels):
        raise UserError(
            f"{dataset.path} holds {stored} only, and growing starts at {max(manifest.base)}; "
            "prepare it with all levels, or --set growth.mode=none"
        )
    classes = tuple(manifest.classes or ())
    if config.data.cond and not classes:
        vectors = manifest.label_dim and "vectors for labels, which no network here takes yet"
        raise UserError(
            f"--cond=1 needs class labels and {dataset.path} has {vectors or 'none'}; "
            "put each class in a folder of its own"
        )
    return ImageFormat(manifest.channels, manifest.base, last, classes, manifest.content_hash)


def dry_run(plan: Plan, resume: str) -> int:
    """Print the options, and where the run would go."""
    click.echo(json.dumps(plan.options, indent=2))
    found = locate(plan, resume)
    click.echo(f"would {f'go on with {found}' if found else f'start {plan.outdir}/NNNNN-{plan.name}'}")
    return 0


def locate(plan: Plan, resume: str) -> Path | None:
    """The directory of the run to go on with, None for a new one. Raises UserError for a path that is no such run."""
    from gan.run.directories import OPTIONS, find

    if resume in ("latest", "none"):
        return find(plan.outdir, plan.options["trajectory_hash"]) if resume == "latest" else None
    try:
        options = json.loads((Path(resume) / OPTIONS).read_text())
        same = options["trajectory_hash"] == plan.options["trajectory_hash"]
    except (OSError, ValueError, KeyError):
        raise UserError(f"--resume={resume} is not the directory of a run of Saddlepoint") from None
    if not same:
        names = ", ".join(differences(options, plan.options))
        raise UserError(f"--resume={resume} is a run with another {names}; give the same, or use --init-from")
    return Path(resume)


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The keys of two options files that make them different trajectories."""
    flat = [flatten({k: json.loads(json.dumps(o[k])) for k in ("config", "images", "schedule")}) for o in (old, new)]
    outside = (*(f"config.{key}" for key in OUTSIDE), "schedule.total")
    return [k for k in sorted(set().union(*flat)) if flat[0].get(k) != flat[1].get(k) and not k.startswith(outside)]


def resolve(plan: Plan, resume: str) -> Path:
    """The directory of the run to go on with, or a new one; a new one only if it can start."""
    from gan.checkpoint import build_networks, initial_weights
    from gan.methods.pairs import configured
    from gan.run.directories import create

    found = locate(plan, resume)
    if found:
        return found
    if plan.config.init_from:
        objective, regularizer = configured(plan.config)
        networks = build_networks(plan.config, plan.images, objective.outputs, regularizer.prepare)
        initial_weights(plan.config.init_from, dict(zip("GD", networks, strict=True)))
    return create(plan.outdir, plan.name, plan.options)


def spawn(plan: Plan, flags: Mapping[str, Any]) -> int:
    """Run the same command on N local ranks through torchrun -> its exit code."""
    from gan.run.directories import hold
    from ops.registry import kernels

    kernels()  # compiled before there are ranks, and refused in one line where they must be and cannot
    run = resolve(plan, flags["resume"])
    hold(run).close()  # in use? say so now, in one line
    return call(torchrun(flags["gpus"], "launch.train", [*arguments(flags), f"--resume={run}"]), flags["gpus"])


def arguments(flags: Mapping[str, Any]) -> list[str]:
    """The flags of this command again, as arguments."""
    single = {k: v for k, v in flags.items() if k not in ("assignments", "dry_run", "resume") and v is not None}
    return [f"--{k.replace('_', '-')}={v}" for k, v in single.items()] + [f"--set={a}" for a in flags["assignments"]]


def as_rank(flags: Mapping[str, Any]) -> None:
    """Train as one of torchrun's ranks, and end the process.

    What all ranks know ends them with 0, after the launcher was told the code: torchrun would start again, or end with
    1, what exits otherwise. What befell this rank alone ends it with 1, or 2 where a user can mend it.
    """
    from gan.ranks import distributed

    where = f"rank {os.environ['RANK']} on {platform.node()}"
    leave("ranks have begun")
    try:
        plan, ranks = meet(flags)
        code = work(plan, flags["resume"], ranks, patience=15.0)
        if ranks.world > int(os.environ["LOCAL_WORLD_SIZE"]):
            time.sleep(1)  # a launcher that waits to let another host in must see that before it sees us end
    except EverywhereError as error:
        if os.environ["RANK"] == "0":
            print(f"saddle train: error: {error}", file=sys.stderr)
        code = 2
    except (UserError, DataError, PeerError) as error:
        print(f"saddle train: {where}: {error}".replace(f"{where}: {where}", where), file=sys.stderr)
        distributed.end_rank(1 if isinstance(error, PeerError) else 2)
    except BaseException:
        traceback.print_exc()
        distributed.end_rank(1)
    distributed.end_rank(0 if leave(code) or code != 2 else 2)


def meet(flags: Mapping[str, Any]) -> tuple[Plan, Any]:
    """The plan, and this rank among its peers, which all have the same plan, code and versions.

    Raises EverywhereError where they do not, or one has found a reason not to train; PeerError where one is missing.
    """
    from gan.ranks import distributed, selftest
    from ops.registry import kernels
    from ops.toolchain import BuildError

    plan, same, refusal = None, selftest.versions(), ""
    try:
        plan = make_plan(flags)
        config = {f"config {key}": value for key, value in flatten(plan.options["config"]).items()}
        same |= {"dataset": plan.images.dataset_hash, "ops": kernels(), **config}
        selftest.check_address(int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"]))
    except (UserError, DataError, BuildError) as error:
        refusal = str(error)

    def check(store: Any, rank: int, world: int) -> None:
        hosts = selftest.compare(store, rank, world, same, refusal, distributed.MEETING.total_seconds())
        if rank == 0:
            click.echo(f"self-test: {world} ranks on {', '.join(sorted(set(hosts)))} agree on code, data and settings")

    try:
        return plan, distributed.start(plan.config.distributed.timeout if plan else 60.0, check)  # type: ignore
    except PeerError:
        raise
    except RuntimeError as error:
        raise PeerError(f"cannot join the other ranks: {' '.join(str(error).split())[:200]}") from error


def work(plan: Plan, resume: str, ranks: Any, patience: float = 0.0) -> int:
    """Find or make the run, hold it, and train to the end -> the exit code. patience: seconds to wait for whoever has
    the run: ranks of a host that is gone may need them to end."""
    from gan.ranks import distributed
    from gan.run.directories import hold

    with ExitStack() as stack:
        stack.callback(distributed.stop)

        def take() -> Path:
            run = resolve(plan, resume)
            stack.enter_context(hold(run, patience))
            return run

        return go_on(plan, on_first(ranks, take), ranks)


def go_on(plan: Plan, run: Path, ranks: Any) -> int:
    """Restore the newest sound state of a run, or start it, and train. -> the exit code."""
    import numpy
    import torch

    from gan import trainer
    from gan.checkpoint import initial_weights, load_state, newest_state
    from gan.ranks import distributed
    from gan.run import loop
    from gan.run.directories import EXIT, OPTIONS, write_json
    from ops.registry import kernels

    path, passed_over = on_first(ranks, lambda: newest_state(run))
    tensors, about = load_state(path) if path else ({}, {"images_seen": 0})
    if about["images_seen"] >= plan.schedule.total:
        if ranks.first:
            click.echo(f"{run} is finished ({about['images_seen'] / 1000:g} kimg); --resume=none trains another")
            write_json(run / EXIT, {"code": 0, "reason": "finished", "images_seen": about["images_seen"]})
        return 0
    exact = plan.config.distributed.exact
    recorded = about.get("threads", 0) if exact or about.get("world_size") == ranks.world else 0
    now = {
        "world_size": ranks.world,
        "threads": distributed.set_threads(plan.config.run.threads or recorded or int(exact)),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "machine": f"{platform.machine()} {ranks.device.type}",
        "ops": distributed.same_on_all("the ops", kernels()),
    }
    distributed.set_precision(ranks, plan.config.distributed.deterministic or exact)
    task = trainer.build_task(plan.config, plan.schedule, plan.images, ranks)
    state = trainer.initial_state(task)
    if path:
        state.load_tensors(tensors, about["images_seen"])
    elif plan.config.init_from:
        initial_weights(plan.config.init_from, {"G": state.G, "D": state.D, "G_ema": state.G_ema})
    if ranks.first:
        (run / EXIT).unlink(missing_ok=True)
        write_json(run / OPTIONS, plan.options)
        announce(plan, run, now, about, path, passed_over)
    return loop.train(state, task, make_feed(plan, ranks.device), run, now)


def make_feed(plan: Plan, device: Any) -> Any:
    """Requests -> batches, in memory that is page-locked where a GPU copies from it."""
    import torch

    def pinned(size: int) -> Any:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()

    config = plan.config
    allocate = pinned if device.type == "cuda" else pageable
    feed = partial(load, plan.dataset, seed=config.seed, block=config.data.block)
    return partial(feed, workers=config.run.workers, allocate=allocate)


def announce(
    plan: Plan, run: Path, now: dict[str, Any], about: dict[str, Any], path: Path | None, passed_over: list[str]
) -> None:
    """What a person should know before the first tick."""
    from gan.methods.pairs import remarks

    click.echo(f"run {run}")
    for line in passed_over:
        click.echo(f"passed over: {line}")
    click.echo(
        f"{len(plan.dataset)} images of {plan.dataset.path}, "
        f"{plan.schedule.total / 1000:g} kimg, batch {plan.config.batch}"
    )
    click.echo(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in now.items()))
    if plan.images.class_names and not plan.config.data.cond:
        click.echo(
            f"note: the dataset has {len(plan.images.class_names)} classes and they are not used; --cond=1 uses them"
        )
    for line in remarks(plan.config):
        click.echo(f"note: {line}")
    if path:
        click.echo(f"going on from {path.name}")
        alike = {"world_size"} if plan.config.distributed.exact else set()
        changed = [
            f"{k.replace('_', ' ')} was {about.get(k)}" for k in now if k not in alike and about.get(k) != now[k]
        ]
        if changed:
            click.echo(f"note: {', '.join(changed)}: same samples and draws, equal to rounding but not bit for bit")


if __name__ == "__main__":
    run_command(main, "saddle train")
