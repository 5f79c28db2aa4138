"""What `saddle benchmark step` shows: rows of plain values from what was measured."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from launch.benchmark.step_contest import BARE, PLAIN, PRODUCTS
from launch.benchmark.step_model import (
    WANTED,
    Fabric,
    Step,
    batch_for,
    communication,
    efficiency,
    local_step,
)

Row = Mapping[str, Any]  # of one stage on one number of ranks, from `step_contest.stage_row`


def speed_row(row: Row) -> dict[str, Any]:
    """How fast one rank is, beside the plain loop and beside the same arithmetic alone."""
    peak = row["peak_bytes"]
    cells = {
        "preset": row["preset"],
        "stage": row["size"],
        "batch": row["share"],
        "ms": round(row["ms"]["ours"], 1),
        "img/s": round(row["images_per_second"], 1),
        "x plain": _rounded(row["times_as_fast_as"].get("plain"), 2),
        **limit_cells(row),
        "peak MB": _rounded(peak.get("ours"), 0, 1e-6),
        "plain MB": _rounded(peak.get("plain"), 0, 1e-6),
    }
    return cells if row["gpu_busy"] is None else cells | {"GPU busy": f"{row['gpu_busy']:.2f}"}


def limit_cells(row: Row) -> dict[str, Any]:
    """The step's arithmetic, and its speed beside that of the same arithmetic alone; nothing where it was not taken."""
    if "flops" not in row:
        return {}
    of_limit = row["times_as_fast_as"][PRODUCTS]
    rate = row["flops"] / row["ms"]["ours"] / 1e6
    return {
        "GFLOP": round(row["flops"] / 1e9, 2),
        "GFLOP/s": round(rate, 1),
        "products alone": round(rate / of_limit, 1),
        "of them": f"{of_limit:.2f}",
    }


def in_short(rows: Iterable[Row]) -> Iterator[str]:
    """A line on each step of one rank that a plain loop took turns with."""
    for row in rows:
        if row["gpus"] > 1 or "plain" not in row["times_as_fast_as"]:
            continue
        peak = row["peak_bytes"]
        texts = [f"{row['times_as_fast_as']['plain']:.2f} x plain", f"{row['images_per_second']:.1f} img/s"]
        if peak.keys() >= set(PLAIN):
            texts.append(f"memory {peak['ours'] / peak['plain']:.2f} of plain's")
        yield f"in short, {row['size']}, batch {row['share']}: {', '.join(texts)}"


def busy_in_short(row: Row) -> Iterator[str]:
    """A line on how long a GPU computes, where there is one."""
    if row["gpus"] == 1 and row["gpu_busy"] is not None:
        yield f"in short, {row['size']}, batch {row['share']}, GPU busy: {row['gpu_busy']:.2f} of the time"


def parts_of(row: Row) -> dict[str, float | None]:
    """Milliseconds of one rank's step by part; penalties are the difference to a step without them."""
    whole = row["ms"]["ours"]
    bare = row["times_as_fast_as"].get(BARE)
    parts = {name: share * whole for name, share in row["part_shares"].items()}
    penalties = None if bare is None else max(1 - bare, 0.0) * whole
    known = sum(parts.values()) + (penalties or 0.0) + row["data_wait_ms"]
    return {
        "forward": parts["forward"],
        "penalties": penalties,
        "backward, rest": max(whole - known, 0.0),
        "optimizer": parts["optimizer"],
        "data": row["data_wait_ms"],
    }


def parts_row(row: Row) -> dict[str, Any]:
    """The same for people."""
    cells = {"preset": row["preset"], "stage": row["size"], "ms": round(row["ms"]["ours"], 1)}
    return cells | {name: _rounded(ms, 2) for name, ms in parts_of(row).items()}


def ranks_row(row: Row, also: Sequence[str]) -> dict[str, Any]:
    """Several ranks beside as many that do not communicate, and beside the model."""
    ours = row["ms"]["ours"]
    alone = ours * row["times_as_fast_as"]["alone"]  # from within rounds: the load of a machine changes
    sums = 1e3 * sum(row["sums"])
    predicted = local_step(alone, sums)
    cells = {
        "gpus": row["gpus"],
        "preset": row["preset"],
        "stage": row["size"],
        "ms": round(ours, 1),
        "img/s": round(row["images_per_second"], 1),
        "of alone": f"{row['times_as_fast_as']['alone']:.3f}",
        "alone ms": round(alone, 1),
        "communication": round(max(ours - alone, 0.0), 1),
        "data": round(row["data_wait_ms"], 2),
        "MB summed": round(sum(row["messages"]) / 1e6, 3),
        "sums alone": round(sums, 1),
        "predicted": round(predicted, 1),
        "off by": f"{predicted / ours - 1:+.0%}",
    }
    return cells | {f"{name} / ours": f"{row['times_as_fast_as'][name]:.2f}" for name in also}


def prediction_rows(steps: Iterable[Step], worlds: Sequence[int], fabric: Fabric) -> Iterator[dict[str, Any]]:
    """A row for each stage and number of GPUs."""
    for step in steps:
        for gpus in worlds:
            reached = efficiency(step, gpus, fabric)
            sums = communication(step, gpus, fabric)
            yield {
                "stage": step.size,
                "gpus": gpus,
                "batch each": step.batch,
                "compute ms": round(1e3 * step.seconds, 2),
                "from": "measured" if step.measured else "estimated",
                "MB summed": round(sum(step.messages) / 1e6, 1),
                "sums ms": round(1e3 * sums, 2),
                "img/s": round(gpus * step.batch / (step.seconds + sums)),
                "efficiency": f"{reached:.3f}",
                f"batch for {WANTED}": None if reached >= WANTED else batch_for(WANTED, step, gpus, fabric),
            }


def _rounded(value: float | None, digits: int, scale: float = 1.0) -> float | None:
    return None if value is None else round(value * scale, digits)
