"""`saddle generate grid|images|video`: pictures by a trained network.

A seed's image is the same in a grid and as a single image. Without --class, a conditional network makes the image of
seed s in class s modulo the number of classes; in a video, cell c of the grid has class c modulo that number.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from data.names import composed
from gan.errors import UserError
from launch.cli import run
from launch.outputs import output_option
from launch.pictures import (
    VISIBLE,
    check_cells,
    enlarge,
    grid_picture,
    images_of_seeds,
    keyframe_seeds,
    opaque,
    save_png,
    walk,
)
from launch.samples import load_network

if TYPE_CHECKING:
    from gan.checkpoint import Snapshot


class Finite(click.FloatRange):
    """A finite number in a range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """'0.7' -> 0.7."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


class GridSize(click.ParamType):
    """COLUMNSxROWS, as in 4x2."""

    name = "CxR"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """'4x2' -> (4, 2)."""
        columns, _, rows = str(value).lower().partition("x")
        if not (columns.isdecimal() and rows.isdecimal() and int(columns) * int(rows)):
            self.fail(f"'{value}' is not COLUMNSxROWS; write for example 4x2", param, ctx)
        return int(columns), int(rows)


def network_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options that all three subcommands share."""
    for option in (
        click.option(
            "--trunc",
            type=Finite(0),
            default=1.0,
            show_default=True,
            help="Truncation: 1 for none, 0 for the mean image.",
        ),
        click.option("--class", "class_", metavar="NAME|INDEX", help="One class for all images."),
        click.option(
            "--network", required=True, help="A snapshot, a run directory or an outdir (its newest snapshot)."
        ),
    ):
        function = option(function)
    return function


scale_option = click.option(
    "--scale",
    type=click.IntRange(1),
    help=f"Times to enlarge [default: until the shorter side has {VISIBLE} pixels].",
)


@click.group(no_args_is_help=False)
def main() -> None:
    """Make an image grid, single images or a video from a snapshot.

    The same seed gives the same image everywhere. Without --class, a conditional network makes the image of seed s in
    class s modulo the number of classes; in a video, cell c has class c modulo that number.
    """


def load_pictured(network: str) -> "Snapshot":
    """The network of a path. Raises UserError where it makes vectors."""
    snapshot = load_network(network)
    if not snapshot.images.pictures:
        raise UserError(f"{network} makes vectors, of which there are no pictures")
    return snapshot


@main.command()
@network_options
@click.option(
    "--seeds",
    metavar="0,1,4-6",
    help="One image each [default: 0-63, or as many as fill --grid, or whole rows of up to 16 classes].",
)
@click.option("--grid", "size", type=GridSize(), help="Columns x rows [default: nearly square, or a column per class].")
@output_option("grid.png")
@scale_option
def grid(
    network: str,
    seeds: str | None,
    class_: str | None,
    trunc: float,
    size: tuple[int, int] | None,
    output: Path,
    scale: int | None,
) -> None:
    """One PNG with an image per seed."""
    from gan.sampling import parse_seeds

    snapshot = load_pictured(network)
    numbers = None if seeds is None else parse_seeds(seeds)
    columns, numbers = arrange(numbers, size, snapshot.G.classes if class_ is None else 0)
    picture = enlarge(grid_picture(snapshot, numbers, class_index(snapshot, class_), trunc, columns), scale)
    save_png(picture, output)
    click.echo(
        f"wrote {output}: {len(numbers)} images, {columns} to a row, {picture.shape[1]}x{picture.shape[0]} pixels"
    )


@main.command()
@network_options
@click.option("--seeds", metavar="0,1,4-6", default="0-63", show_default=True)
@click.option(
    "--outdir", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder for seed0000.png, ..."
)
def images(network: str, seeds: str, class_: str | None, trunc: float, outdir: Path) -> None:
    """One PNG per seed, at the network's own size."""
    from tqdm import tqdm

    from gan.sampling import parse_seeds

    snapshot = load_pictured(network)
    numbers = list(dict.fromkeys(parse_seeds(seeds)))  # one file for each
    made = images_of_seeds(snapshot, numbers, class_index(snapshot, class_), trunc)
    for number, image in zip(tqdm(numbers, unit="image", disable=None), made, strict=True):
        save_png(image, outdir / f"seed{number:04d}.png")
    click.echo(f"wrote {len(numbers)} images into {outdir}")


