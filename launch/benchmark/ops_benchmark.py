"""Time the fused ops beside their plain versions, the fastest in stock PyTorch, and a copy of the same bytes."""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict
from itertools import cycle, product
from pathlib import Path
from typing import Any

import click
import torch

from gan.config import check_name
from launch.benchmark.op_contestants import (
    ALONE,
    DTYPES,
    LAYOUTS,
    OPS,
    PASSES,
    Contest,
    Function,
    Op,
    Shape,
    Tensors,
    bytes_moved,
    make_tensors,
)
from launch.benchmark.op_figures import (
    OpTimes,
    figures_of,
    in_short,
    left_out,
    op_tables,
    show,
    summarize_classes,
    summary_table,
)
from launch.benchmark.timing import (
    Call,
    Clock,
    DeviceClock,
    HostClock,
    ReplayClock,
    contest,
    describe_machine,
    fastest,
    find_device,
    machine_line,
    own_stream,
)
from launch.cli import run
from launch.progress import track
from launch.tables import json_option, save_rows

DEVICES = ("cpu", "cuda")
AGAINST = {"all": tuple(PASSES), "copy": tuple(ALONE)}  # whom ours takes turns with -> the passes that are measured
QUICK_SHAPES, QUICK_REPEATS = ((2, 8, 16, 16),), 3
REPEATS = 11


def _names(what: str, text: str, known: Collection[str]) -> list[str]:
    """The names in a list like "fp32,bf16", each once. UserError names the nearest of one that does not exist."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names or [text]:
        check_name(what, name, known)
    return names


@click.command()
@click.option("--op", "ops_", metavar="NAME,...", default=",".join(OPS), show_default=True, help="Ops to measure.")
@click.option("--dtype", metavar="NAME,...", default=",".join(DTYPES), show_default=True, help="Types of x.")
@click.option("--layout", metavar="NAME,...", default=",".join(LAYOUTS), show_default=True, help="Memory order of x.")
@click.option("--device", metavar="NAME", default="cpu", show_default=True, help="cpu or cuda.")
@click.option(
    "--threads",
    type=click.IntRange(1, 4096),
    default=1,
    show_default=True,
    help="Intra-op threads: one is measured in CPU time, several in wall time.",
)
@click.option(
    "--repeats", type=click.IntRange(1), help=f"Timings of each.  [default: {REPEATS}, quick: {QUICK_REPEATS}]"
)
@click.option(
    "--against",
    metavar="NAME",
    default="all",
    show_default=True,
    help="all, or copy: each pass without those before it takes turns with a copy alone; on a GPU in CUDA graphs.",
)
@click.option("--quick", is_flag=True, help="Only test that everything runs, on one tiny shape.")
@json_option
def main(
    ops_: str,
    dtype: str,
    layout: str,
    device: str,
    threads: int,
    repeats: int | None,
    against: str,
    quick: bool,
    json_path: Path | None,
) -> int:
    """Measure the fused ops: forward, forward+backward, and R1's double backward.

    Each op takes turns with its plain PyTorch version (the reference), the fastest composition in stock PyTorch, and a
    copy of as many bytes as it must move. "x" is how many times faster our op is, "of copy" its share of the copy's
    speed. --against=copy measures each pass apart from those before it, beside the copy alone. Ctrl-C stops and shows
    what has been measured.
    """
    names = _names("--op", ops_, OPS)
    dtypes = _names("--dtype", dtype, DTYPES)
    layouts = _names("--layout", layout, LAYOUTS)
    check_name("--device", device, DEVICES)
    check_name("--against", against, AGAINST)
    target = find_device(device)
    torch.set_num_threads(threads)
    machine = describe_machine(target)
    if against == "copy" and device == "cuda":
        machine["clock"] = ReplayClock.name
    click.echo(machine_line(machine))
    shapes = {name: QUICK_SHAPES if quick else _shapes(OPS[name], device, against) for name in names}
    cells = [cell for name in names for cell in product([name], OPS[name].cases, shapes[name], dtypes)]
    rows: list[OpTimes] = []
    skipped: list[str] = []
    repeats = repeats or (QUICK_REPEATS if quick else REPEATS)
    measured = time_ops(cells, layouts, target, threads, repeats, skipped, against)
    complete = False
    try:
        with own_stream(target):
            for row in track(measured, len(cells) * len(layouts) * len(PASSES), "ops"):
                rows.append(row)
        complete = True
    except KeyboardInterrupt:
        click.echo("stopped: this is what has been measured", err=True)
    summary = summarize_classes(rows)
    for line in (*op_tables(rows), "", *summary_table(summary), *left_out(rows, skipped), *in_short(summary)):
        click.echo(line)
    save_rows(json_path, report(machine, complete, rows, skipped))
    return 0 if complete else 130


def _shapes(op: Op, device: str, against: str) -> tuple[Shape, ...]:
    if device != "cuda":
        return op.shapes
    return op.beside_copy if against == "copy" else (*op.shapes, *op.large)


def time_ops(
    cells: Sequence[tuple[str, str, Shape, str]],
    layouts: Sequence[str],
    device: torch.device,
    threads: int,
    repeats: int,
    skipped: list[str],
    against: str = "all",
) -> Iterator[OpTimes]:
    """Times of each (op, case, shape, dtype), layout and pass; what does not fit into memory goes to `skipped`."""
    for op, case, shape, kind in cells:
        dtype = DTYPES[kind]
        sets: dict[str, list[Tensors]] = {}
        try:
            torch.manual_seed(0)
            one = OPS[op].contest(case, shape, dtype, device)
            copies = sets_needed(bytes_moved(one, dtype, "forward")[0], device)
            orders = LAYOUTS if one.any_layout and against == "all" else layouts
            sets = {
                order: [make_tensors(one, shape, dtype, device, LAYOUTS[order]) for _ in range(copies)]
                for order in orders
            }
            for layout, passes in product(layouts, AGAINST[against]):
                clock = find_clock(device, threads, copies, against)
                yield time_op(one, (op, case, shape, kind), layout, passes, sets, clock, repeats, against)
        except torch.OutOfMemoryError:
            skipped.append(f"{op} {case} {show(shape)} {kind}: out of memory")
        sets = {}
        if device.type == "cuda":
            torch.cuda.empty_cache()


def find_clock(device: torch.device, threads: int, copies: int, against: str) -> Clock:
    """A clock for one contest, whose calls take `copies` sets of tensors in turn."""
    if device.type != "cuda":
        return HostClock(threads)
    return ReplayClock(copies - 1) if against == "copy" else DeviceClock(copies - 1)


def sets_needed(moved: int, device: torch.device) -> int:
    """How many sets of tensors calls must take in turn so that a GPU's L2 cache does not hold what they read."""
    if device.type != "cuda":
        return 1
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 * 2**20
    return min(max(math.ceil(3 * cache / moved), 1), 1024)


