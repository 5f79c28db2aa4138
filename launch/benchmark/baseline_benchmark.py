"""Train a GAN and a VAE with the same decoder on the same data for the same time, and compare what they make."""

import html
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gan.errors import UserError
from launch.cli import run
from launch.outputs import output_file
from launch.tables import fingerprint, json_option, save_rows, text_table

if TYPE_CHECKING:
    from data.dataset import ImageDataset
    from gan.config import TrainConfig
    from gan.schedules import Moment
    from gan.state import Task
    from launch.benchmark.timing import Call

OF_DECODER = ("z_dim", "widths", "channel_base", "channel_max", "filter", "depth", "residual")
DECODER = tuple(f"network.{name}" for name in OF_DECODER)
SHARED = (*DECODER, "network.class_gain", "batch", "data.resolution", "data.cond", "data.mirror")
ROUNDS = 5
COLUMNS = 10
PICTURED = 100  # images in a grid


@click.command(context_settings={"show_default": True})
@click.option("--data", required=True, type=click.Path(path_type=Path), help="Images to train on and compare with.")
@click.option("--test", type=click.Path(path_type=Path), help="Images for the likelihood.  [default: those of --data]")
@click.option("--outdir", type=click.Path(path_type=Path), default="runs/baseline", help="Folder of runs and page.")
@click.option("--preset", default="digits", help="Of the GAN, whose decoder and batch the VAE takes.")
@click.option("--vae-preset", default="vae-digits", help="What else the VAE has.")
@click.option("--kimg", type=click.FloatRange(0, min_open=True), help="Of the GAN.  [default: the preset's]")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0)
@click.option("--threads", type=click.IntRange(1, 4096), default=1, help="Of the trainings.")
@click.option("--features", default="classifier", help="What compares images, as of `saddle evaluate`.")
@click.option("--samples", type=click.IntRange(100), default=10_000, help="Of each network.")
@json_option
def main(
    data: Path,
    test: Path | None,
    outdir: Path,
    preset: str,
    vae_preset: str,
    kimg: float | None,
    seed: int,
    threads: int,
    features: str,
    samples: int,
    json_path: Path | None,
) -> None:
    """Train both, score them beside real images, and write a table and a page with their pictures.

    Steps of both are timed side by side, on one thread in CPU time, and the VAE gets as many images as make its
    training as long as the GAN's. Started again after it was stopped, it goes on.
    """
    from data.dataset import ImageDataset
    from gan.config import trajectory
    from launch.benchmark.training import kept, trained
    from launch.likelihood_estimates import quick_bound
    from launch.samples import load_network

    dataset = ImageDataset(data)
    common = {"seed": seed} if kimg is None else {"seed": seed, "kimg": kimg}
    gan = configuration(preset, common)
    if gan.model != "gan":
        raise UserError(f"--preset={preset} is a {gan.model}; it is the GAN's, and --vae-preset the VAE's")
    decoder = shared_settings(gan)
    vae = configuration(vae_preset, {"seed": seed, **decoder})
    if vae.model != "vae":
        raise UserError(f"--vae-preset={vae_preset} is a {vae.model}")
    of = fingerprint([trajectory(gan), trajectory(vae), gan.run.kimg, dataset.manifest.content_hash, threads])
    budget = kept(outdir / f"budget-{of}.json", lambda: equal_time(gan, vae, dataset, threads))
    click.echo(
        f"GAN {budget['gan']['kimg']:g} kimg, VAE {budget['vae']['kimg']:g} kimg, {budget['seconds']:.0f} s each"
    )
    of_all = {"run.threads": threads}
    length = {"seed": seed, "kimg": budget["gan"]["kimg"]}
    paths = {"GAN": trained(data, outdir / "gan", {"preset": preset, **length}, of_all)}
    length = {"seed": seed, "kimg": budget["vae"]["kimg"]}
    paths["VAE"] = trained(data, outdir / "vae", {"preset": vae_preset, **length}, decoder | of_all)
    networks = {name: load_network(path).sha256 for name, path in paths.items()}
    of = fingerprint([*networks.values(), dataset.manifest.content_hash, features, samples, seed])
    scores = kept(outdir / f"scores-{of}.json", lambda: score_all(paths, dataset, features, samples, seed))
    held_out = ImageDataset(test or data)
    of = fingerprint([networks["VAE"], held_out.manifest.content_hash, seed])
    likelihood = kept(outdir / f"likelihood-{of}.json", lambda: quick_bound(load_network(paths["VAE"]), held_out, seed))
    rows = table(scores, budget, likelihood)
    click.echo(text_table(rows))
    page = outdir / "baseline.html"
    write_page(page, rows, paths, dataset, f"{data.name}, {budget['seconds']:.0f} s of training each, seed {seed}")
    click.echo(f"wrote {page}")
    about = {"data": str(data), "test": str(test or data), "preset": preset, "vae_preset": vae_preset, "seed": seed}
    save_rows(json_path, {**about, "budget": budget, "rows": rows, "scores": scores, "likelihood": likelihood})


