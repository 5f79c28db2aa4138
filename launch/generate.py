"""`saddle generate grid|images|video`: what a trained network makes.

A seed's image is the same in a grid and as a single image. A conditional network that is asked for no class gives seed
s the class s modulo the number of classes; in a video every cell keeps one class, counted through the cells.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from gan.errors import UserError
from launch.cli import run
from launch.video import replacing

if TYPE_CHECKING:
    import torch

    from gan.checkpoint import Snapshot

PNG_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
MOST_CELLS = 100_000  # images in a picture, keyframes in a walk: more is a slip of the finger
MOST_PIXELS = 1 << 28  # of a picture
VISIBLE = 256  # pixels of a picture's shorter side below which small images are enlarged


class Finite(click.FloatRange):
    """A number in a range; `nan` is in none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """'0.7' -> 0.7."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


def ending(suffix: str) -> Callable[..., Path]:
    """A callback that refuses an output of another kind before anything is made."""

    def check(ctx: click.Context, param: click.Parameter, path: Path) -> Path:
        if path.suffix != suffix:
            raise click.BadParameter(f"'{path}' does not end in {suffix}; write for example {path.stem or 'x'}{suffix}")
        return path

    return check


def output_option(default: str) -> Callable[..., Any]:
    """`--output`, of the same kind of file as its default."""
    kind, check = click.Path(path_type=Path), ending(Path(default).suffix)
    return click.option("--output", type=kind, callback=check, default=default, show_default=True)


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
        click.option("--trunc", type=Finite(0), default=1.0, show_default=True, help="1: all variety; 0: none."),
        click.option("--class", "class_", metavar="NAME|INDEX", help="One class for all images."),
        click.option(
            "--network", required=True, help="A snapshot, a run directory or an outdir (its newest snapshot)."
        ),
    ):
        function = option(function)
    return function


scale_option = click.option(
    "--scale", type=click.IntRange(1), help=f"Enlarge pixels [default: until the short side has {VISIBLE} of them]."
)


@click.group(no_args_is_help=False)
def main() -> None:
    """Make an image grid, single images or a video from a snapshot.

    The same seed gives the same image everywhere. A conditional network that is asked for no --class gives seed s the
    class s modulo the number of classes; in a video, cell by cell.
    """


@main.command()
@network_options
@click.option("--seeds", metavar="0,1,4-6", help="[default: 0-63, or whole rows of all classes, or what --grid holds]")
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

    snapshot = load(network)
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
    "--outdir", type=click.Path(path_type=Path, file_okay=False), required=True, help="Where seed0000.png goes."
)
def images(network: str, seeds: str, class_: str | None, trunc: float, outdir: Path) -> None:
    """One PNG per seed, at the network's own size."""
    from tqdm import tqdm

    from gan.sampling import parse_seeds

    snapshot = load(network)
    numbers = parse_seeds(seeds)
    made = sample(snapshot, numbers, class_index(snapshot, class_), trunc)
    for number, image in zip(tqdm(numbers, unit="image", disable=None), made, strict=True):
        save_png(image, outdir / f"seed{number:04d}.png")
    click.echo(f"wrote {len(numbers)} images into {outdir}")


@main.command()
@network_options
@click.option("--seeds", metavar="0,1,4-6", default="0-31", show_default=True, help="Keyframes, in the order of cells.")
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
    """A looping walk through latent space, one per cell of a grid, as H.264."""
    from tqdm import tqdm

    from gan.sampling import parse_seeds
    from launch.video import write_video

    snapshot = load(network)
    cells = keyframe_seeds(parse_seeds(seeds), size[0] * size[1], num_keyframes)
    pictures = walk(snapshot, cells, class_index(snapshot, class_), trunc, size[0], w_frames)
    progress = tqdm(pictures, total=w_frames * len(cells[0]), unit="frame", disable=None)
    frames, width, height = write_video(output, (opaque(enlarge(picture, scale)) for picture in progress), fps)
    click.echo(
        f"wrote {output}: {frames} frames of {width}x{height} at {fps:g} per second, {frames / fps:.1f} s, a loop"
    )