def time_op(
    one: Contest,
    cell: tuple[str, str, Shape, str],
    layout: str,
    passes: str,
    sets: dict[str, list[Tensors]],
    clock: Clock,
    repeats: int,
    against: str = "all",
) -> OpTimes:
    """One contest: every contestant of an op in one case, layout and pass."""
    op, case, shape, dtype = cell
    kernels = bytes_moved(one, DTYPES[dtype], passes)
    if against == "copy":
        calls = beside_copy(one, layout, passes, sets, kernels)
    else:
        calls = contestants(one, OPS[op].clone and passes == "forward", layout, passes, sets, kernels)
    times, left = contest(calls, clock, repeats)
    reference = fastest(times, "reference")
    stock = fastest(times, "stock")
    medians = {name: times[name].median for name in times if ":" not in name}
    medians |= {"reference": reference[1].median} if reference else {}
    medians |= {"stock": stock[1].median} if stock else {}
    device = sets[layout][0].x.device.type
    figures = figures_of(medians, times.get("ours"), sum(kernels))
    reference_is = reference[0] if reference else ""
    stock_is = stock[0] if stock else ""
    return OpTimes(
        op=op,
        case=case,
        shape=shape,
        dtype=dtype,
        layout=layout,
        device=device,
        passes=passes,
        bytes=sum(kernels),
        figures=figures,
        reference_is=reference_is,
        stock_is=stock_is,
        times=times,
        left_out=left,
    )


def beside_copy(
    one: Contest, layout: str, passes: str, sets: dict[str, list[Tensors]], kernels: list[int]
) -> dict[str, Call]:
    """Ours and a copy, with what a pass of ALONE needs made ready."""
    turn = cycle([ALONE[passes](one, one.ours, on) for on in sets[layout]])
    return {"ours": lambda: next(turn)(), "copy": copier(kernels, len(sets[layout]), sets[layout][0].x.device)}


def contestants(
    one: Contest, clone: bool, layout: str, passes: str, sets: dict[str, list[Tensors]], kernels: list[int]
) -> dict[str, Call]:
    """{name, or "group: variant": what to call}, each with tensors in its own memory order, taken in turn."""

    def called(function: Function, order: str) -> Call:
        turn = cycle(sets[order])
        return lambda: PASSES[passes](one, function, next(turn))

    calls = {"ours": called(one.ours, layout)}
    calls |= {f"reference: {name}": called(function, layout) for name, function in one.reference.items()}
    for name, function in one.stock.items():
        for order in sets if one.any_layout else [layout]:
            calls[f"stock: {name} {order}" if one.any_layout else f"stock: {name}"] = called(function, order)
    if clone:
        turn = cycle(sets[layout])
        calls["clone"] = lambda: next(turn).x.detach().clone()
    return calls | {"copy": copier(kernels, len(sets[layout]), sets[layout][0].x.device)}


def copier(kernels: list[int], copies: int, device: torch.device) -> Call:
    """A copy into an existing buffer for each kernel, which reads and writes as many bytes as it does."""
    pairs = [[torch.ones(max(kernels) // 8, device=device) for _ in range(2)] for _ in range(copies)]
    turn = cycle(pairs)

    def copy() -> None:
        for moved in kernels:  # half of the bytes are read and half are written, as float32
            source, target = next(turn)
            target[: moved // 8].copy_(source[: moved // 8])

    return copy


def report(machine: dict[str, Any], complete: bool, rows: Sequence[OpTimes], skipped: Sequence[str]) -> dict[str, Any]:
    """What --json writes."""
    return {
        "machine": machine,
        "complete": complete,
        "rows": [row_values(row) for row in rows],
        "summary": summarize_classes(rows),
        "skipped": list(skipped),
    }


def row_values(row: OpTimes) -> dict[str, Any]:
    """One flat JSON object of an op's times: what was measured, and its figures beside it."""
    values = asdict(row)
    return {"pass": values.pop("passes"), **values.pop("figures"), **values}


if __name__ == "__main__":
    run(main, "saddle benchmark ops")
