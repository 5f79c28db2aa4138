"""Finding and loading networks, sampling them, and reading the real images of datasets, for several commands."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from data.names import composed
from gan.errors import UserError

if TYPE_CHECKING:
    import torch

    from data.dataset import Dataset
    from gan.checkpoint import Snapshot
    from gan.metrics.sample import Source


def find_snapshot(network: str | Path) -> Path:
    """The path of a snapshot: `network` itself, or the newest one below it if it is a directory, such as a run or an
    outdir. Raises UserError if there is none."""
    path = Path(network)
    if not path.is_dir():
        return path  # load_snapshot raises UserError if it is no snapshot
    found = sorted(path.rglob("network-snapshot-*.safetensors"))
    last_of_runs = {snapshot.parent: snapshot for snapshot in found}.values()
    if not last_of_runs:
        raise UserError(f"no network-snapshot-*.safetensors in {path} or below it; train first, or name a file")
    return max(last_of_runs, key=lambda snapshot: (snapshot.stat().st_mtime, snapshot))


def last_run(outdir: str | Path) -> Path:
    """The run in a folder that ended last, or that `saddle train` last found finished. Raises UserError if there is
    none."""
    found = list(Path(outdir).glob("*/exit.json"))
    if not found:
        raise UserError(f"no run in {outdir} has ended; train first")
    return max(found, key=lambda path: path.stat().st_mtime_ns).parent


def device() -> str:
    """Where networks run: on the GPU if there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def load_network(network: str | Path) -> "Snapshot":
    """Load the snapshot that `find_snapshot` finds, onto the GPU if there is one. Raises UserError if its images do not
    have 1, 3 or 4 channels."""
    from gan.checkpoint import load_snapshot

    path = find_snapshot(network)
    snapshot = load_snapshot(path)
    if not snapshot.verified:
        click.echo(f"note: {path} is of an older version, without a SHA-256 sum of its weights to check", err=True)
    if snapshot.G.channels not in (1, 3, 4):
        raise UserError(f"{path} makes images of {snapshot.G.channels} channels; pictures have 1, 3 or 4")
    snapshot.G.to(device())
    return snapshot


def whole_snapshots(run: Path) -> "dict[Path, Snapshot]":
    """A run's snapshots that can be scored, in the order of training: at the last stage, and not fading in."""
    found = {path: load_network(path) for path in sorted(run.glob("network-snapshot-*.safetensors"))}
    last = max((snapshot.stage for snapshot in found.values()), default=0)
    return {path: snapshot for path, snapshot in found.items() if snapshot.stage == last and snapshot.alpha == 1}


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the items, evenly spaced: the last one, and where there are more also the first."""
    picks = np.linspace(len(items) - 1, 0, max(min(count, len(items)), 1)).round().astype(int)
    return [items[pick] for pick in reversed(picks)]


def check_match(path: Path, snapshot: "Snapshot", dataset: "Dataset") -> int:
    """The dataset's level with the size of a network's images. Raises UserError if its images or classes differ from
    the dataset's."""
    manifest = dataset.manifest
    made = snapshot.images
    same_format = (made.channels, made.base) == (manifest.channels, manifest.base)
    if not same_format or snapshot.stage not in manifest.levels:
        raise UserError(
            f"{path} makes images of {made.size_name(snapshot.stage)} with {made.channels} channels, "
            f"{dataset.path} has {'{}x{}'.format(*manifest.resolution)} with {manifest.channels}; "
            "give the dataset it was trained on"
        )
    if snapshot.alpha < 1:
        raise UserError(
            f"{path} was saved while its last stage was fading in (alpha {snapshot.alpha:.2f}); "
            "scores are taken at alpha 1 only: give a later snapshot"
        )
    names = [composed(name) for name in made.class_names]
    if snapshot.G.classes and names != [composed(name) for name in manifest.classes or ()]:
        raise UserError(
            f"{path} was trained on other classes than those of {dataset.path}; give the dataset of its run"
        )
    return snapshot.stage


def classes_in_turn(snapshot: "Snapshot", samples: int) -> "torch.Tensor | None":
    """The classes 0, 1, ..., 0, 1, ... to ask a network for, int64 [samples]; None for an unconditional one."""
    import torch

    classes = snapshot.G.classes
    return torch.arange(samples) % classes if classes else None


def network_source(
    snapshot: "Snapshot", labels: "torch.Tensor | None", level: int, samples: int, seed: int
) -> "Source":
    """Samples of a network. Images of an earlier stage are enlarged to the level's size."""
    import torch

    from gan.metrics.sample import Source
    from gan.sampling import batch_size, generate, to_uint8

    G = snapshot.G
    latents = np.random.RandomState(seed).randn(samples, G.z_dim)
    z = torch.from_numpy(latents.astype(np.float32))
    scale = 2 ** (level - snapshot.stage)

    def read(rows: slice) -> np.ndarray:
        asked = None if labels is None else labels[rows]
        images = to_uint8(generate(G, z[rows], asked, stage=snapshot.stage, alpha=snapshot.alpha))
        return images.repeat(scale, axis=1).repeat(scale, axis=2)

    return Source(samples, (*snapshot.images.size(level), G.channels), batch_size(G, snapshot.stage), read)


def random_images(dataset: "Dataset", most: int, seed: int) -> np.ndarray:
    """The indices of at most `most` random images of a dataset, in ascending order. Fewer are some of more."""
    return np.sort(np.random.RandomState(seed).permutation(len(dataset))[:most])


def read_reals(dataset: "Dataset", most: int, level: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` images of a level, uint8 [n, H, W, C] in the size that the classifier takes, and their indices
    [n]."""
    from gan.metrics.classifier import shrink

    indices = random_images(dataset, most, seed)
    parts = [shrink(dataset.read(chunk, level)) for chunk in np.array_split(indices, -(-len(indices) // 500))]
    return np.concatenate(parts), indices
