"""Snapshots (a generator to use anywhere) and training states (everything needed to go on).

Both hold tensors and JSON only; nothing is ever unpickled. A training state is a directory that appears by one rename,
with a manifest of SHA-256 sums, so a half-written or damaged one is recognized and the one before it is used.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gan.config import TrainConfig, from_dict
from gan.errors import UserError
from gan.families import find_family
from gan.files import replacing, sync
from gan.networks import ImageFormat
from gan.sampling import Generator

STATE = "training-state-"
SNAPSHOT = "network-snapshot-"
POSTHOC = "posthoc-"  # snapshots too, of averages of other lengths (gan/posthoc.py)


@dataclass(frozen=True)
class Snapshot:
    """An averaged generator, ready to use, and where it comes from."""

    G: Generator
    config: TrainConfig
    images: ImageFormat  # of the dataset that it was trained on
    stage: int
    alpha: float
    images_seen: int


def save_snapshot(
    path: Path,
    G: Generator,
    config: dict[str, Any],
    images: ImageFormat,
    stage: int,
    alpha: float,
    images_seen: int,
) -> None:
    """Write G's weights, its truncation mean and, as JSON under the metadata key `saddle`, what generating needs."""
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
    tensors = {**G.state_dict(), "latent_mean": G.latent_mean}
    with replacing(path) as part:
        _save_tensors(part, tensors, {"saddle": json.dumps(about)})


def load_snapshot(path: str | Path) -> Snapshot:
    """Read a snapshot and build its generator. Raises UserError for a file that is missing, damaged or no snapshot."""
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["saddle"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        return _snapshot(about, tensors)
    except FileNotFoundError:
        raise UserError(f"no snapshot {path}") from None
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0][:120]
        raise UserError(f"{path} is damaged or of another version ({reason}); use another snapshot") from error


def _snapshot(about: dict[str, Any], tensors: dict[str, Tensor]) -> Snapshot:
    config = from_dict(about["config"])
    images = ImageFormat(
        about["channels"], tuple(about["base"]), about["last"], tuple(about["class_names"]), about["dataset_hash"]
    )
    family = find_family(config)
    with torch.random.fork_rng(devices=[]):
        G: Any = family.networks[family.generator](config, images)
    G.to(dtype=getattr(torch, config.precision.dtype))
    G.compute = None  # pictures are made in the weights' dtype, equally on every machine
    G.latent_mean.copy_(tensors.pop("latent_mean"))
    G.load_state_dict(tensors)
    G.eval().requires_grad_(False)
    return Snapshot(G, config, images, about["stage"], about["alpha"], about["images_seen"])


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
        _save_tensors(part / "tensors.safetensors", tensors, {})
        _write(part / "state.json", json.dumps({**about, "images_seen": images_seen}, indent=1))
        sums = {name: _sha256(part / name) for name in ("tensors.safetensors", "state.json")}
        _write(part / "manifest.json", json.dumps(sums, indent=1))
        sync(part)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(part, final)
        sync(run_dir)
    finally:
        shutil.rmtree(part, ignore_errors=True)  # after a failure, as on a full disk, it gives the space back
    states = {int(path.name[len(STATE) :]): path for path in sorted(run_dir.glob(f"{STATE}*")) if path <= final}
    for old in superseded(list(states), keep, milestone):
        shutil.rmtree(states[old])
    return final


def superseded(images: Sequence[int], keep: int, milestone: int) -> list[int]:
    """Which states to remove, given the images seen at each state in ascending order. -> those of the states to remove.

    Kept are the last `keep`, and if `milestone` > 0 the first state at or past each multiple of that many images.
    """
    first = {seen // milestone: seen for seen in reversed(images)} if milestone else {}
    first.pop(0, None)
    return [seen for seen in images[:-keep] if seen not in first.values()]


def check_state(path: Path) -> None:
    """Raises UserError if the SHA-256 sum of one of a training state's files differs from its manifest's."""
    try:
        sums = json.loads((path / "manifest.json").read_text())
        damaged = [name for name, wanted in sums.items() if _sha256(path / name) != wanted]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is incomplete ({error})") from error
    if damaged:
        raise UserError(f"{path} is damaged: the SHA-256 sum of {', '.join(damaged)} differs")


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """-> (tensors, about). Raises UserError as `check_state` does."""
    check_state(path)
    return load_file(path / "tensors.safetensors"), json.loads((path / "state.json").read_text())


def newest_state(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest undamaged training state of a run (None if there is none), and a line on each damaged newer one."""
    passed: list[str] = []
    for path in sorted(run_dir.glob(f"{STATE}*"), reverse=True):
        try:
            check_state(path)
            return path, passed
        except UserError as error:
            passed.append(str(error))
    return None, passed


def initial_weights(source: str, networks: Mapping[str, nn.Module]) -> None:
    """Copy the weights of a snapshot, a training state or a run's newest state into the networks with the same names.

    A snapshot holds the generator's average only: the generator and its average start from it, and all other networks
    keep their random weights. Raises UserError if shapes differ.
    """
    tensors = _weights(Path(source))
    for name, network in networks.items():
        part = {k.removeprefix(name + "/"): v for k, v in tensors.items() if k.startswith(name + "/")}
        if not part:
            continue
        ours = {k: list(v.shape) for k, v in network.state_dict().items()}
        theirs = {k: list(v.shape) for k, v in part.items()}
        differ = [k for k in sorted(ours.keys() | theirs.keys()) if ours.get(k) != theirs.get(k)]
        if differ:
            first = differ[0]
            raise UserError(
                f"init_from={source} does not fit: {first} of {name} is {ours.get(first, 'missing')} here and "
                f"{theirs.get(first, 'missing')} there ({len(differ)} tensors differ); use the network.* and data.cond "
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
        raise UserError(f"init_from={path}: it has no undamaged training state")
    return load_state(state)[0]


def _save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path, metadata)
    sync(path)


def _write(path: Path, text: str) -> None:
    path.write_text(text)
    sync(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
