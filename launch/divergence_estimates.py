"""Divergences between two sets of samples, for `saddle evaluate --divergence`."""

import hashlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np

from gan.errors import UserError
from gan.methods.rows import split_names
from launch.samples import classes_in_turn, device, load_network, network_source, random_images
from launch.scores import CLASSIFIER, READ, classifier_line, train_on_first
from launch.tables import save_rows, text_table

Encode = Callable[[np.ndarray], np.ndarray]  # images uint8 [n, H, W, C] -> float32 [n, ...]
PIXELS = "pixels"


def estimate_divergences(
    names: str, data: str, against: str, samples: int, seed: int, features: str, json_path: Path | None
) -> None:
    """Print estimates of D_f(P||Q), and write them as JSON; P is the set `data`, Q the set `against`.

    features: pixels, or a network as in `gan.metrics.features`. Raises UserError for names that do not exist and sets
    that cannot be read or compared.
    """
    from gan.methods.divergences import divergence
    from gan.metrics.provenance import versions
    from gan.theory.ruler import check_samples, estimate_divergence

    rows = {name: divergence(name) for name in split_names(names)}
    if not rows:
        raise UserError("--divergence is empty; write for example --divergence=kl,js")
    encode, weights = find_encoding(features, data, seed)
    p, p_sha256 = read_set(data, samples, seed, encode)
    q, q_sha256 = read_set(against, samples, seed, encode)
    check_samples(p, q)
    click.echo(f"{len(p)} samples of {data} against {len(q)} of {against}, {list(p.shape[1:])} each")
    table: list[dict[str, Any]] = []
    for name, row in rows.items():
        result = estimate_divergence(row, p, q, seed)
        table.append({"divergence": name, **asdict(result)})
        click.echo(f"{name} done in {result.steps} steps")
    click.echo(text_table(table))
    click.echo("bound: at most the divergence, up to sampling error; low, high: 95 % confidence interval of the bound")
    origin = {
        "features": {"name": features, "sha256": weights},
        "p": {"set": data, "sha256": p_sha256, "samples": len(p)},
        "q": {"set": against, "sha256": q_sha256, "samples": len(q)},
        "seed": seed,
        "versions": versions(device()),
    }
    save_rows(json_path, [{**row, **origin} for row in table])


def find_encoding(features: str, data: str, seed: int) -> tuple[Encode, str]:
    """What turns images into the arrays between which divergences are estimated, and the SHA-256 sum of its weights.
    A classifier is trained on `data`."""
    from data.dataset import ImageDataset
    from gan.metrics.features import classifier_features, load_features
    from gan.ranks.distributed import Ranks

    if features == PIXELS:
        return as_input, ""
    if features != CLASSIFIER:
        network = load_features(features, device())
        return network, network.sha256
    if Path(data).suffix == ".npy":
        raise UserError("--features=classifier needs images, and a dataset with classes for --data")
    dataset = ImageDataset(data)
    level = max(dataset.manifest.levels)
    classifier = train_on_first(dataset, level, seed, Ranks(), click.echo)
    click.echo(classifier_line(classifier, dataset.manifest.size(level)))
    network = classifier_features(classifier)
    return network, network.sha256


def as_input(images: np.ndarray) -> np.ndarray:
    """Images uint8 [n, H, W, C] -> float32 [n, C, h, w] in [-1, 1], averaged down to at most 32 pixels a side."""
    from gan.metrics.classifier import shrink, to_input

    return to_input(shrink(images)).numpy()


def read_set(source: str, samples: int, seed: int, encode: Encode) -> tuple[np.ndarray, str]:
    """Up to `samples` samples of a .npy file, a dataset, a snapshot or a run: vectors [n, K], or encoded images. And
    the SHA-256 sum of what they are taken from."""
    path = Path(source)
    if path.suffix == ".npy":
        array = _read_array(path)
        return _encode_array(path, array[:samples], encode), hashlib.sha256(array.tobytes()).hexdigest()
    if path.suffix == ".safetensors" or (path.is_dir() and not (path / "data.mdb").exists()):
        snapshot = load_network(source)
        made = network_source(snapshot, classes_in_turn(snapshot, samples), snapshot.stage, samples, seed)
        return _in_batches(made.read, made.count, made.batch, encode), snapshot.sha256
    from data.dataset import ImageDataset

    dataset = ImageDataset(source)
    level = max(dataset.manifest.levels)
    indices = random_images(dataset, samples, seed)
    encoded = _in_batches(lambda rows: dataset.read(indices[rows], level), len(indices), READ, encode)
    return encoded, dataset.manifest.content_hash


def _in_batches(read: Callable[[slice], np.ndarray], count: int, batch: int, encode: Encode) -> np.ndarray:
    return np.concatenate([encode(read(slice(start, start + batch))) for start in range(0, count, batch)])


def _encode_array(path: Path, array: np.ndarray, encode: Encode) -> np.ndarray:
    if array.ndim == 4:
        return _in_batches(lambda rows: array[rows], len(array), READ, encode)
    if encode is not as_input:
        raise UserError(f"--features needs images, and {path} holds vectors")
    return array


def _read_array(path: Path) -> np.ndarray:
    try:
        array = np.array(np.lib.format.open_memmap(path, mode="r"))  # a header that lies must not take memory
    except (OSError, ValueError, TypeError, SyntaxError, RecursionError) as error:
        reason = (str(error).splitlines() or ["it is empty"])[0][:120]
        raise UserError(f"{path} cannot be read as an .npy file, which holds one array: {reason}") from error
    if not (array.ndim == 2 and array.dtype.kind in "fiu") and not (array.ndim == 4 and array.dtype == np.uint8):
        raise UserError(
            f"{path} holds {array.dtype} {list(array.shape)}; wanted vectors [n, K] or images uint8 [n, H, W, C]"
        )
    return array
