"""Snapshots of untrained networks, small enough for a test."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from gan.checkpoint import save_snapshot
from gan.config import TrainConfig, override
from gan.families import FAMILIES
from gan.networks import ImageFormat
from gan.state import build_networks
from gan.tensor_files import digest

NAMES = ("ape", "bee", "1")


def write_snapshot(
    path: Path,
    *,
    cond: bool = False,
    channels: int = 1,
    base: tuple[int, int] = (4, 4),
    stage: int = 1,
    seen: int = 1000,
    seed: int = 0,
    alpha: float = 1.0,
    model: str = "gan",
    more: Mapping[str, Any] | None = None,
) -> Path:
    """A snapshot of an untrained network of two stages -> its path."""
    values = {"model": model, "seed": seed, "data.cond": cond, "network.z_dim": 8, "network.widths": [6, 4]}
    config = override(TrainConfig(), values | dict(more or {}))
    images = ImageFormat(channels, base, 1, NAMES, "hash")
    family = FAMILIES[model]
    G = build_networks(family, config, images)[family.generator]
    path.parent.mkdir(parents=True, exist_ok=True)
    save_snapshot(path, G, asdict(config), images, stage, alpha, seen)
    return path


def read_snapshot(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(what its metadata say, without the sum; its tensors)."""
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["saddle"])
        del about["sha256"]
        return about, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict


def craft_snapshot(path: Path, about: Any, tensors: dict[str, torch.Tensor], verified: bool = True) -> Path:
    """A snapshot with any metadata and tensors, and the right SHA-256 sum if it is to have one -> its path."""
    sums = {"sha256": digest(about, tensors)} if verified else {}
    save_file(tensors, path, {"saddle": json.dumps({**about, **sums} if isinstance(about, dict) else about)})
    return path
