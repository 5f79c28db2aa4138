"""`saddle evaluate`: scores of snapshots beside scores of real images; divergences between two sets of samples."""

import os
import sys
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from data.errors import DataError
from gan.errors import UserError
from launch.cli import run
from launch.ranks import call, end_with_parent, torchrun
from launch.samples import check_match, find_snapshot, load_network
from launch.scores import CLASSIFIER, HALF, build_reference, check_scores, score_as_json, score_table
from launch.settings import as_flags
from launch.tables import json_option, save_rows

if TYPE_CHECKING:
    from data.dataset import ImageDataset
    from gan.metrics.score import Score
    from gan.ranks.distributed import Ranks
    from launch.scores import Reference

MEETING = 3600.0  # seconds that ranks wait for each other: rank 0 may train a classifier meanwhile


class Evaluate(click.Command):
    """The click command. Its help lists all metrics."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from gan.methods.rows import help_lines
        from gan.metrics.score import METRICS
        from gan.vae.estimates import ESTIMATORS

        with formatter.section("Metrics"):
            formatter.write_dl([(name, metric.summary) for name, metric in METRICS.items()])
        with formatter.section("Estimators of --likelihood"):
            formatter.write_dl(help_lines(ESTIMATORS))


@click.command(cls=Evaluate, context_settings={"max_content_width": 120})
@click.option("--network", "networks", multiple=True, help="A snapshot, run or outdir; may be repeated.")
@click.option("--data", "data", required=True, help="The dataset to compare with.")
@click.option(
    "--metrics",
    default="",
    metavar="NAME,...",
    help="Some of those listed below, or all for all that apply. [default: those that apply of "
    "fd,kid,pr,dc,diversity,classes]",
)
@click.option(
    "--divergence",
    "divergences",
    metavar="NAME,...",
    help="Instead of scores, estimate these divergences D(data||against), for example kl,js,jsw:pi=0.3.",
)
@click.option(
    "--likelihood",
    metavar="NAME,...",
    help="Instead of scores, estimate log p(x) of images of --data under VAEs, by some of those listed below.",
)
@click.option(
    "--codes",
    is_flag=True,
    help="Instead of scores, tell how well content and style of VAEs with grouped latents predict the class.",
)
@click.option(
    "--against",
    help="The second set for --divergence: a dataset, a snapshot, a run, or a .npy of vectors [n, K] or uint8 images "
    "[n, H, W, C].",
)
@click.option(
    "--features",
    metavar="NAME",
    help="What compares images: classifier (trained first, on the classes of --data), lite0 (an ImageNet network; "
    "needs the extra metrics), or PATH:SHA256 of a TorchScript file. [default: classifier; with --divergence: pixels]",
)
@click.option(
    "--samples",
    type=click.IntRange(1),
    default=10_000,
    show_default=True,
    help="Samples of each network; with --divergence, at most so many of each set; with --likelihood, at most so many "
    "images.",
)
@click.option(
    "--gpus", type=click.IntRange(1), default=1, help="Processes on this host, each on a GPU if there are GPUs."
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    show_default=True,
    help="Seed of the latents and of the classifier.",
)
@json_option
def main(**flags: Any) -> int:
    """Score snapshots against a dataset, or estimate divergences between two sets of samples.

    The table also has scores of real images to compare with. Scores are equal for any number of processes: on a CPU,
    each of them uses one core.
    """
    end_with_parent()
    check_mode(flags)
    if flags["divergences"] is not None:
        return divergences(flags)
    if not flags["networks"]:
        raise UserError("give --network to score, or --divergence and --against to compare two sets")
    if flags["likelihood"] is not None:
        return likelihoods(flags)
    if flags["codes"]:
        return codes(flags)
    if "WORLD_SIZE" in os.environ:
        as_rank(flags)
    job = make_job(flags)
    if flags["gpus"] > 1:
        return call(torchrun(flags["gpus"], "launch.evaluate", arguments(flags)), flags["gpus"])
    from gan.ranks.distributed import Ranks

    return work(job, flags, Ranks())


def check_mode(flags: Mapping[str, Any]) -> None:
    """Raises UserError where several evaluations are asked for at once, or what does nothing in the one asked for."""
    asked = {
        "--divergence": flags["divergences"] is not None,
        "--likelihood": flags["likelihood"] is not None,
        "--codes": flags["codes"],
    }
    modes = [flag for flag, given in asked.items() if given]
    if len(modes) > 1:
        raise UserError(f"{' and '.join(modes)} are different evaluations; give one of them")
    if modes and flags["metrics"]:
        raise UserError(f"--metrics does nothing with {modes[0]}; leave it out")
    if flags["against"] and modes != ["--divergence"]:
        raise UserError("--against is the second set of --divergence; give that too, as --divergence=kl,js")


def divergences(flags: Mapping[str, Any]) -> int:
    """Estimate the divergences that were asked for."""
    from launch.divergence_estimates import PIXELS, estimate_divergences

    others = [*flags["networks"], *([flags["against"]] if flags["against"] else [])]
    if len(others) != 1:
        raise UserError("--divergence compares --data with one other set: give --against, or one --network")
    samples, seed = flags["samples"], flags["seed"]
    features = flags["features"] or PIXELS
    estimate_divergences(flags["divergences"], flags["data"], others[0], samples, seed, features, flags["json_path"])
    return 0


def likelihoods(flags: Mapping[str, Any]) -> int:
    """Estimate what was asked for of log p(x)."""
    from data.dataset import open_dataset
    from launch.likelihood_estimates import estimate_likelihoods

    paths = {network: find_snapshot(network) for network in flags["networks"]}
    dataset = open_dataset(flags["data"])
    estimate_likelihoods(flags["likelihood"], paths, dataset, flags["samples"], flags["seed"], flags["json_path"])
    return 0


def codes(flags: Mapping[str, Any]) -> int:
    """Compare content with style."""
    from data.dataset import ImageDataset
    from launch.code_estimates import compare_codes

    paths = {network: find_snapshot(network) for network in flags["networks"]}
    compare_codes(paths, ImageDataset(flags["data"]), flags["samples"], flags["seed"], flags["json_path"])
    return 0


@dataclass(frozen=True)
class Job:
    """A checked command."""

    dataset: "ImageDataset"
    level: int
    paths: Mapping[str, Path]  # of the snapshots, by the names the user gave
    features: str


def make_job(flags: Mapping[str, Any]) -> Job:
    """Find networks and dataset. Raises UserError or DataError for what does not fit together or is too little."""
    from data.dataset import ImageDataset

    paths = {network: find_snapshot(network) for network in flags["networks"]}
    dataset = ImageDataset(flags["data"])
    level = max(check_match(path, load_network(path), dataset) for path in paths.values())
    features = flags["features"] or CLASSIFIER
    check_scores(dataset, flags["metrics"], features, flags["samples"])
    return Job(dataset, level, paths, features)


def arguments(flags: Mapping[str, Any]) -> list[str]:
    """The flags of this command, as arguments for the same command."""
    given = [f"--network={network}" for network in flags["networks"]]
    given += [f"--{name}={flags[name]}" for name in ("data", "metrics", "samples", "seed")]
    given += [f"--features={flags['features']}"] if flags["features"] else []
    return given + ([f"--json={flags['json_path']}"] if flags["json_path"] else [])


def as_rank(flags: Mapping[str, Any]) -> None:
    """Score as one of torchrun's ranks, and end the process: with 2 if the user can mend what failed."""
    from gan.ranks import distributed

    code = 0
    try:
        work(make_job(flags), flags, distributed.start(MEETING))
        distributed.stop()
    except (UserError, DataError) as error:
        print(f"saddle evaluate: rank {os.environ['RANK']}: {as_flags(str(error))}", file=sys.stderr)
        code = 2
    except BaseException:
        traceback.print_exc()
        code = 1
    distributed.end_rank(code)