@main.command()
@network_options
@click.option("--seeds", metavar="0,1,4-6", default="0-31", show_default=True, help="Keyframes, cell after cell.")
@click.option("--grid", "size", type=GridSize(), default="4x2", show_default=True, help="Columns x rows of cells.")
@click.option("--num-keyframes", type=click.IntRange(1), help="Keyframes of a cell [default: seeds / cells].")
@click.option("--w-frames", type=click.IntRange(1), default=60, show_default=True, help="Frames per keyframe.")
@click.option("--fps", type=Finite(0.1, 1000), default=30, show_default=True)
@output_option("walk.mp4")
@scale_option
def video(
    network: str,
    seeds: str,
    class_: str | None,
    trunc: float,
    size: tuple[int, int],
    num_keyframes: int | None,
    w_frames: int,
    fps: float,
    output: Path,
    scale: int | None,
) -> None:
    """One H.264 video: each cell is a looping walk in latent space."""
    from tqdm import tqdm

    from gan.sampling import parse_seeds
    from launch.video import write_video

    snapshot = load_pictured(network)
    cells = keyframe_seeds(parse_seeds(seeds), size[0] * size[1], num_keyframes)
    pictures = walk(snapshot, cells, class_index(snapshot, class_), trunc, size[0], w_frames)
    progress = tqdm(pictures, total=w_frames * len(cells[0]), unit="frame", disable=None)
    frames, width, height = write_video(output, (opaque(enlarge(picture, scale)) for picture in progress), fps)
    click.echo(
        f"wrote {output}: {frames} frames of {width}x{height} at {fps:g} per second, {frames / fps:.1f} s, a loop"
    )


def data_options(count: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The options of what needs an encoder."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in (
            scale_option,
            click.option(
                "--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Which images."
            ),
            click.option("--images", "count", type=click.IntRange(1, 1000), default=count, show_default=True),
            click.option("--data", required=True, help="The dataset whose images are encoded."),
            click.option("--network", required=True, help="A snapshot or run of a VAE."),
        ):
            function = option(function)
        return function

    return add


@main.command()
@data_options(32)
@output_option("reconstructions.png")
def reconstructions(network: str, data: str, count: int, seed: int, output: Path, scale: int | None) -> None:
    """Real images, each with what a VAE makes of its code to the right."""
    from launch.latent_pictures import Encoded, save_table
    from launch.latent_pictures import reconstructions as pictures

    width, height = save_table(pictures(Encoded(network, data, count, seed)), 8, output, scale)
    click.echo(f"wrote {output}: {count} images and their reconstructions, {width}x{height} pixels")


@main.command()
@data_options(16)
@click.option("--steps", type=click.IntRange(2, 100), default=8, show_default=True, help="Images on the way.")
@output_option("interpolations.png")
def interpolations(network: str, data: str, count: int, seed: int, steps: int, output: Path, scale: int | None) -> None:
    """A row from one real image to another for each pair, through the codes of a VAE."""
    from launch.latent_pictures import Encoded, save_table
    from launch.latent_pictures import interpolations as pictures

    if count % 2:
        raise click.UsageError(f"--images={count} are no pairs")
    made = pictures(Encoded(network, data, count, seed), steps)
    width, height = save_table(made, steps + 2, output, scale)
    click.echo(f"wrote {output}: {count // 2} rows, {width}x{height} pixels")


@main.command()
@data_options(8)
@output_option("swaps.png")
def swaps(network: str, data: str, count: int, seed: int, output: Path, scale: int | None) -> None:
    """A table of a VAE with grouped latents: each row has one group's content, each column one image's style."""
    from launch.latent_pictures import Encoded, save_table
    from launch.latent_pictures import swaps as pictures

    width, height = save_table(pictures(Encoded(network, data, count, seed, grouped=True)), count + 1, output, scale)
    click.echo(f"wrote {output}: {count}x{count} images, {width}x{height} pixels")


def class_index(snapshot: "Snapshot", name: str | None) -> int | None:
    """The index of a class that is given by name or index; None for none. Raises click.UsageError if the network does
    not have that class."""
    if name is None:
        return None
    classes = snapshot.G.classes
    if not classes:
        raise click.UsageError(
            "--class: this network was trained without classes; leave --class out, or train with --cond=1"
        )
    names = [composed(known) for known in snapshot.images.class_names]
    if name in snapshot.images.class_names:
        return snapshot.images.class_names.index(name)
    if composed(name) in names:
        return names.index(composed(name))
    if name.isdecimal() and int(name) < classes:
        return int(name)
    shown = ", ".join(snapshot.images.class_names[:12]) + (", ..." if classes > 12 else "")
    raise click.UsageError(f"--class={name} is not one of the {classes} classes: {shown}")


def arrange(seeds: list[int] | None, size: tuple[int, int] | None, classes: int) -> tuple[int, list[int]]:
    """(columns, seeds) of a grid. The user may have given seeds, size = (columns, rows), both or neither. A grid is not
    wider than its seeds need.

    classes: the number of classes if the network makes all of them in turn, else 0. Up to 16 classes get a column each,
    if the seeds fill whole rows.
    """
    from gan.sampling import grid_columns

    if size is not None:
        columns, rows = size
        check_cells(columns * rows)
        if seeds and len(seeds) > columns * rows:
            raise click.UsageError(f"--grid={columns}x{rows} holds {columns * rows} images, --seeds are {len(seeds)}")
        seeds = seeds or list(range(columns * rows))
        return min(columns, len(seeds)), seeds
    by_class = 1 < classes <= 16
    if seeds is None:
        seeds = list(range(64 // classes * classes if by_class else 64))
    if by_class and len(seeds) % classes == 0:
        return classes, seeds
    return grid_columns(len(seeds)), seeds


if __name__ == "__main__":
    run(main, "saddle generate")
