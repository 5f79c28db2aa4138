"""Snapshots (a generator to use anywhere) and training states (everything needed to go on).

Both hold tensors and JSON only; nothing is ever unpickled. A training state is a directory that appears by one rename,
with a manifest of SHA-256 sums, so a half-written or damaged one is recognized and the one before it is used.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from gan.config import MOST_THREADS, WHOLE, TrainConfig, from_dict
from gan.errors import UserError
from gan.families import find_family
from gan.files import replacing, sync
from gan.networks import ImageFormat
from gan.sampling import Generator
from gan.tensor_files import (
    Kinds,
    Layout,
    check_layout,
    digest,
    layout_of,
    layout_of_open,
    parse_fields,
    read_layout,
    save_tensors,
)

STATE = "training-state-"
SNAPSHOT = "network-snapshot-"
POSTHOC = "posthoc-"  # snapshots too, of averages of other lengths (gan/posthoc.py)
MOST_TEXT = 1 << 20  # bytes of a state's JSON files
STATE_FILES = ("tensors.safetensors", "state.json")
MANIFEST = "manifest.json"
MOST_STAGES = 20  # of a network in a snapshot
LARGEST = 1 << 16  # pixels a side of the images of a snapshot, and their channels
BAD_FILE = (SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError)  # what reading one raises


# What a snapshot's metadata must say, each in JSON's type.
FIELDS: Kinds = {
    "config": dict,
    "channels": int,
    "base": list,
    "last": int,
    "class_names": list,
    "dataset_hash": str,
    "stage": int,
    "alpha": (int, float),
    "images_seen": int,
}


@dataclass(frozen=True)
class Snapshot:
    """An averaged generator, ready to use, and where it comes from."""

    G: Generator
    config: TrainConfig
    images: ImageFormat  # of the dataset that it was trained on
    stage: int
    alpha: float
    images_seen: int
    verified: bool = True  # by its SHA-256 sum, which snapshots of older versions lack
    sha256: str = ""  # that sum, computed where the file lacks it


def save_snapshot(
    path: Path,
    G: Generator,
    config: dict[str, Any],
    images: ImageFormat,
    stage: int,
    alpha: float,
    images_seen: int,
) -> None:
    """Write G's weights, its truncation mean and, as JSON under the metadata key `saddle`, what generating needs, with
    the SHA-256 sum of all of it (`gan.tensor_files.digest`)."""
    about = {
        "config": config,
        "channels": images.channels,
        "base": images.base,
        "last": images.last,
        "class_names": images.class_names,
        "dataset_hash": images.dataset_hash,
        "stage": stage,
        "alpha": alpha,
        "images_seen": images_seen,
    }
    tensors = _snapshot_tensors(G)
    text = json.dumps({**about, "sha256": digest(about, tensors)})
    with replacing(path) as part:
        save_tensors(part, tensors, {"saddle": text})


def load_snapshot(path: str | Path) -> Snapshot:
    """Read a snapshot and build its generator. Raises UserError for a file that is missing, damaged or no snapshot.

    The shapes and dtypes in its header must be those of the network that it describes before anything is loaded.
    """
    try:
        with safe_open(path, "pt") as file:
            about = parse_fields((file.metadata() or {})["saddle"], FIELDS, more=True)
            wanted = about.pop("sha256", None)
            unknown = about.keys() - FIELDS.keys()
            if unknown:
                raise ValueError(f"{min(unknown)!r:.40} is unknown")
            config, images = _described(about)
            with torch.device("meta"):
                expected = layout_of(_snapshot_tensors(_generator(config, images)))
            check_layout(layout_of_open(file), expected)
            tensors = {name: file.get_tensor(name) for name in expected}
        found = digest(about, tensors)
        if wanted is not None and wanted != found:
            raise ValueError("its SHA-256 sum differs")
    except FileNotFoundError:
        raise UserError(f"no snapshot {path}") from None
    except BAD_FILE as error:
        raise UserError(
            f"{path} is damaged or of another version ({reason_of(error)}); use another snapshot"
        ) from error
    G = _generator(config, images)
    G.latent_mean.copy_(tensors.pop("latent_mean"))
    G.load_state_dict(tensors)
    G.eval().requires_grad_(False)
    return Snapshot(G, config, images, about["stage"], about["alpha"], about["images_seen"], wanted is not None, found)


def _snapshot_tensors(G: Generator) -> dict[str, Tensor]:
    return {**G.state_dict(), "latent_mean": G.latent_mean}


def _described(about: Mapping[str, Any]) -> tuple[TrainConfig, ImageFormat]:
    """The configuration and the images in a snapshot's metadata. ValueError if a value is none that we write."""
    base = tuple(about["base"])
    names = tuple(about["class_names"])
    if not all(type(name) is str for name in names):
        raise ValueError("class_names must be text")
    if len(base) != 2 or not all(type(side) is int and 0 < side <= LARGEST for side in base):
        raise ValueError(f"base is {str(base)[:40]}")
    bounds = {"channels": (1, LARGEST), "last": (0, MOST_STAGES), "images_seen": (0, 2**63), "alpha": (0, 1)}
    for name, (low, high) in {**bounds, "stage": (0, about["last"])}.items():
        if not low <= about[name] <= high:
            raise ValueError(f"{name} is {about[name]}")
    images = ImageFormat(about["channels"], base, about["last"], names, about["dataset_hash"])
    if max(images.size(images.last)) > LARGEST:
        raise ValueError(f"its images have {images.size_name(images.last)} pixels")
    return from_dict(about["config"]), images


