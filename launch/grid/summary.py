"""Results -> what the report shows: tables of methods, gammas, wins. Pure functions of the lines of results.jsonl."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gan.errors import UserError
from gan.metrics.intervals import Estimate
from launch.grid import statistics
from launch.grid.cells import BY_CHANCE
from launch.grid.kinds import FORMAT, KINDS

LARGEST = 1e30  # beyond it a training has diverged
NO_REGULARIZER = "none"
TYPES: dict[str, Any] = {
    "format": int,
    "cell": str,
    "kind": str,
    "dataset": str,
    "objective": str,
    "regularizer": str,
    "gamma": (int, float, str),
    "seed": int,
    "label": str,
    "settings": dict,
    "diverged": str,
    "figures": dict,
    "curve": list,
    "steps": int,
    "images": int,
    "seconds": (int, float),
    "provenance": dict,
    "points": list,
    "picture": str,
    "command": str,
}


@dataclass(frozen=True)
class Row:
    """A line of results.jsonl that can be read."""

    values: Mapping[str, Any]

    def __getattr__(self, name: str) -> Any:
        try:
            return self.values[name]
        except KeyError:
            raise AttributeError(name) from None


@dataclass(frozen=True)
class Unreadable:
    """A line that cannot be read, or is of no method that we know."""

    where: str
    reason: str


@dataclass
class Method:
    """The seeds of one method on one dataset."""

    objective: str
    regularizer: str
    gamma: float | str
    label: str
    settings: Mapping[str, Any]
    rows: list[Row] = field(default_factory=list)

    @property
    def name(self) -> str:
        """As tables call it."""
        weight = f" γ={self.gamma}" if isinstance(self.gamma, str) else f" γ={self.gamma:g}"
        return self.label or self.regularizer + (weight if self.gamma else "")

    def values(self, figure: str) -> list[float]:
        """A figure of each seed; NaN where it diverged."""
        found = [row.figures.get(figure, {"value": math.nan}) for row in self.rows]
        return [float(each["value"]) for each in found]

    def estimate(self, figure: str) -> Estimate | None:
        """A figure's mean over the seeds that did not diverge; None if all did."""
        finite = [value for value in self.values(figure) if math.isfinite(value)]
        return statistics.bootstrap(finite) if finite else None

    @property
    def diverged(self) -> int:
        return sum(bool(row.diverged) for row in self.rows)

    def mean(self, what: str) -> float:
        """The mean over seeds of steps, images or seconds."""
        return float(np.mean([getattr(row, what) for row in self.rows]))


@dataclass
class Line:
    """A line of a table: a method with what its seeds say."""

    rank: int
    method: Method
    estimate: Estimate | None  # None if all seeds diverged
    control: Method | None  # the same without a regularizer
    comparison: statistics.Comparison  # with the control
    chance: float  # of being the best
    same_budget: bool


@dataclass
class Table:
    """Methods whose scores may stand beside each other."""

    dataset: str
    kind: str
    figure: str
    provenance: tuple[str, ...]
    lines: list[Line]
    floor: float | None  # what samples of the data itself would have by chance

    @property
    def others(self) -> list[str]:
        """The figures beside the one that ranks, but for what chance alone would give."""
        names = {name for line in self.lines for row in line.method.rows for name in row.figures}
        return sorted(name for name in names if name != self.figure and BY_CHANCE not in name)

    def label(self, line: Line) -> str:
        """The method's name, with what tells it from others of the same name: objective, gamma, settings."""
        m = line.method
        same = [other.method for other in self.lines if other.method.name == m.name]
        told = [m.name]
        told += [m.objective] * (len({other.objective for other in same}) > 1)
        told += [f"γ={m.gamma}"] * (bool(m.label) and len({other.gamma for other in same}) > 1)
        keys = sorted({key for other in same for key in other.settings})
        differ = [key for key in keys if len({json.dumps(other.settings.get(key)) for other in same}) > 1]
        return ", ".join(told + [f"{key}={m.settings.get(key, 'default')}" for key in differ])

    @property
    def tested(self) -> list[Line]:
        """The lines that were compared with their control."""
        return [line for line in self.lines if math.isfinite(line.comparison.p)]

    @property
    def seeds(self) -> int:
        """Of the methods that are compared, the fewest."""
        return min((len(m.rows) for line in self.tested for m in (line.method, line.control) if m), default=0)

    @property
    def least_p(self) -> float:
        """The smallest adjusted p that these seeds can give."""
        alone = [
            statistics.least_p(len(line.method.rows), len(line.control.rows)) for line in self.tested if line.control
        ]
        return min(min(alone) * len(alone), 1.0) if alone else 1.0

    @property
    def can_claim(self) -> bool:
        return self.least_p < statistics.LEVEL

    @property
    def seeds_needed(self) -> int:
        """How many of each could show a difference."""
        tests = max(len(self.tested), 1)
        return next(n for n in range(2, 100) if statistics.least_p(n, n) * tests < statistics.LEVEL)


