"""Show what an objective and a regularizer do to the smallest GAN: eigenvalues, step sizes, phase portraits."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launch.cli import run
from launch.tables import json_option, save_rows, text_table

if TYPE_CHECKING:
    from gan.theory.dirac import Game

SELECTION = [("none", 0.0), ("r1", 0.3), ("r1", 1.0), ("r1_r2", 0.5), ("roth_js", 2.0), ("instance_noise", 0.49)]
WASSERSTEIN_SELECTION = [("none", 0.0), ("clip", 1.0), ("wgan_gp", 1.0), ("r1", 1.0)]
SIDE, REACH = 360, 2.0  # pixels of a portrait, and the largest |theta| and |psi| in it


@click.command()
@click.option(
    "--objective", "objectives", multiple=True, help="As in `saddle train`; repeatable. [default: a selection]"
)
@click.option("--regularizer", "regularizers", multiple=True, help="As in `saddle train`.")
@click.option(
    "--gamma", "gammas", type=float, multiple=True, help="Weight of the regularizer; repeatable. [default: 1]"
)
@click.option("--step", type=click.FloatRange(min=0, min_open=True), default=0.1, show_default=True, help="Step size.")
@click.option("--count", type=click.IntRange(1), default=500, show_default=True, help="Steps of both players.")
@click.option("--portraits", type=click.Path(path_type=Path, dir_okay=False), help="Draw phase portraits to this PNG.")
@json_option
def main(
    objectives: tuple[str, ...],
    regularizers: tuple[str, ...],
    gammas: tuple[float, ...],
    step: float,
    count: int,
    portraits: Path | None,
    json_path: Path | None,
) -> None:
    """Train the Dirac-GAN (Mescheder et al. 2018) with the same objectives and regularizers as images.

    Eigenvalues are those of the gradient field at the equilibrium. Training is stable for step sizes below the bounds.
    The last two columns are the distance from the equilibrium after --count steps from (1, 1).
    """
    games = chosen_games(objectives, regularizers, gammas)
    paths = {name: {a: list(states_of(game, step, count, a)) for a in (False, True)} for name, game in games.items()}
    rows = [table_row(name, game, {a: path[-1] for a, path in paths[name].items()}) for name, game in games.items()]
    click.echo(text_table(rows))
    save_rows(json_path, rows)
    if portraits:
        draw(portraits, games, {name: path[True] for name, path in paths.items()})
        click.echo(f"wrote {portraits}: alternating steps in red, from (1, 1)")


def chosen_games(
    objectives: tuple[str, ...], regularizers: tuple[str, ...], gammas: tuple[float, ...]
) -> "dict[str, Game]":
    """Games by a readable name: the product of what was given, or a selection that shows each behavior."""
    from gan.errors import UserError
    from gan.theory.dirac import Game

    if any(not gamma >= 0 for gamma in gammas):
        raise UserError("--gamma must be at least 0")
    if objectives or regularizers or gammas:
        games = [
            Game(o, r, g if r != "none" else 0.0)
            for o in objectives or ("f:gan:saturating=1",)
            for r in regularizers or ("r1",)
            for g in gammas or (1.0,)
        ]
    else:
        games = [Game(regularizer=name, gamma=gamma) for name, gamma in SELECTION]
        games += [Game(consensus=1.0), Game("nonsaturating"), Game("nonsaturating", "r1", 1.0)]
        games += [Game("wasserstein", name, gamma) for name, gamma in WASSERSTEIN_SELECTION]
    return {game_name(game): game for game in games}


def game_name(game: "Game") -> str:
    """A name for a table."""
    extra = f" consensus {game.consensus:g}" if game.consensus else ""
    weight = f" {game.regularizer} {game.gamma:g}" if game.regularizer != "none" else ""
    return f"{game.objective}{weight}{extra}"


def states_of(game: "Game", step: float, count: int, alternating: bool) -> Any:
    """The states of a trajectory from (1, 1), itself included."""
    from gan.theory.dirac import trajectory

    yield 1.0, 1.0
    yield from trajectory(game, step, count, alternating)


def table_row(name: str, game: "Game", ends: dict[bool, tuple[float, float]]) -> dict[str, Any]:
    """Eigenvalues, bounds and ends; bounds and eigenvalues are None where the field has a kink at the equilibrium."""
    import torch

    from gan.theory.dirac import eigenvalues, field, jacobian, step_bound

    sides = [field(game, torch.tensor([0.0, psi], dtype=torch.float64)) for psi in (-1e-9, 1e-9)]
    smooth = bool((sides[0] - sides[1]).abs().max() < 1e-6)
    first, second = (f"{z.real:+.6f}{z.imag:+.6f}i" if smooth else None for z in eigenvalues(jacobian(game)))
    return {
        "game": name,
        "eigenvalue": first,
        "and": second,
        "bound, simultaneous": step_bound(game, alternating=False) if smooth else None,
        "bound, alternating": step_bound(game, alternating=True) if smooth else None,
        "end, simultaneous": math.hypot(*ends[False]),
        "end, alternating": math.hypot(*ends[True]),
    }


def draw(path: Path, games: "dict[str, Game]", walks: dict[str, list[tuple[float, float]]]) -> None:
    """A PNG of phase portraits side by side: the field as short gray lines, the walk in red, theta to the right."""
    from PIL import Image, ImageDraw

    from launch.outputs import output_file

    columns = math.ceil(math.sqrt(len(games)))
    sheet = Image.new("RGB", (columns * SIDE, math.ceil(len(games) / columns) * SIDE), "white")
    for i, (name, game) in enumerate(games.items()):
        tile = Image.new("RGB", (SIDE, SIDE), "white")
        portrait(ImageDraw.Draw(tile), game, walks[name])
        ImageDraw.Draw(tile).text((6, 4), name, fill="black")
        sheet.paste(tile, (i % columns * SIDE, i // columns * SIDE))
    with output_file(path) as part:
        sheet.save(part, "PNG")


def portrait(pen: Any, game: "Game", states: list[tuple[float, float]]) -> None:
    """One tile."""
    from gan.theory.dirac import arrows

    def place(theta: float, psi: float) -> tuple[float, float]:
        middle, unit = SIDE / 2, SIDE / 2 / REACH
        return middle + unit * theta, middle - unit * psi

    pen.line([place(-REACH, 0), place(REACH, 0)], fill="#ddd")
    pen.line([place(0, -REACH), place(0, REACH)], fill="#ddd")
    for theta, psi, a, b in arrows(game, REACH, 8, 0.16):
        pen.line([place(theta, psi), place(theta + a, psi + b)], fill="#999")
        x, y = place(theta, psi)
        pen.ellipse([x - 1, y - 1, x + 1, y + 1], fill="#999")  # where the arrow begins
    inside = [s for s in states if max(map(abs, s)) < 2 * REACH]
    pen.line([place(*s) for s in inside], fill="#c22", width=2)


if __name__ == "__main__":
    run(main, "saddle benchmark dirac")
