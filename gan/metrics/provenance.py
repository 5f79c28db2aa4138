"""What scores depend on: the features, the dataset, the counts, the network.

Only scores that agree in all of it but the network, the seed and the versions may stand in one table.
"""

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from gan.errors import UserError
from gan.metrics.intervals import Estimate


@dataclass(frozen=True)
class Features:
    """What compares images, and all that its numbers depend on beside the images."""

    name: str
    sha256: str  # of the weights
    side: int  # pixels a side that images are resized to; 0 if it depends on them, as `resize` says
    resize: str  # how they are resized


@dataclass(frozen=True)
class Provenance:
    """Where a score comes from."""

    features: Features
    dataset_hash: str  # the content hash of the dataset of reals
    size: tuple[int, ...]  # (height, width) of the images that are compared; (K,) for vectors [n, K]
    reals: int
    samples: int
    seed: int  # of the samples, and of the order of the reals
    snapshot_sha256: str | None  # the SHA-256 sum of the network's snapshot; None for scores of real images
    versions: Mapping[str, str] = field(default_factory=dict, hash=False)  # of what may change the last digits

    def key(self) -> tuple[str, ...]:
        """The comparable part: scores with equal keys may stand in one table."""
        return tuple(f"{name} {value}" for name, value in self.comparable().items())

    def comparable(self, counts: bool = True) -> dict[str, Any]:
        """What two scores must agree in, by name. counts: of images too."""
        features = self.features
        values = {
            "features": f"{features.name} {features.sha256[:12]}".strip(),  # pixels have no sum
            "resize": f"{features.resize} ({features.side})" if features.side else features.resize,
            "dataset": self.dataset_hash[:12],
            "resolution": "x".join(map(str, self.size)),
        }
        return values | ({"reals": self.reals, "samples": self.samples} if counts else {})

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {**asdict(self), "size": list(self.size), "versions": dict(self.versions)}

    @classmethod
    def from_json(cls, values: Any) -> "Provenance":
        """From the plain values of `to_json`, among which there may be others, as in a row of `saddle evaluate --json`.
        Raises UserError if one is missing or has another type."""
        try:
            fields = {name: _typed(values[name], kind, name) for name, kind in FIELDS.items()}
            about = {name: _typed(fields["features"][name], kind, name) for name, kind in FEATURE_FIELDS.items()}
        except (KeyError, TypeError) as error:
            raise UserError(f"a score without its provenance ({_reason(error)}): score the network again") from error
        return cls(**{**fields, "features": Features(**about), "size": tuple(fields["size"])})


PARTS = ("value", "low", "high")  # of an Estimate
FEATURE_FIELDS = {"name": str, "sha256": str, "side": int, "resize": str}
FIELDS = {
    "features": dict,
    "dataset_hash": str,
    "size": list,
    "reals": int,
    "samples": int,
    "seed": int,
    "snapshot_sha256": (str, type(None)),
    "versions": dict,
}


def _typed(value: Any, kind: Any, name: str) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{name} is {str(value)[:40]!r}")
    return value


def _reason(error: Exception) -> str:
    return f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)


def versions(device: str) -> dict[str, str]:
    """The versions on which the last digits of features and samples depend. device: where they were computed."""
    where = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    return {"torch": torch.__version__, "numpy": np.__version__, "device": where}


def check_comparable(scores: Mapping[str, Provenance]) -> None:
    """Raises UserError, in one line that says in what they differ, unless the named scores may stand in one table.

    Rows of reals, which scores are compared with, have counts of their own.
    """
    networks = {name: of for name, of in scores.items() if of.snapshot_sha256 is not None}
    _check_equal({name: of.comparable() for name, of in networks.items()})
    _check_equal({name: of.comparable(counts=False) for name, of in scores.items()})


def _check_equal(parts: Mapping[str, Mapping[str, Any]]) -> None:
    names = iter(parts)
    first = next(names, "")
    for name in names:
        differ = [key for key, value in parts[first].items() if value != parts[name][key]]
        if differ:
            details = ", ".join(f"{key} ({parts[first][key]} and {parts[name][key]})" for key in differ)
            raise UserError(
                f"the scores of {first} and {name} differ in {details}: make a table of each, or score both alike"
            )


def figures_to_json(figures: Mapping[str, Estimate]) -> dict[str, dict[str, float]]:
    """Figures by full name as plain values: {name: {"value", "low", "high"}}."""
    return {name: asdict(figure) for name, figure in figures.items()}


def figures_from_json(values: Any) -> dict[str, Estimate]:
    """The figures in the plain values of `figures_to_json`. Raises UserError for values that are none."""
    try:
        return {name: Estimate(*(float(figure[part]) for part in PARTS)) for name, figure in values.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"a score that cannot be read ({error!r:.60}): score the network again") from error