def find_snapshot(network: str | Path) -> Path:
    """A snapshot itself, or the newest one below a directory, such as a run or an outdir. UserError if none."""
    path = Path(network)
    if not path.is_dir():
        return path  # load_snapshot says what is wrong with it
    found = sorted(path.rglob("network-snapshot-*.safetensors"))
    last_of_runs = {snapshot.parent: snapshot for snapshot in found}.values()
    if not last_of_runs:
        raise UserError(f"no network-snapshot-*.safetensors in {path} or below it; train first, or name a file")
    return max(last_of_runs, key=lambda snapshot: (snapshot.stat().st_mtime, snapshot))


def load(network: str | Path) -> "Snapshot":
    """The snapshot that `find_snapshot` finds, on the GPU if there is one. UserError for images that no PNG holds."""
    import torch

    from gan.checkpoint import load_snapshot

    path = find_snapshot(network)
    snapshot = load_snapshot(path)
    if snapshot.G.channels not in PNG_MODES:
        raise UserError(f"{path} makes images of {snapshot.G.channels} channels; pictures have 1, 3 or 4")
    snapshot.G.to("cuda" if torch.cuda.is_available() else "cpu")
    return snapshot


def class_index(snapshot: "Snapshot", name: str | None) -> int | None:
    """The index of a class given by name or index, None for none. click.UsageError for one that the network has not."""
    if name is None:
        return None
    classes = snapshot.G.classes
    if not classes:
        raise click.UsageError(
            "--class: this network was trained without classes; leave it out, or train with --cond=1"
        )
    if name in snapshot.class_names:
        return snapshot.class_names.index(name)
    if name.isdecimal() and int(name) < classes:
        return int(name)
    shown = ", ".join(snapshot.class_names[:12]) + (", ..." if classes > 12 else "")
    raise click.UsageError(f"--class={name} is none of the {classes} classes: {shown}")


def labels_of(snapshot: "Snapshot", seeds: Sequence[int], class_: int | None) -> "torch.Tensor | None":
    """The classes of seeds: int64 [N], or None for an unconditional network."""
    import torch

    if not snapshot.G.classes:
        return None
    return torch.tensor([seed % snapshot.G.classes if class_ is None else class_ for seed in seeds])