def read_row(line: str, where: str) -> Row | Unreadable:
    """A line of results.jsonl, checked."""
    from gan.methods.pairs import find_pair
    from gan.metrics.provenance import Provenance, figures_from_json

    try:
        values = json.loads(line)
        if not isinstance(values, dict):
            raise ValueError("it is no object")
        for name, kind in TYPES.items():
            if name not in values:
                raise ValueError(f"{name} is missing")
            if not isinstance(values[name], kind) or isinstance(values[name], bool):
                raise ValueError(f"{name} is {str(values[name])[:40]!r}")
        if values["kind"] not in KINDS:
            raise ValueError(f"kind {values['kind'][:40]!r} is unknown")
        find_pair(values["objective"], values["regularizer"])
        if values["format"] != FORMAT:
            raise ValueError(f"format {values['format']} is of another version of this program")
        json.dumps(values, ensure_ascii=False).encode()  # half a pair of surrogates cannot be written
        figures_from_json(values["figures"])
        _check_numbers(values)
        if not isinstance(values["provenance"].get("dataset_hash"), str):
            raise ValueError("it is without its provenance")
        if not values["diverged"]:
            Provenance.from_json(values["provenance"])
            if not best_figure(values):
                raise ValueError("it has no figure to compare")
    except (ValueError, TypeError, RecursionError, UserError) as error:
        return Unreadable(where, str(error)[:200])
    return Row(values)


def _check_numbers(values: Mapping[str, Any]) -> None:
    """Raises ValueError or TypeError unless all that is drawn or averaged is a finite number of reasonable size."""
    from gan.metrics.provenance import PARTS

    numbers = [values[name] for name in ("steps", "images", "seconds")]
    numbers += [values["gamma"]] if not isinstance(values["gamma"], str) else []
    for x, looks in values["curve"]:
        numbers += [x, *dict(looks).values()]
    for x, y in values["points"]:
        numbers += [x, y]
    for figure in values["figures"].values():
        numbers += [figure[part] for part in PARTS]
    if not all(type(number) in (int, float) and abs(number) <= LARGEST for number in numbers):
        raise ValueError("a number is missing, not finite, or too large")


def best_figure(values: Mapping[str, Any]) -> str:
    """The name of the figure that decides, "" if there is none."""
    beginning = KINDS[values["kind"]].best
    return next((name for name in sorted(values["figures"]) if name.startswith(beginning)), "")


def read_rows(lines: Iterable[str]) -> tuple[list[Row], list[Unreadable]]:
    """(rows, what cannot be read). Of lines about one cell, the first counts."""
    rows: dict[str, Row] = {}
    bad: list[Unreadable] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row = read_row(line, f"line {number}")
        if isinstance(row, Unreadable):
            bad.append(row)
        elif row.cell in rows:
            if rows[row.cell].figures != row.figures:
                bad.append(Unreadable(f"line {number}", f"another result of cell {row.cell}; the first is shown"))
        else:
            rows[row.cell] = row
    return list(rows.values()), bad


def provenance_key(row: Row) -> tuple[str, ...]:
    """What must agree in one table; nothing of a cell without scores."""
    from gan.metrics.provenance import Provenance

    return () if row.diverged else Provenance.from_json(row.provenance).key()


def tables_of(rows: Sequence[Row]) -> list[Table]:
    """Tables by dataset and provenance. Cells that diverged have no scores: they stand in all tables of their data."""
    groups: dict[tuple[str, str, str], dict[tuple[str, ...], list[Row]]] = {}
    for row in rows:
        of = (row.dataset, row.provenance["dataset_hash"], row.kind)
        groups.setdefault(of, {}).setdefault(provenance_key(row), []).append(row)
    tables = []
    for (dataset, _, kind), by_key in groups.items():
        without = by_key.pop((), [])
        for key, scored in (by_key or {(): []}).items():
            tables.append(table_of(dataset, kind, key, scored + without))
    return tables