def _generator(config: TrainConfig, images: ImageFormat) -> Any:
    """The network of a snapshot, with weights that do not matter."""
    family = find_family(config)
    with torch.random.fork_rng(devices=[]):
        G: Any = family.networks[family.generator](config, images)
    G.to(dtype=getattr(torch, config.precision.dtype))
    G.compute = None  # pictures are made in the weights' dtype, equally on every machine
    return G


def save_state(
    run_dir: Path, images_seen: int, tensors: Mapping[str, Tensor], about: dict[str, Any], keep: int, milestone: int = 0
) -> Path:
    """Write `training-state-<images>/` into a run by one rename, remove the older states that `superseded` lists, and
    return the new one's path.

    States with more images can only be damaged ones, since the run resumed before them. They do not count among the
    `keep` newest, and are replaced when the run reaches them again.
    """
    final = run_dir / f"{STATE}{images_seen:010d}"
    part = run_dir / f".{final.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir()
        save_tensors(part / "tensors.safetensors", tensors, {})
        _write(part / "state.json", json.dumps({**about, "images_seen": images_seen}, indent=1))
        sums = {name: _sha256(part / name) for name in STATE_FILES}
        _write(part / MANIFEST, json.dumps(sums, indent=1))
        sync(part)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(part, final)
        sync(run_dir)
    finally:
        shutil.rmtree(part, ignore_errors=True)  # after a failure, as on a full disk, it gives the space back
    states = states_of(run_dir)
    for old in superseded([seen for seen in states if seen <= images_seen], keep, milestone):
        shutil.rmtree(states[old])
    return final