def arrange(seeds: list[int] | None, size: tuple[int, int] | None, classes: int) -> tuple[int, list[int]]:
    """(columns, seeds) of a grid from what the user gave of both; `classes` up to 16 make the columns by default."""
    from gan.sampling import grid_columns

    by_class = classes if 1 < classes <= 16 else 0
    if size is None:
        columns = by_class or grid_columns(len(seeds) if seeds else 64)
        return columns, seeds or list(range(64 // columns * columns))
    columns, rows = size
    check_cells(columns * rows)
    if seeds and len(seeds) > columns * rows:
        raise click.UsageError(f"--grid={columns}x{rows} holds {columns * rows} images, --seeds are {len(seeds)}")
    return columns, seeds or list(range(columns * rows))


def check_cells(count: int) -> None:
    """click.UsageError for more images in one picture or walk than anyone means."""
    if count > MOST_CELLS:
        raise click.UsageError(f"{count} images in one picture or walk are too many: at most {MOST_CELLS}; see --grid")


def check_pixels(height: int, width: int) -> None:
    """click.UsageError for a picture that is too large to be held."""
    if height * width > MOST_PIXELS:
        raise click.UsageError(f"a picture of {width}x{height} pixels is too large; see --grid and --scale")


def keyframe_seeds(seeds: list[int], cells: int, keyframes: int | None) -> list[list[int]]:
    """Seeds dealt to cells, `keyframes` in a row to each, from the start again when used up -> [cells][keyframes]."""
    check_cells(cells)
    if keyframes is None:
        if len(seeds) % cells:
            raise click.UsageError(
                f"{len(seeds)} --seeds do not divide among {cells} cells; see --grid, --num-keyframes"
            )
        keyframes = len(seeds) // cells
    check_cells(cells * keyframes)
    return [[seeds[(cell * keyframes + k) % len(seeds)] for k in range(keyframes)] for cell in range(cells)]


def sample(snapshot: "Snapshot", seeds: Sequence[int], class_: int | None, trunc: float) -> Iterator[np.ndarray]:
    """Yield the image uint8 [H, W, C] of each seed, made batch by batch."""
    from gan.sampling import generate_batches, seed_latents, to_uint8

    G = snapshot.G
    z, labels = seed_latents(seeds, G.z_dim), labels_of(snapshot, seeds, class_)
    for batch in generate_batches(G, z, labels, stage=snapshot.stage, alpha=snapshot.alpha, trunc=trunc):
        yield from to_uint8(batch)


def grid_picture(
    snapshot: "Snapshot", seeds: Sequence[int], class_: int | None, trunc: float, columns: int, gap: int = 0
) -> np.ndarray:
    """The images of seeds, row by row, `gap` pixels apart: uint8 [H, W, C]."""
    from gan.sampling import tile

    height, width = (side << snapshot.stage for side in snapshot.G.base)
    check_pixels((height + gap) * -(-len(seeds) // columns), (width + gap) * columns)
    return tile(np.stack(list(sample(snapshot, seeds, class_, trunc))), columns, gap)


def walk(
    snapshot: "Snapshot",
    cells: list[list[int]],
    class_: int | None,
    trunc: float,
    columns: int,
    w_frames: int,
    gap: int = 0,
) -> Iterator[np.ndarray]:
    """Yield the frames uint8 [H, W, C] of a loop through each cell's seeds [cells][keyframes]; few are in memory."""
    import torch

    from gan.sampling import batch_size, generate, latent_walk, seed_latents, tile, to_uint8

    G = snapshot.G
    keyframes = torch.stack([seed_latents(seeds, G.z_dim) for seeds in cells], 1)  # [K, cells, Z]
    labels = labels_of(snapshot, range(len(cells)), class_)
    latents = latent_walk(keyframes, w_frames)
    at_once = max(1, batch_size(G, snapshot.stage) // len(cells))
    while chunk := list(islice(latents, at_once)):
        y = None if labels is None else labels.repeat(len(chunk))
        images = generate(G, torch.cat(chunk), y, stage=snapshot.stage, alpha=snapshot.alpha, trunc=trunc)
        for frame in to_uint8(images).reshape(len(chunk), len(cells), *images.shape[2:], G.channels):
            yield tile(frame, columns, gap)


def enlarge(picture: np.ndarray, scale: int | None) -> np.ndarray:
    """Repeat every pixel of [H, W, C] `scale` times each way; by default until the shorter side is VISIBLE."""
    scale = scale or math.ceil(VISIBLE / min(picture.shape[:2]))
    check_pixels(picture.shape[0] * scale, picture.shape[1] * scale)
    return picture.repeat(scale, axis=0).repeat(scale, axis=1)


def opaque(picture: np.ndarray) -> np.ndarray:
    """[H, W, 1 or 3 or 4] -> RGB [H, W, 3], transparency over white."""
    if picture.shape[2] == 4:
        alpha = picture[:, :, 3:] / 255
        picture = (picture[:, :, :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)
    return np.broadcast_to(picture, (*picture.shape[:2], 3))


def save_png(picture: np.ndarray, path: Path) -> None:
    """Write uint8 [H, W, 1 or 3 or 4] as a PNG, never half-written. UserError where that is not possible."""
    from PIL import Image

    image = Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture)
    part = path.with_suffix(".part.png")
    with replacing(path, part):
        image.save(part)


if __name__ == "__main__":
    run(main, "saddle generate")