def configuration(preset: str, values: Mapping[str, Any]) -> "TrainConfig":
    """The settings that `saddle train` would have. Raises UserError as it does."""
    from gan.config import TrainConfig, override
    from launch.settings import read_preset

    named = {"run.kimg" if key == "kimg" else key: value for key, value in values.items()}
    return override(TrainConfig(), read_preset(preset) | named)


def shared_settings(config: "TrainConfig") -> dict[str, Any]:
    """What the VAE takes from the GAN, by key."""
    from gan.config import value_of

    values = {key: value_of(config, key) for key in SHARED}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def equal_time(gan: "TrainConfig", vae: "TrainConfig", dataset: "ImageDataset", threads: int) -> dict[str, Any]:
    """How many kimg of the VAE take as long as the GAN's run, from steps of every stage that are timed in turns."""
    import torch

    from launch.benchmark.timing import HostClock, contest

    torch.set_num_threads(threads)
    tasks = {"gan": task(gan, dataset), "vae": task(vae, dataset)}
    calls: dict[str, Call] = {}
    steps: dict[str, dict[str, int]] = {"gan": {}, "vae": {}}
    for name, of in tasks.items():
        for index, moments in enumerate(moments_of_stages(of)):
            cycle = of.config.regularizer.every
            calls[f"{name} {index}"] = cycle_of_steps(of, moments[-cycle:], dataset)
            steps[name][f"{name} {index}"] = len(moments)
    clock = HostClock(2 if torch.cuda.is_available() else threads)  # a GPU's work is not the process's
    clock.budget = math.inf
    times, _ = contest(calls, clock, ROUNDS)
    seconds = {
        name: sum(count * times[key].median / 1000 / tasks[name].config.regularizer.every for key, count in of.items())
        for name, of in steps.items()
    }
    kimg = vae.run.kimg * seconds["gan"] / seconds["vae"]
    return {
        "seconds": seconds["gan"],
        "clock": clock.name,
        "gan": {"kimg": gan.run.kimg},
        "vae": {"kimg": max(round(kimg * 1000 / vae.batch), 1) * vae.batch / 1000},
    }


