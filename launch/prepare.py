"""`saddle prepare`: build a dataset; print the plan before and a report after."""

import click

from data.build_plan import BuildPlan, Cost
from data.decoding import MODES
from data.encodings import ENCODINGS
from data.errors import DataError
from data.items import show_counts
from data.prepare import MOST_WORKERS, BuildReport, prepare
from data.repair import repair as repair_dataset
from data.resizing import TRANSFORMS
from data.sizes import format_megabytes, format_size, parse_size
from data.sources import kinds
from launch.cli import run
from launch.progress import track

SHOWN = 10  # skipped images that are printed
GIVEN = click.core.ParameterSource.COMMANDLINE


def show_plan(plan: BuildPlan, costs: dict[str, Cost], workers: int, dest: str) -> None:
    """Print in one line what will be built, its size and time, and the sizes with other encodings."""
    labels = f"{len(plan.source.classes)} classes" if plan.source.classes else "no classes"
    if plan.source.label_dim is not None:
        labels = f"labels of {plan.source.label_dim} numbers"
    chosen = costs[plan.encoding]
    others = [
        f"{shown_encoding(name)} {format_megabytes(cost.bytes)}"
        for name, cost in costs.items()
        if name != plan.encoding
    ]
    click.echo(
        f"{plan.source.name} -> {dest}: {plan.source.count} images, {labels}, {format_size(plan.size)} {plan.mode} "
        f"({plan.transform}), levels {', '.join(map(format_size, plan.sizes))}, about {format_megabytes(chosen.bytes)} "
        f"{shown_encoding(plan.encoding)} in {max(1, round(chosen.seconds / workers))} s "
        f"(--encoding: {', '.join(others)})"
    )


def shown_encoding(name: str) -> str:
    """The name of an encoding, marked if it is lossy."""
    return name if ENCODINGS[name].lossless else f"{name} (lossy)"


def show_report(report: BuildReport) -> None:
    """Print what was built and what was left out."""
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
    for change, count in manifest.color_changes.items():
        click.echo(f"colors   {count}: {change}")
    if report.ignored:
        click.echo(f"ignored  {sum(report.ignored.values())} files that are no images: {show_counts(report.ignored)}")
    click.echo(f"classes  {len(manifest.classes) if manifest.classes else 'none'}")
    for note in report.notes:
        click.echo(f"note: {note}")
    if report.empty_classes:
        click.echo(f"note: {report.empty_classes} classes have no image here")
    click.echo(f"hash     {manifest.content_hash}")
    click.echo(f"size     {format_megabytes(report.bytes)}, built in {report.seconds:.1f} s")


def show_repair(problems: list[str], dest: str) -> None:
    """Print what was bad and has been replaced."""
    for problem in problems[:SHOWN]:
        click.echo(f"repaired {problem}")
    click.echo(f"{dest}: {f'{len(problems)} problems repaired' if problems else 'every record is good'}")


def read_size(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, int] | None:
    """The (height, width) that a flag's text gives. Raises click.BadParameter, to whose message click adds the flag."""
    try:
        return None if text is None else parse_size(text)
    except DataError as error:
        raise click.BadParameter(str(error)) from error


class PrepareCommand(click.Command):
    """The click command. Its help lists every kind of source."""

    def format_epilog(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("SOURCE is one of"):
            formatter.write_dl([(kind.description, kind.details) for kind in kinds()], col_max=36)


@click.command(cls=PrepareCommand, context_settings={"max_content_width": 120})
@click.argument("source")
@click.argument("dest", type=click.Path())
@click.option(
    "--resolution",
    metavar="SIZE",
    callback=read_size,
    help="Final size of the images.  [default: the largest size that the first image fills]",
)
@click.option(
    "--base",
    metavar="SIZE",
    callback=read_size,
    default="4x4",
    show_default=True,
    help="Size of the smallest level: growing starts there.",
)
@click.option(
    "--levels",
    type=click.IntRange(min=1),
    help="How many levels to store, from the largest down; each has half the size of the one before.  [default: all]",
)
@click.option(
    "--transform",
    type=click.Choice(list(TRANSFORMS)),
    default="center-crop",
    show_default=True,
    help="For images of another aspect ratio: cut their edges, distort them, or add black or transparent bars.",
)
@click.option(
    "--mode",
    type=click.Choice(["auto", *MODES]),
    default="auto",
    show_default=True,
    help="Channels to store: grey, RGB or RGBA; auto: the fewest that a sample of the images needs.",
)
@click.option(
    "--encoding",
    type=click.Choice(list(ENCODINGS)),
    help="How pixels are stored; only jpeg is lossy.  [default: raw; webp if raw would take more than 8 GB]",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help=f"Processes that decode and encode.  [default: all cores, at most {MOST_WORKERS}]",
)
@click.option(
    "--max-images", type=click.IntRange(min=1), help="Take at most so many images, the first in the order of names."
)
@click.option("--strict", is_flag=True, help="Stop at an image that cannot be read, instead of skipping it.")
@click.option(
    "--repair", is_flag=True, help="Only replace the bad records of DEST, which was built from the same SOURCE."
)
@click.pass_context
def main(
    context: click.Context,
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

    A SIZE is one side in pixels, or HxW. If a build was interrupted, the same command resumes it.
    """
    if repair:
        others = [one for one in context.command.params if isinstance(one, click.Option) and one.name != "repair"]
        given = [one.opts[0] for one in others if context.get_parameter_source(one.name or "") == GIVEN]
        if given:
            raise click.UsageError(f"--repair goes by what DEST says of itself: leave out {', '.join(given)}")
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
