"""Averages of G of any length, after training: post-hoc EMA (Karras et al. 2024, sections 3.1 and 3.2, appendix C).

An average of relative length sigma weighs the parameters of the time tau in proportion to tau^gamma, up to its own
time. These weights, the profile, have the standard deviation sigma as a share of that time, so the average grows longer
as the run does. A run keeps averages of a few lengths at each of its snapshots. A weighted sum of them is an average
too, and its profile is made to come as near as it can to that of the wanted length.

Times are in images since the parameters' stage of growth began.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from gan.checkpoint import POSTHOC, Snapshot, load_snapshot
from gan.config import trajectory
from gan.errors import UserError
from gan.networks import stage_of
from gan.schedules import build_schedule, profile_exponent, stage_start

Profile = tuple[float, float]  # (time, gamma): the weights (gamma + 1) / time * (tau / time)^gamma for tau in [0, time]


@dataclass(frozen=True)
class Kept:
    """An average that a run has kept."""

    path: Path
    images_seen: int
    length: float


def inner_product(a: Profile, b: Profile) -> float:
    """The integral of the product of two profiles."""
    (early, gamma), (late, steeper) = sorted((a, b))
    return (gamma + 1) * (steeper + 1) / ((gamma + steeper + 1) * late) * (early / late) ** steeper


def combination(kept: Sequence[Profile], wanted: Profile) -> tuple[np.ndarray, float]:
    """(the factors [n] of the kept profiles whose sum is nearest to the wanted one, the relative norm of what is left).

    By least squares, with factors that add up to 1: parameters that do not change are averaged exactly.
    """
    n = len(kept)
    products = np.array([[inner_product(a, b) for b in kept] for a in kept])
    target = np.array([inner_product(a, wanted) for a in kept])
    system = np.block([[products, np.ones((n, 1))], [np.ones((1, n)), np.zeros((1, 1))]])
    factors = np.linalg.lstsq(system, np.append(target, 1.0))[0][:n]
    norm = inner_product(wanted, wanted)
    left = factors @ products @ factors - 2 * factors @ target + norm
    return factors, float(np.sqrt(max(left, 0.0) / norm))


def kept_averages(run: Path, images_seen: int) -> list[Kept]:
    """The averages that a run has kept up to a time."""
    names = {path: re.fullmatch(rf"{POSTHOC}(\d{{10}})-(\d*\.?\d+)", path.stem) for path in sorted(run.iterdir())}
    found = [Kept(path, int(name[1]), float(name[2])) for path, name in names.items() if name]
    return [kept for kept in found if kept.images_seen <= images_seen]


def reconstruct(path: Path, length: float) -> tuple[Snapshot, int, float]:
    """The average of a relative length at the time of a run's snapshot, from the averages that lie beside it.

    -> (the snapshot, with that average in place of its own; how many averages it is made of; the relative norm of what
    is left of the profile, for the stage where it is largest).
    Raises UserError if none were kept, only longer ones or only shorter ones, or if one is damaged.
    """
    snapshot = load_snapshot(path)
    kept = kept_averages(path.parent, snapshot.images_seen)
    if not kept:
        raise UserError(f"{path.parent} has no {POSTHOC}*.safetensors; train with --set ema.posthoc=0.05,0.1")
    lengths = [average.length for average in kept]
    if not min(lengths) <= length <= max(lengths):
        raise UserError(
            f"length={length:g} is not between those of the averages in {path.parent}, {min(lengths):g} and "
            f"{max(lengths):g}; longer and shorter ones cannot be made of them"
        )
    schedule = build_schedule(snapshot.config, snapshot.images.last)
    starts = [stage_start(schedule, stage) for stage in range(snapshot.stage + 1)]
    factors = np.zeros((len(starts), len(kept)))
    left = np.zeros(len(starts))
    for stage, start in enumerate(starts):
        usable = [i for i, average in enumerate(kept) if average.images_seen > start]
        if not usable:
            raise UserError(f"{path.parent} has no average from after {start} images, when stage {stage} began")
        profiles = [(kept[i].images_seen - start, profile_exponent(kept[i].length)) for i in usable]
        wanted = (snapshot.images_seen - start, profile_exponent(length))
        factors[stage, usable], left[stage] = combination(profiles, wanted)
    own = snapshot.G.state_dict()
    snapshot.G.load_state_dict(own | weighted_sum(kept, factors, snapshot))
    return snapshot, len(kept), left.max()


def weighted_sum(kept: Iterable[Kept], factors: np.ndarray, like: Snapshot) -> dict[str, Tensor]:
    """The sum of averages, each times its factor [stages, averages] for the stage of a parameter, in float64.
    Parameters of later stages are left out. Raises UserError for an average of another run than `like`."""
    sums: dict[str, Tensor] = {}
    for average, of_stages in zip(kept, factors.T, strict=True):
        loaded = load_snapshot(average.path)
        if (trajectory(loaded.config), loaded.images) != (trajectory(like.config), like.images):
            raise UserError(f"{average.path} is not of the same run as the snapshot; remove it from that folder")
        for name, tensor in loaded.G.state_dict().items():
            if stage_of(name) < len(of_stages):
                term = tensor.double() * of_stages[stage_of(name)]
                sums[name] = sums[name] + term if name in sums else term
    return sums
