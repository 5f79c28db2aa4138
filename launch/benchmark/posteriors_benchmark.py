"""Train VAEs that differ in bound or posterior only, and compare what log p(x) they give to images held out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from gan.errors import UserError
from launch.cli import run
from launch.tables import json_option, save_rows, text_table

if TYPE_CHECKING:
    from data.dataset import Dataset

REFERENCE = "vae"  # the row that others are compared with
ROWS: dict[str, dict[str, Any]] = {  # the settings that differ from the preset
    "vae": {},
    "iwae-5": {"vae.bound": "iwae", "vae.samples": 5},
    "iwae-50": {"vae.bound": "iwae", "vae.samples": 50},
    "planar": {"vae.posterior": "planar"},
    "householder": {"vae.posterior": "householder"},
    "iaf": {"vae.posterior": "iaf"},
    "coupling": {"vae.posterior": "coupling"},
    "hamiltonian": {"vae.posterior": "hamiltonian"},
    "auxiliary": {"vae.posterior": "auxiliary"},
    "implicit": {"vae.posterior": "implicit"},
}
NO_WEIGHTS = ("implicit",)  # posteriors whose density is not known: only annealed importance sampling says something
SEED = 0  # of the images held out, of what is black and white in them, and of the estimators' draws


@click.command(context_settings={"show_default": True})
@click.option("--data", required=True, type=click.Path(path_type=Path), help="Images to train on.")
@click.option("--test", required=True, type=click.Path(path_type=Path), help="Images held out.")
@click.option("--outdir", type=click.Path(path_type=Path), default="runs/posteriors", help="Folder of the runs.")
@click.option("--preset", default="vae-dense", help="What all rows share.")
@click.option("--rows", default=",".join(ROWS), metavar="NAME,...", help="What is trained.")
@click.option("--seeds", default="0", metavar="0,1,4-6", help="Each row is trained with each of them.")
@click.option("--kimg", type=click.FloatRange(0, min_open=True), help="Of each training.  [default: the preset's]")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Of all rows, as of `saddle train`.")
@click.option("--draws", type=click.IntRange(2), default=5000, help="Latents per image that iwae takes.")
@click.option("--images", type=click.IntRange(2), default=2000, help="Images held out that iwae takes.")
@click.option("--compared", type=click.IntRange(2), default=200, help="Of these, images that the others take too.")
@json_option
def main(
    data: Path,
    test: Path,
    outdir: Path,
    preset: str,
    rows: str,
    seeds: str,
    kimg: float | None,
    assignments: tuple[str, ...],
    draws: int,
    images: int,
    compared: int,
    json_path: Path | None,
) -> None:
    """Train each row with each seed, estimate log p(x) of images held out, and print a table.

    `nats` is the mean over images and seeds by IWAE, `above vae` its difference to the row vae on the same images.
    Standard errors are of images and seeds together. The other columns compare estimators on fewer images. Started
    again after it was stopped, it goes on; what another call left in --outdir is not repeated.
    """
    from data.dataset import open_dataset
    from gan.config import parse_assignment
    from gan.sampling import parse_seeds
    from launch.benchmark.training import trained
    from launch.samples import random_images

    names = check_rows(rows)
    numbers = parse_seeds(seeds)
    held_out = open_dataset(test)
    all_of_them = random_images(held_out, images, SEED)
    some = random_images(held_out, min(compared, images), SEED)
    bound = f"iwae:draws={draws}"
    estimators = {bound: all_of_them, "jackknife": some, "ais": some}
    length = {} if kimg is None else {"kimg": kimg}
    of_all = dict(parse_assignment(text) for text in assignments)
    found: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in names}
    for seed in numbers:
        for name in names:
            flags = {"preset": preset, "seed": seed, **length}
            snapshot = trained(data, outdir / f"{name}-seed{seed}", flags, of_all | ROWS[name])
            known = {"ais": some} if name in NO_WEIGHTS else estimators
            values = {estimator: estimates(estimator, snapshot, held_out, known[estimator]) for estimator in known}
            click.echo(f"{name}, seed {seed}: {', '.join(f'{key} {v.mean():.2f}' for key, v in values.items())}")
            found[name].append(values)
    among = np.isin(all_of_them, some)
    table = [row(name, found[name], found.get(REFERENCE, []), bound, among) for name in names]
    click.echo(text_table(table))
    about = {"preset": preset, "data": str(data), "test": str(test), "seeds": numbers, "draws": draws, "set": of_all}
    save_rows(json_path, {**about, "images": len(all_of_them), "compared": len(some), "rows": table})


def check_rows(text: str) -> list[str]:
    """'vae,iaf' -> the names. Raises UserError for one that does not exist."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in ROWS:
            raise UserError(f"--rows={name} is unknown; known: {', '.join(ROWS)}")
    return names


def estimates(estimator: str, snapshot: Path, dataset: "Dataset", indices: np.ndarray) -> np.ndarray:
    """log p(x) of images in nats [len(indices)], computed once and kept beside the snapshot."""
    from gan.vae.estimates import find_estimator
    from launch.benchmark.training import kept
    from launch.likelihood_estimates import log_likelihoods
    from launch.samples import check_match, load_network

    def find() -> dict[str, Any]:
        network = load_network(snapshot)
        check_match(snapshot, network, dataset)
        return {"nats": log_likelihoods(find_estimator(estimator), network, dataset, indices, SEED).tolist()}

    of = f"{len(indices)}-{dataset.manifest.content_hash[:8]}"
    name = f"{snapshot.stem}-{estimator.replace(':', '-')}-{of}.json"
    return np.array(kept(snapshot.parent / name, find)["nats"])


def row(
    name: str,
    runs: Sequence[Mapping[str, np.ndarray]],
    reference: Sequence[Mapping[str, np.ndarray]],
    bound: str,
    among: np.ndarray,
) -> dict[str, Any]:
    """A line of the table, of a row's estimates for each seed. among: which images the other estimators took too."""
    line: dict[str, Any] = {"row": name, "seeds": len(runs)}
    whole = [values[bound] for values in runs if bound in values]
    gains = [ours - other[bound] for ours, other in zip(whole, reference, strict=False)]
    few = {bound: [values[among] for values in whole]}
    few |= {other: [values[other] for values in runs if other in values] for other in ("jackknife", "ais")}
    columns = {"nats": whole, f"above {REFERENCE}": gains, **{f"{key}, few": few[key] for key in few}}
    for title, values in columns.items():
        line[title], line[f"± {title}"] = mean_and_error(values)
    return line


def mean_and_error(values: Sequence[np.ndarray]) -> tuple[float | None, float | None]:
    """The mean over seeds and images of [images] for each seed, and its standard error; None for no seeds.

    Images are the same for all seeds: the error is the root of that of images, after the mean over seeds, squared, and
    that of seeds, squared, if there are several.
    """
    if not values:
        return None, None
    by_image = np.mean(values, 0)
    variance = by_image.var(ddof=1) / len(by_image)
    if len(values) > 1:
        variance += np.var([one.mean() for one in values], ddof=1) / len(values)
    return round(float(by_image.mean()), 3), round(float(variance**0.5), 3)


if __name__ == "__main__":
    run(main, "saddle benchmark posteriors")
