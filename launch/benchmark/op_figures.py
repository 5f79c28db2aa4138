"""The rows of `saddle benchmark ops`: what is derived from the times, as a table, and in a few lines at its end."""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from launch.benchmark.op_contestants import ALONE, DTYPES, LAYOUTS, PASSES, Shape
from launch.benchmark.timing import Times
from launch.tables import aligned

COLUMNS = {  # figure of a row -> its heading and format; times in milliseconds
    "ours": ("ours ms", ".4f"),
    "p10": ("p10", ".4f"),
    "p90": ("p90", ".4f"),
    "reference": ("reference", ".4f"),
    "stock": ("stock", ".4f"),
    "copy": ("copy", ".4f"),
    "clone": ("clone", ".4f"),
    "x_reference": ("x reference", ".2f"),
    "x_stock": ("x stock", ".2f"),
    "of_copy": ("of copy", ".1%"),
    "of_clone": ("of clone", ".1%"),
    "gb_per_s": ("GB/s", ".1f"),
}
RATIOS = {  # figure -> (the time above, the time below)
    "x_reference": ("reference", "ours"),
    "x_stock": ("stock", "ours"),
    "of_copy": ("copy", "ours"),
    "of_clone": ("clone", "ours"),
}


def show(shape: Shape) -> str:
    """(8, 64, 64, 64) -> "8x64x64x64"."""
    return "x".join(map(str, shape))


