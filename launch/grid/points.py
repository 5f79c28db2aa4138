"""Cells that train small GANs on clusters in the plane, those of several seeds at once."""

import hashlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from gan.config import check_name, nearest
from gan.errors import UserError
from launch.grid.cells import BY_CHANCE, Cell, Result, Work

if TYPE_CHECKING:
    from gan.theory.clusters import Recipe, Trained

LOOKS = 12  # at the samples, evenly spaced; figures are those of the last
SHOWN = 600  # samples in a result
TAKES: dict[type, tuple[type, ...]] = {
    int: (int,),
    float: (float, int),
    tuple: (tuple, list),
}  # the type of a setting -> those of its value in a plan


def on_this_host(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """A plan's settings, which are the same on all hosts. Raises UserError for those that cannot be."""
    recipe_of(settings)
    return settings


def recipe_of(settings: Mapping[str, Any]) -> "Recipe":
    """How cells with these settings are trained. Raises UserError for what does not exist or is out of bounds."""
    from gan.theory.clusters import BATCH, Recipe

    known = {f.name: f for f in fields(Recipe)}
    for name, value in settings.items():
        if name not in known or name in ("share", "group"):
            raise UserError(f"points have no setting {name:.100}; {nearest(name, known)}")
        wanted = type(known[name].default)
        if not isinstance(value, TAKES[wanted]):
            raise UserError(f"{name} wants a {wanted.__name__}, got {value!r:.100}")
    given: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in settings.items()}
    recipe = Recipe(**{**given, "group": BATCH})
    if recipe.steps < LOOKS or recipe.n_critic < 1 or recipe.every < 1:
        raise UserError(f"steps must be at least {LOOKS}, n_critic and every at least 1")
    betas = [beta for beta in recipe.betas if type(beta) in (int, float) and 0 <= beta < 1]
    if len(recipe.betas) != 2 or len(betas) != 2:
        raise UserError(f"betas are two numbers from 0 to below 1, got {list(recipe.betas)!r:.100}")
    if not all(0 < rate < math.inf for rate in (recipe.g_lr, recipe.d_lr)) or not 0 < recipe.decay <= 1:
        raise UserError("g_lr and d_lr are positive numbers, decay is above 0 and at most 1")
    return recipe


def decides(cell: Cell) -> Mapping[str, Any]:
    """All on which the result of a cell depends beside the seed. Raises UserError for what cannot be."""
    from gan.methods.pairs import find_pair
    from gan.theory.clusters import POINTS

    check_name("datasets", cell.dataset, POINTS)
    _, regularizer = find_pair(cell.objective, cell.regularizer)
    if regularizer.pictures:
        raise UserError(f"regularizer.name={cell.regularizer} changes pictures, and these are points")
    if not isinstance(cell.gamma, int | float):
        raise UserError(f"regularizer.gamma={cell.gamma} is of images: give a number")
    method = {"objective": cell.objective, "regularizer": cell.regularizer, "gamma": float(cell.gamma)}
    return {"dataset": dataset_hash(cell.dataset), **method, "recipe": asdict(recipe_of(cell.settings))}


def dataset_hash(name: str) -> str:
    """A hash of the clusters' centers and spread."""
    from gan.theory.clusters import POINTS, SPREAD

    return hashlib.sha256(POINTS[name].tobytes() + str(SPREAD).encode()).hexdigest()


def run(work: Sequence[tuple[Cell, Work]]) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Train the cells of a unit, which differ in their seeds."""
    import torch

    from gan.ranks.distributed import Ranks, set_precision
    from gan.theory.clusters import POINTS, train_seeds

    torch.set_num_threads(1)
    set_precision(Ranks(), deterministic=False)
    cell = work[0][0]
    recipe = recipe_of(cell.settings)
    looks = [recipe.steps * (i + 1) // LOOKS for i in range(LOOKS)]
    seeds = [each.seed for each, _ in work]
    start = time.process_time()
    gamma = float(cell.gamma)
    trained = train_seeds(cell.objective, cell.regularizer, gamma, POINTS[cell.dataset], seeds, recipe, looks)
    seconds = (time.process_time() - start) / len(seeds)
    for (each, _), found in zip(work, trained, strict=True):
        yield each, result_of(each, recipe, found, seconds)


def result_of(cell: Cell, recipe: "Recipe", trained: "Trained", seconds: float) -> dict[str, Any]:
    """A cell's result as plain values, as launch.grid.cells.Result has them."""
    import numpy as np

    from gan.metrics.modes import mode_kl_floor
    from gan.metrics.provenance import Features, Provenance, versions
    from gan.theory.clusters import BATCH, POINTS, SAMPLES

    last = trained.looks[-1][1]
    names = {"mode-kl": "mode_kl", "modes": "modes", "near": "near"}
    finite = math.isfinite(last["mode_kl"])
    values = {name: float(last[key]) for name, key in names.items()} if finite else {}
    values |= {f"mode-kl{BY_CHANCE}": mode_kl_floor(SAMPLES, len(POINTS[cell.dataset]))} if finite else {}
    curve = [
        [step * BATCH * recipe.n_critic, {"mode-kl": look["mode_kl"]}]
        for step, look in trained.looks
        if math.isfinite(look["mode_kl"])
    ]
    features = Features("nearest cluster", dataset_hash(cell.dataset), 0, "none")
    digest = hashlib.sha256(trained.points.tobytes()).hexdigest()
    about = Provenance(features, dataset_hash(cell.dataset), (2,), 0, SAMPLES, cell.seed, digest, versions("cpu"))
    return vars(
        Result(
            diverged="" if finite else "samples are not finite",
            figures={name: {"value": value, "low": value, "high": value} for name, value in values.items()},
            curve=curve,
            steps=recipe.steps,
            images=recipe.steps * recipe.n_critic * BATCH,
            seconds=round(seconds, 3),
            provenance=about.to_json(),
            points=np.round(trained.points[:SHOWN], 2).tolist() if finite else [],
        )
    )