def work(job: Job, flags: Mapping[str, Any], ranks: "Ranks") -> int:
    """Score all networks and print the table, on rank 0."""
    from gan.metrics.classifier import one_thread

    def say(line: str) -> None:
        if ranks.first:
            click.echo(line)

    samples = flags["samples"]
    with one_thread():
        reference = build_reference(
            job.dataset,
            job.level,
            flags["seed"],
            metrics=flags["metrics"],
            features=job.features,
            samples=samples,
            ranks=ranks,
            say=say,
        )
        say(reference.summary())
        rows = {name: reference.score_network(load_network(path), samples) for name, path in job.paths.items()}
        rows |= reference.floors(samples)
    say(score_table(rows))
    found = alarms_of(rows, job.paths)
    for name, lines in found.items():
        for line in lines:
            say(f"alarm: {name}: {line}")
    if ranks.first:
        save_rows(flags["json_path"], scores_as_json(reference, rows, job.paths, found))
    return 0


def alarms_of(rows: Mapping[str, "Score"], networks: Iterable[str]) -> dict[str, list[str]]:
    """What the scores of each network show, beside those of real images, of a collapse and of copies."""
    from gan.metrics.alarms import alarms

    reals = [figure for name in (HALF, "reals", "all reals") if name in rows for figure in [rows[name]]]
    beside = {name: figure for row in reals for name, figure in row.figures.items()}
    return {name: alarms(rows[name].figures, beside) for name in networks}


def scores_as_json(
    reference: "Reference", rows: Mapping[str, "Score"], paths: Mapping[str, Path], found: Mapping[str, list[str]]
) -> dict[str, Any]:
    """The table as plain values for JSON; `network` is the scored snapshot's path, null in the rows of reals.

    found: the alarms of each network.
    """
    classifier = reference.classifier
    dataset = str(reference.dataset.path)
    return {
        "classifier": classifier
        and {"accuracy": classifier.accuracy, "held_out": classifier.held_out, "classes": classifier.classes},
        "rows": [
            {
                "name": name,
                "network": str(paths[name]) if name in paths else None,
                **score_as_json(row, dataset),
                "alarms": found.get(name, []),
            }
            for name, row in rows.items()
        ],
    }


if __name__ == "__main__":
    run(main, "saddle evaluate")