@dataclass(frozen=True)
class OpTimes:
    """Times of one op in one case, layout and pass, and `figures` by the names of COLUMNS, None where it has none."""

    op: str
    case: str
    shape: Shape
    dtype: str
    layout: str
    device: str
    passes: str  # one of PASSES or ALONE
    bytes: int  # that the pass must read and write at the least
    figures: dict[str, float | None]
    reference_is: str  # the fastest variant of the reference, which `figures` compare with
    stock_is: str  # the fastest of what stock PyTorch has
    times: dict[str, Times] = field(repr=False)  # of every contestant
    left_out: dict[str, str] = field(repr=False)  # contestant -> why it could not take part

    @property
    def tensor_bytes(self) -> int:
        """Of x."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def name(self) -> str:
        """Everything but the pass."""
        return " ".join(filter(None, [self.op, self.case, show(self.shape), self.dtype, self.layout]))


@dataclass(frozen=True)
class Figure:
    """A line of the summary: the median and the worst of a figure over the rows of a class."""

    label: str
    figure: str
    wanted: float
    rows: Callable[[OpTimes], bool]


def _is(passes: str, *cases: str, side: Callable[[int], bool] = lambda side: True) -> Callable[[OpTimes], bool]:
    return lambda row: (
        row.op == "upfirdn2d" and row.passes == passes and row.case in (cases or row.case) and side(row.shape[2])
    )


def _activates(passes: str) -> Callable[[OpTimes], bool]:
    return lambda row: row.op == "bias_leaky_relu" and row.passes == passes and row.tensor_bytes >= 4e6


def _on_cuda(passes: str, large: bool = True) -> Callable[[OpTimes], bool]:
    return lambda row: (
        row.device == "cuda" and row.op != "conv2d" and row.passes == passes and (row.bytes >= 64e6) == large
    )


def _of_images(passes: str) -> Callable[[OpTimes], bool]:
    """In the dtype and memory order in which networks compute on a GPU."""
    return lambda row: (
        row.device == "cuda"
        and row.op == "conv2d"
        and row.passes == passes
        and (row.dtype, row.layout) == ("bf16", "nhwc")
    )


def _small(side: int) -> bool:
    return side <= 16


def _large(side: int) -> bool:
    return side >= 64


BOTH = tuple(dict.fromkeys((*PASSES, *ALONE)))
SUMMARY = (
    Figure(
        "upfirdn2d down2, blur, planes >= 64: forward", "x_reference", 8, _is("forward", "down2", "blur", side=_large)
    ),
    Figure("upfirdn2d up2, planes >= 64: forward", "x_reference", 15, _is("forward", "up2", side=_large)),
    Figure("upfirdn2d, planes >= 64: double backward", "x_reference", 12, _is("double backward", side=_large)),
    Figure("upfirdn2d, planes of 16x16: forward", "x_reference", 8, _is("forward", side=_small)),
    Figure("upfirdn2d, planes of 16x16: double backward", "x_reference", 12, _is("double backward", side=_small)),
    *(Figure(f"upfirdn2d against stock: {passes}", "x_stock", 1, _is(passes)) for passes in PASSES),
    Figure("bias_leaky_relu, >= 4 MB: forward", "of_clone", 0.85, _activates("forward")),
    Figure("bias_leaky_relu, >= 4 MB: forward+backward", "x_reference", 1.8, _activates("forward+backward")),
    *(Figure(f"every op on CUDA, >= 64 MB, {p}", "of_copy", 0.85, _on_cuda(p)) for p in BOTH),
    *(Figure(f"every op on CUDA, less, {p}", "of_copy", 0.5, _on_cuda(p, large=False)) for p in BOTH),
    *(Figure(f"convolutions of images on CUDA, {p}", "of_copy", 0.5, _of_images(p)) for p in BOTH),
)


def figures_of(medians: Mapping[str, float], ours: Times | None, moved: int) -> dict[str, float | None]:
    """Every figure of COLUMNS, from the median times of the contestants in milliseconds."""
    figures: dict[str, float | None] = {name: medians.get(name) for name in COLUMNS}
    if ours:
        figures |= {"p10": ours.p10, "p90": ours.p90}
    for name, (above, below) in RATIOS.items():
        figures[name] = medians[above] / medians[below] if above in medians and below in medians else None
    figures["gb_per_s"] = moved / medians["ours"] / 1e6 if "ours" in medians else None
    return figures


def summarize_classes(rows: Sequence[OpTimes]) -> list[dict[str, Any]]:
    """Each Figure of SUMMARY over the rows there are, by dtype and layout."""
    lines = []
    for line, dtype, layout in product(SUMMARY, DTYPES, LAYOUTS):
        of_class = [row for row in rows if (row.dtype, row.layout) == (dtype, layout) and line.rows(row)]
        found = [(row.figures[line.figure], row) for row in of_class]
        values = [(value, row) for value, row in found if value is not None]
        if values:
            worst = min(values, key=lambda pair: pair[0])
            lines.append(
                {
                    "class": line.label,
                    "dtype": dtype,
                    "layout": layout,
                    "figure": line.figure,
                    "rows": len(values),
                    "wanted": line.wanted,
                    "worst": worst[0],
                    "median": statistics.median(value for value, _ in values),
                    "worst_at": worst[1].name,
                }
            )
    return lines


def op_tables(rows: Sequence[OpTimes]) -> Iterator[str]:
    """Lines for people: a table for each op, with the columns that it has."""
    for op in dict.fromkeys(row.op for row in rows):
        of_op = [row for row in rows if row.op == op]
        used = [name for name in COLUMNS if any(row.figures[name] is not None for row in of_op)]
        cells = [["case", "shape", "dtype", "layout", "pass", *(COLUMNS[name][0] for name in used), "stock is"]]
        for row in of_op:
            about = [row.case or "-", show(row.shape), row.dtype, row.layout, row.passes]
            cells.append([*about, *(_format(row.figures[name], COLUMNS[name][1]) for name in used), row.stock_is])
        yield f"\n{op}"
        yield from aligned(cells, range(5, 5 + len(used)))


def summary_table(lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The summary for people."""
    cells = [["summary", "dtype", "layout", "figure", "rows", "wanted", "worst", "median", "worst at"]]
    for line in lines:
        heading, form = COLUMNS[line["figure"]]
        wanted = f">= {format(line['wanted'], form)}"
        values = [format(line["worst"], form), format(line["median"], form)]
        about = [line["class"], line["dtype"], line["layout"], heading, str(line["rows"]), wanted]
        cells.append([*about, *values, line["worst_at"]])
    yield from aligned(cells if lines else [], range(4, 8))


def in_short(lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A line on each class whose speed is compared with a copy's, over all dtypes and memory orders."""
    of_copy = [line for line in lines if line["figure"] == "of_copy"]
    for label in dict.fromkeys(line["class"] for line in of_copy):
        of_class = [line for line in of_copy if line["class"] == label]
        worst = min(of_class, key=lambda line: line["worst"])
        median = statistics.median(line["median"] for line in of_class)
        about = f"median {median:.0%} of a copy's speed, worst {worst['worst']:.0%} at {worst['worst_at']}"
        yield f"in short, {label}: {about}; wanted >= {worst['wanted']:.0%}"


def left_out(rows: Sequence[OpTimes], skipped: Sequence[str]) -> Iterator[str]:
    """What could not be measured, and why."""
    for row in rows:
        for name, why in row.left_out.items():
            yield f"left out: {row.name}, {row.passes}, {name}: {why}"
    for cell in skipped:
        yield f"left out: {cell}"


def _format(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