def table_of(dataset: str, kind: str, key: tuple[str, ...], rows: Sequence[Row]) -> Table:
    """The methods of these rows, the best first; methods with diverged seeds last."""
    methods = methods_of(rows)
    figure = next((name for row in rows if (name := best_figure(row.values))), KINDS[kind].best)
    values = [method.values(figure) for method in methods]
    order = sorted(range(len(methods)), key=lambda i: (methods[i].diverged, _mean(values[i])))
    controls = [control_of(method, methods) for method in methods]
    comparisons = statistics.against_controls(values, controls)
    chances = statistics.chances_of_best(values)
    budgets = [(m.mean("steps"), m.mean("images")) for m in methods]
    usual = max(set(budgets), key=budgets.count)
    lines = []
    for place, i in enumerate(order, 1):
        control = controls[i]
        line = Line(
            rank=place,
            method=methods[i],
            estimate=methods[i].estimate(figure),
            control=None if control is None else methods[control],
            comparison=comparisons[i],
            chance=chances[i],
            same_budget=budgets[i] == usual,
        )
        lines.append(line)
    floors = [row.figures[figure + BY_CHANCE]["value"] for row in rows if figure + BY_CHANCE in row.figures]
    return Table(dataset, kind, figure, key, lines, floors[0] if floors else None)


def control_of(method: Method, methods: Sequence[Method]) -> int | None:
    """The place of the method that has no regularizer and is like this one in all else; None for itself, and if there
    is none."""
    if method.regularizer == NO_REGULARIZER:
        return None
    for place, other in enumerate(methods):
        alike = (other.objective, other.settings) == (method.objective, method.settings)
        if alike and other.regularizer == NO_REGULARIZER:
            return place
    return None


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return float(np.mean(finite)) if finite else math.inf


def methods_of(rows: Sequence[Row]) -> list[Method]:
    """Rows that differ in nothing but the seed are one method."""
    methods: dict[str, Method] = {}
    for row in sorted(rows, key=lambda row: row.seed):
        gamma = row.gamma if isinstance(row.gamma, str) else float(row.gamma)
        name = json.dumps([row.objective, row.regularizer, gamma, row.settings], sort_keys=True)
        known = Method(row.objective, row.regularizer, row.gamma, row.label, row.settings)
        methods.setdefault(name, known).rows.append(row)
    return list(methods.values())


@dataclass
class Sensitivity:
    """One regularizer at several gammas."""

    name: str  # of the method, without gamma
    objective: str
    points: list[tuple[float, Estimate]]  # by gamma
    advice: str


def sensitivities(table: Table) -> list[Sensitivity]:
    """Of each regularizer that was tried at two gammas or more in the same settings, with the gamma to take."""
    groups: dict[str, list[Line]] = {}
    for line in table.lines:
        m = line.method
        if isinstance(m.gamma, int | float) and m.gamma > 0 and line.estimate:
            name = json.dumps([m.label, m.regularizer, m.objective, m.settings], sort_keys=True)
            groups.setdefault(name, []).append(line)
    found: dict[str, Sensitivity] = {}
    for lines in groups.values():
        points = sorted((float(line.method.gamma), line.estimate) for line in lines if line.estimate)
        if len(points) > 1:
            steady = [float(line.method.gamma) for line in lines if not line.method.diverged]
            m = lines[0].method
            name = f"{m.label or m.regularizer}, {m.objective}"
            name += f" ({len(found) + 1})" * (name in found)
            found[name] = Sensitivity(name, m.objective, points, advice(points, steady))
    return list(found.values())


def advice(points: Sequence[tuple[float, Estimate]], steady: Sequence[float]) -> str:
    """A sentence: the gamma with the least mean of those where no seed diverged, and those that may be as good."""
    usable = [point for point in points if point[0] in steady]
    if not usable:
        return "some seed diverged at every γ: take none of them"
    gamma, best = min(usable, key=lambda point: point[1].value)
    near = [g for g, estimate in usable if estimate.low <= best.high and g != gamma]
    edge = " It is at the edge of what was tried: try beyond." if gamma in (points[0][0], points[-1][0]) else ""
    if not near:
        return f"γ = {gamma:g}: no other interval reaches it.{edge}"
    return f"γ = {gamma:g}; the intervals of γ = {', '.join(f'{g:g}' for g in near)} overlap its own.{edge}"


def mean_ranks(tables: Sequence[Table]) -> list[tuple[str, float, int]]:
    """(method, mean rank, tables in which it is first) of methods that stand in every table; for two tables or more."""
    names = [{f"{line.method.objective}, {line.method.name}": line for line in table.lines} for table in tables]
    shared = [name for name in names[0] if all(name in table for table in names)] if len(names) > 1 else []
    if len(shared) < 2:
        return []
    scores = np.array([[_score(table[name]) for name in shared] for table in names])
    placed = np.stack([statistics.ranks(row) for row in scores])
    wins = (placed == placed.min(1, keepdims=True)).sum(0)
    found = [(name, float(placed[:, i].mean()), int(wins[i])) for i, name in enumerate(shared)]
    return sorted(found, key=lambda each: each[1])


def _score(line: Line) -> float:
    return line.estimate.value if line.estimate and not line.method.diverged else math.nan
