"""`saddle prepare`: build a dataset, say what it will be before and what came of it after."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import click

from data.encodings import ENCODINGS
from data.errors import DataError
from data.images import MODES, TRANSFORMS
from data.plan import Cost, Plan, format_size, parse_size
from data.prepare import Report, prepare
from data.repair import repair as repair_dataset
from launch.cli import run

T = TypeVar("T")
SHOWN = 10  # skipped images that are printed
LOG_SECONDS = 10.0  # between two progress lines in a log


def track(items: Iterable[T], total: int, label: str) -> Iterator[T]:
    """The same items, with their progress on standard error: a bar on a terminal, a line now and then in a log."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(items, total=total, desc=label, mininterval=0.5)
        return
    started = shown = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - shown >= LOG_SECONDS:
            shown, left = now, (now - started) / done * (total - done)
            print(f"{label}: {done} of {total}, about {left:.0f} s left", file=sys.stderr, flush=True)


def show_plan(plan: Plan, costs: dict[str, Cost], workers: int, dest: str) -> None:
    """What is about to be built and what that will take, in one line, and what other encodings would take."""
    labels = f"{len(plan.source.classes)} classes" if plan.source.classes else "no classes"
    if plan.source.label_dim is not None:
        labels = f"labels of {plan.source.label_dim} numbers"
    chosen = costs[plan.encoding]
    others = [
        f"{shown_encoding(name)} {megabytes(cost.bytes)}" for name, cost in costs.items() if name != plan.encoding
    ]
    click.echo(
        f"{plan.source.name} -> {dest}: {plan.source.count} images, {labels}, {format_size(plan.size)} {plan.mode} "
        f"({plan.transform}), levels {', '.join(map(format_size, plan.sizes))}, about {megabytes(chosen.bytes)} "
        f"{shown_encoding(plan.encoding)} in {max(1, round(chosen.seconds / workers))} s "
        f"(--encoding: {', '.join(others)})"
    )


def shown_encoding(name: str) -> str:
    """The name of an encoding, with a warning if it loses something."""
    return name if ENCODINGS[name].lossless else f"{name} (lossy)"


def show_report(report: Report) -> None:
    """What was built and what was left out."""
    manifest = report.manifest
    click.echo(f"stored   {manifest.count} of {report.found} images")
    for reason, count in manifest.skipped.items():
        click.echo(f"skipped  {count}: {reason}")
    for _, name, reason in report.skipped[:SHOWN]:
        click.echo(f"         {name}: {reason}")
    if len(report.skipped) > SHOWN:
        click.echo(f"         and {len(report.skipped) - SHOWN} more")
    if report.skipped_file:
        click.echo(f"         the whole list is in {report.skipped_file}")
    if report.ignored:
        click.echo(f"ignored  {report.ignored} files that are no images")
    click.echo(f"classes  {len(manifest.classes) if manifest.classes else 'none'}")
    if report.empty_classes:
        click.echo(f"note: {report.empty_classes} of the classes have no image; --max-images takes the first by name")
    click.echo(f"hash     {manifest.content_hash}")
    click.echo(f"size     {megabytes(report.bytes)}, built in {report.seconds:.1f} s")


def show_repair(problems: list[str], dest: str) -> None:
    """What was bad and has been replaced."""
    for problem in problems[:SHOWN]:
        click.echo(f"repaired {problem}")
    click.echo(f"{dest}: {f'{len(problems)} problems repaired' if problems else 'every record is good'}")


def megabytes(count: int) -> str:
    """A number of bytes for people."""
    return f"{count / 1e6:.1f} MB"


def read_size(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, int] | None:
    """The (height, width) of a flag; click adds its name to the message of a wrong one."""
    try:
        return None if text is None else parse_size(text)
    except DataError as error:
        raise click.BadParameter(str(error)) from error


@click.command()
@click.argument("source")
@click.argument("dest", type=click.Path())
@click.option(
    "--resolution",
    metavar="SIZE",
    callback=read_size,
    help="Largest level.  [default: the largest that the first image fills]",
)
@click.option("--base", metavar="SIZE", callback=read_size, default="4x4", show_default=True, help="Smallest level.")
@click.option("--levels", type=click.IntRange(min=1), help="Keep only so many of the largest levels.  [default: all]")
@click.option(
    "--transform",
    type=click.Choice(list(TRANSFORMS)),
    default="center-crop",
    show_default=True,
    help="Cut to the aspect, change the aspect, or fill up with black or transparency.",
)
@click.option("--mode", type=click.Choice(["auto", *MODES]), default="auto", show_default=True, help="Channels stored.")
@click.option(
    "--encoding",
    type=click.Choice(list(ENCODINGS)),
    help="How pixels are stored; only jpeg loses some.  [default: raw; webp if that would take more than 8 GB]",
)
@click.option("--workers", type=click.IntRange(min=1), help="Processes that decode and encode.  [default: all cores]")
@click.option(
    "--max-images", type=click.IntRange(min=1), help="Take only the first so many images, in the order of their names."
)
@click.option("--strict", is_flag=True, help="Refuse at the first image that cannot be read instead of skipping it.")
@click.option(
    "--repair", is_flag=True, help="Replace the bad records of DEST, which was made of SOURCE, and only those."
)
def main(
    source: str,
    dest: str,
    resolution: tuple[int, int] | None,
    base: tuple[int, int],
    levels: int | None,
    transform: str,
    mode: str,
    encoding: str | None,
    workers: int | None,
    max_images: int | None,
    strict: bool,
    repair: bool,
) -> None:
    """Build the LMDB dataset DEST from SOURCE.

    SOURCE is a folder or zip of images (sub-folders or StyleGAN's dataset.json give labels), a tar or webdataset
    shards (set-{000..003}.tar or a folder of them), an IDX file (.gz too, labels beside it), CIFAR-10/100 as
    distributed, an npz, parquet of the Hugging Face hub, an LMDB of saddle prepare or with keys SIZE-INDEX, `digits`,
    `stacked-digits`, or `stacked-digits:SOURCE`. A SIZE is one side or HxW. If it was killed, the same command goes on
    after the last commit.
    """
    if repair:
        show_repair(repair_dataset(source, dest, track), dest)
        return
    report = prepare(
        source,
        dest,
        resolution=resolution,
        base=base,
        levels=levels,
        transform=transform,
        mode=mode,
        encoding=encoding,
        workers=workers,
        max_images=max_images,
        strict=strict,
        progress=track,
        announce=lambda plan, costs, workers: show_plan(plan, costs, workers, dest),
        say=click.echo,
    )
    show_report(report)


if __name__ == "__main__":
    run(main, "saddle prepare")