def superseded(images: Sequence[int], keep: int, milestone: int) -> list[int]:
    """Which states to remove, given the images seen at each state in ascending order. -> those of the states to remove.

    Kept are the last `keep`, and if `milestone` > 0 the first state at or past each multiple of that many images.
    """
    first = {seen // milestone: seen for seen in reversed(images)} if milestone else {}
    first.pop(0, None)
    return [seen for seen in images[:-keep] if seen not in first.values()]


def states_of(run_dir: Path) -> dict[int, Path]:
    """The training states of a run by their images, in ascending order. Copies that a user made beside them, such as
    `training-state-0000000800.bak`, are none."""
    names = {path: re.fullmatch(rf"{STATE}(\d{{10,19}})", path.name, re.ASCII) for path in run_dir.glob(f"{STATE}*")}
    return dict(sorted((int(name[1]), path) for path, name in names.items() if name))


def check_state(path: Path, layout: Layout | None = None, batch: int = 1) -> dict[str, Any]:
    """The plain values of a training state. Raises UserError for one that is not whole: the SHA-256 sum of a file
    differs from its manifest's, or its tensors do not have this layout, or it was not saved after whole batches."""
    try:
        sums = parse_fields(_text(path / MANIFEST), dict.fromkeys(STATE_FILES, str))
        about = parse_fields(_text(path / STATE_FILES[1]), {"images_seen": int}, more=True)
        _check_about(about, batch)
        found = read_layout(path / STATE_FILES[0])
        if layout is not None:
            check_layout(found, layout, optional="augmentation")  # which states of older versions lack
        damaged = [name for name in STATE_FILES if _sha256(path / name) != sums[name]]
    except BAD_FILE as error:
        raise UserError(f"{path} is incomplete or damaged ({reason_of(error)})") from error
    if damaged:
        raise UserError(f"{path} is damaged: the SHA-256 sum of {', '.join(damaged)} differs")
    return about


def load_state(path: Path, layout: Layout | None = None, batch: int = 1) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """-> (tensors, about). Raises UserError as `check_state` does."""
    about = check_state(path, layout, batch)
    return load_file(path / STATE_FILES[0]), about


def _check_about(about: Mapping[str, Any], batch: int) -> None:
    """ValueError if a value on which resuming depends is none that we write."""
    if about["images_seen"] < 0 or about["images_seen"] % batch:
        raise ValueError(f"images_seen is {about['images_seen']}, no multiple of the batch of {batch}")
    for name, most in (("threads", MOST_THREADS), ("world_size", WHOLE)):
        if name in about and not (type(about[name]) is int and 0 < about[name] <= most):
            raise ValueError(f"{name} is {str(about[name])[:40]}")


def _text(path: Path) -> bytes:
    """The content of a small file."""
    if path.stat().st_size > MOST_TEXT:
        raise ValueError(f"{path.name} has more than {MOST_TEXT} bytes")
    return path.read_bytes()


def newest_state(run_dir: Path, layout: Layout | None = None, batch: int = 1) -> tuple[Path | None, list[str]]:
    """The newest training state of a run that `check_state` finds whole, None if there is none, and a line on each
    newer one that is not."""
    passed: list[str] = []
    for seen, path in reversed(states_of(run_dir).items()):
        try:
            inside = check_state(path, layout, batch)["images_seen"]
        except UserError as error:
            passed.append(str(error))
            continue
        if inside == seen:
            return path, passed
        passed.append(f"{path} is of another time: it was saved after {inside} images")
    return None, passed


def initial_weights(source: str, networks: Mapping[str, nn.Module]) -> None:
    """Copy the weights of a snapshot, a training state or a run's newest state into the networks with the same names.

    A snapshot holds the generator's average only: the generator and its average start from it, and all other networks
    keep their random weights. Raises UserError if no name is the same, or shapes differ.
    """
    tensors = _weights(Path(source))
    theirs = sorted({key.partition("/")[0] for key in tensors})
    if not set(theirs) & networks.keys():
        raise UserError(
            f"init_from={source} is of another kind of model: it has {', '.join(theirs)}, and this run "
            f"{', '.join(networks)}"
        )
    for name, network in networks.items():
        part = {k.removeprefix(name + "/"): v for k, v in tensors.items() if k.startswith(name + "/")}
        if not part:
            continue
        ours = {k: list(v.shape) for k, v in network.state_dict().items()}
        given = {k: list(v.shape) for k, v in part.items()}
        differ = [k for k in sorted(ours.keys() | given.keys()) if ours.get(k) != given.get(k)]
        if differ:
            first = differ[0]
            raise UserError(
                f"init_from={source} does not fit: {first} of {name} is {ours.get(first, 'missing')} here and "
                f"{given.get(first, 'missing')} there ({len(differ)} tensors differ); use the network.* and data.cond "
                "settings of that run"
            )
        network.load_state_dict(part)


def _weights(path: Path) -> Mapping[str, Tensor]:
    if not path.is_dir():
        snapshot = load_snapshot(path)
        family = find_family(snapshot.config)
        weights = snapshot.G.state_dict()
        return {f"{name}/{k}": v for name in (family.generator, family.average) for k, v in weights.items()}
    state = path if (path / "manifest.json").exists() else newest_state(path)[0]
    if state is None:
        raise UserError(f"init_from={path} is no snapshot, training state or run, or has no undamaged state")
    return load_state(state)[0]


def reason_of(error: Exception) -> str:
    """The beginning of an error's message."""
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


def _write(path: Path, text: str) -> None:
    path.write_text(text)
    sync(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