def task(config: "TrainConfig", dataset: "ImageDataset") -> "Task":
    """A training of this configuration on this machine, as `saddle train` would plan it."""
    import torch

    from gan.precision import resolve
    from gan.ranks.distributed import Ranks, set_precision
    from gan.run.plan import plan_run
    from launch.settings import image_format

    config = resolve(config)
    ranks = Ranks(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    set_precision(ranks, config.distributed.deterministic)
    return plan_run(config, image_format(dataset, config), "timed").task(ranks)


def moments_of_stages(of: "Task") -> "list[list[Moment]]":
    """The steps of each stage of a run."""
    from gan.run.loop import steps

    stages: dict[int, list[Moment]] = {}
    for now in steps(of, 0):
        stages.setdefault(now.stage, []).append(now)
    return list(stages.values())


def cycle_of_steps(of: "Task", moments: "list[Moment]", dataset: "ImageDataset") -> "Call":
    """A function that trains for a few steps, on images that were read beforehand."""
    import numpy as np
    import torch

    from gan.inputs import step_inputs
    from gan.ranks.statistics import Statistics
    from gan.state import initial_state

    state = initial_state(of)
    first = np.arange(of.config.batch)
    images = torch.from_numpy(dataset.read(first, moments[0].stage)).to(of.ranks.device)
    labels = None
    if of.config.data.cond:
        assert dataset.labels is not None  # `image_format` has looked
        labels = torch.from_numpy(dataset.labels[first]).to(images.device)
    stats = Statistics()

    def call() -> None:
        for now in moments:
            of.family.step(state, of, now, step_inputs(of, now, images, labels), stats)
        stats.take()  # waits for a GPU

    return call


def score_all(
    paths: Mapping[str, Path], dataset: "ImageDataset", features: str, samples: int, seed: int
) -> dict[str, Any]:
    """Scores of both networks and of reals, as plain values by row."""
    from gan.metrics.classifier import one_thread
    from launch.samples import check_match, load_network
    from launch.scores import build_reference, score_as_json

    networks = {name: load_network(path) for name, path in paths.items()}
    level = max(check_match(paths[name], network, dataset) for name, network in networks.items())
    with one_thread():
        reference = build_reference(dataset, level, seed, metrics="fd,pr,dc", features=features, samples=samples)
        rows = {name: reference.score_network(network, samples) for name, network in networks.items()}
        rows |= reference.floors(samples)
    return {name: score_as_json(row, str(dataset.path)) for name, row in rows.items()}


def table(scores: Mapping[str, Any], budget: Mapping[str, Any], likelihood: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lines that are printed: both networks, then reals."""
    rows: list[dict[str, Any]] = []
    for name, score in scores.items():
        if not score["figures"]:
            continue
        figures = {key.partition("-")[0]: figure["value"] for key, figure in score["figures"].items()}
        trained_for = budget.get(name.lower())
        has_likelihood = name == "VAE"
        rows.append(
            {
                "": name,
                "Fréchet distance": round(figures["fd"], 2) if "fd" in figures else None,
                "precision": _rounded(figures.get("precision")),
                "recall": _rounded(figures.get("recall")),
                "density": _rounded(figures.get("density")),
                "coverage": _rounded(figures.get("coverage")),
                "log p(x) >=": round(likelihood["nats"], 1) if has_likelihood else None,
                "bits per number": _rounded(likelihood["bits"]) if has_likelihood else None,
                "kimg": trained_for and trained_for["kimg"],
                "seconds": trained_for and round(budget["seconds"]),
            }
        )
    return rows


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def write_page(
    path: Path, rows: list[dict[str, Any]], paths: Mapping[str, Path], dataset: "ImageDataset", caption: str
) -> None:
    """One HTML file with the table and the pictures in it."""
    from launch.latent_pictures import Encoded, reconstructions
    from launch.pictures import grid_picture, png_text
    from launch.samples import load_network

    networks = {name: load_network(network) for name, network in paths.items()}
    pictures = {
        f"{name}: samples": grid_picture(of, range(PICTURED), None, 1.0, COLUMNS) for name, of in networks.items()
    }
    encoded = Encoded(str(paths["VAE"]), str(dataset.path), PICTURED // 2, 0)
    pictures["VAE: real images, each with its reconstruction to the right"] = tiled(reconstructions(encoded))
    pictures["Real images"] = tiled(Encoded(str(paths["VAE"]), str(dataset.path), PICTURED, 1).pixels)
    figures = "\n".join(
        f'<figure><img src="data:image/png;base64,{png_text(picture)}" alt="">'
        f"<figcaption>{html.escape(title)}</figcaption></figure>"
        for title, picture in pictures.items()
    )
    cells = [list(rows[0]), *([shown(value) for value in line.values()] for line in rows)]
    lines = "\n".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in cells)
    page = PAGE.format(caption=html.escape(caption), figures=figures, lines=lines)
    with output_file(path) as part:
        part.write_text(page, encoding="utf-8")


def shown(value: Any) -> str:
    """A cell of the page's table."""
    return "" if value is None else str(value)


def tiled(images: Any) -> Any:
    """uint8 [n, H, W, C] -> one picture."""
    from gan.sampling import tile

    return tile(images, COLUMNS)


PAGE = """<!doctype html>
<meta charset="utf-8">
<title>GAN and VAE</title>
<style>
body {{ font: 16px/1.5 sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em; }}
main {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(340px, 1fr)); gap: 1.5em; }}
figure {{ margin: 0; }}
img {{ width: 100%; image-rendering: pixelated; }}
table {{ border-collapse: collapse; margin: 1em 0; font-size: 14px; }}
td {{ padding: .2em .7em; text-align: right; border-bottom: 1px solid #ddd; }}
tr:first-child {{ font-weight: bold; }}
td:first-child {{ text-align: left; }}
</style>
<h1>GAN and VAE with the same decoder</h1>
<p>{caption}</p>
<table>
{lines}
</table>
<main>
{figures}
</main>
"""


if __name__ == "__main__":
    run(main, "saddle benchmark baseline")
