"""Snapshots of untrained networks, small enough for a test."""

from dataclasses import asdict
from pathlib import Path

from gan.checkpoint import save_snapshot
from gan.config import TrainConfig, override
from gan.families import FAMILIES
from gan.networks import ImageFormat
from gan.state import build_networks

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
) -> Path:
    """A snapshot of an untrained network of two stages -> its path."""
    config = override(TrainConfig(), {"seed": seed, "data.cond": cond, "network.z_dim": 8, "network.widths": [6, 4]})
    images = ImageFormat(channels, base, 1, NAMES, "hash")
    G = build_networks(FAMILIES["gan"], config, images)["G"]
    path.parent.mkdir(parents=True, exist_ok=True)
    save_snapshot(path, G, asdict(config), images, stage, alpha, seen)
    return path
