"""Divergences between two sets of samples, for `saddle evaluate --divergence`."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np

from gan.errors import UserError
from gan.methods.rows import split_names
from launch.samples import classes_in_turn, load_network, read_reals, sample_batches
from launch.scores import build_reference, classifier_summary
from launch.tables import save_rows, text_table


def estimate_divergences(
    names: str, data: str, against: str, samples: int, seed: int, features: bool, json_path: Path | None
) -> None:
    """Print estimates of D_f(P||Q), and write them as JSON; P is the set `data`, Q the set `against`.

    Raises UserError for names that do not exist and sets that cannot be read or compared.
    """
    from gan.methods.divergences import divergence
    from gan.theory.ruler import check_samples, estimate_divergence

    rows = {name: divergence(name) for name in split_names(names)}
    if not rows:
        raise UserError("--divergence is empty; write for example --divergence=kl,js")
    p = read_set(data, samples, seed)
    q = read_set(against, samples, seed)
    if features:
        p, q = classifier_features(data, p, q, seed)
    p = as_input(p)
    q = as_input(q)
    check_samples(p, q)
    click.echo(f"{len(p)} samples of {data} against {len(q)} of {against}, {list(p.shape[1:])} each")
    table: list[dict[str, Any]] = []
    for name, row in rows.items():
        result = estimate_divergence(row, p, q, seed)
        table.append({"divergence": name, **asdict(result)})
        click.echo(f"{name} done in {result.steps} steps")
    click.echo(text_table(table))
    click.echo("bound: at most the divergence, up to sampling error; low, high: 95 % confidence interval of the bound")
    save_rows(json_path, table)


def read_set(source: str, samples: int, seed: int) -> np.ndarray:
    """Up to `samples` samples of a .npy file, a dataset, a snapshot or a run: vectors [n, K] or uint8 [n, H, W, C]."""
    path = Path(source)
    if path.suffix == ".npy":
        return _read_array(path)[:samples]
    if path.suffix == ".safetensors" or (path.is_dir() and not (path / "data.mdb").exists()):
        return _sample_network(source, samples, seed)
    from data.dataset import ImageDataset

    dataset = ImageDataset(source)
    return read_reals(dataset, samples, max(dataset.manifest.levels), seed)[0]


def _read_array(path: Path) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    if not (array.ndim == 2 and array.dtype.kind in "fiu") and not (array.ndim == 4 and array.dtype == np.uint8):
        raise UserError(
            f"{path} holds {array.dtype} {list(array.shape)}; wanted vectors [n, K] or images uint8 [n, H, W, C]"
        )
    return array


def _sample_network(source: str, samples: int, seed: int) -> np.ndarray:
    snapshot = load_network(source)
    labels = classes_in_turn(snapshot, samples)
    return np.concatenate(list(sample_batches(snapshot, labels, snapshot.stage, samples, seed)))


def as_input(samples: np.ndarray) -> np.ndarray:
    """Images uint8 [n, H, W, C] -> float32 [n, C, H, W] in [-1, 1]; vectors [n, K] as they are."""
    from gan.metrics.classifier import to_input

    return samples if samples.ndim == 2 else to_input(samples).numpy()


def classifier_features(data: str, p: np.ndarray, q: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Both sets in the features of the classifier that `saddle evaluate` trains on the labels of `data`."""
    from data.dataset import ImageDataset

    if p.ndim != 4 or q.ndim != 4 or Path(data).suffix == ".npy":
        raise UserError("--features=1 needs images, and a labeled dataset for --data")
    dataset = ImageDataset(data)
    reference = build_reference(dataset, max(dataset.manifest.levels), seed)
    click.echo(classifier_summary(reference))
    return reference.classifier(p)[0], reference.classifier(q)[0]
