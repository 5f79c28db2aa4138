"""A plan: which cells a grid has. It is a TOML file, some of whose values flags replace."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gan.config import check_name, flatten, nearest
from gan.errors import UserError
from gan.methods.objectives import OBJECTIVES
from gan.methods.pairs import combined
from gan.methods.regularizers import REGULARIZERS
from gan.methods.rows import look_up
from launch.grid.cells import Cell, weighted
from launch.grid.kinds import find_kind
from launch.settings import read_toml

PLANS = Path(__file__).resolve().parent.parent / "plans"
ALL = "all"  # in place of regularizers: every row of the table that the kind of cell can use


@dataclass(frozen=True)
class Method:
    """A line of the plan: regularizers that are tried with each of the gammas."""

    regularizers: tuple[str, ...]
    gammas: tuple[float | str, ...] = ()  # that of the kind if empty
    objectives: tuple[str, ...] = ()  # those of the plan if empty
    label: str = ""  # what the tables call it, where settings of its own set it apart
    settings: Mapping[str, Any] = field(default_factory=dict)  # beside those of the plan


@dataclass(frozen=True)
class Plan:
    """What to compare: the product of datasets, objectives, methods and seeds."""

    kind: str  # a row of launch.grid.kinds.KINDS
    datasets: tuple[str, ...]
    methods: tuple[Method, ...]
    objectives: tuple[str, ...] = ("nonsaturating",)
    seeds: tuple[int, ...] = (0, 1, 2)
    settings: Mapping[str, Any] = field(default_factory=dict)


FIELDS: dict[str, type] = {"kind": str, "datasets": list, "objectives": list, "seeds": list, "settings": dict}
METHOD_FIELDS: dict[str, type] = {
    "regularizers": list,
    "gammas": list,
    "objectives": list,
    "label": str,
    "settings": dict,
}


def read_plan(name: str) -> Plan:
    """The plan of a name in launch/plans, or of a .toml file. Raises UserError for what is no plan."""
    values = read_toml("--plan", name, PLANS)
    methods = values.pop("methods", None)
    if not isinstance(methods, list) or not methods or not all(isinstance(m, dict) for m in methods):
        raise UserError(f"--plan={name}: a plan needs [[methods]], each with regularizers = [...]")
    checked = _checked(values, FIELDS, f"--plan={name}")
    if missing := [key for key in ("kind", "datasets") if not checked.get(key)]:
        raise UserError(f"--plan={name}: {' and '.join(missing)} missing")
    return Plan(
        **checked,
        methods=tuple(Method(**_checked(m, METHOD_FIELDS, f"--plan={name}: methods")) for m in methods),
    )


def _checked(values: Mapping[str, Any], fields: Mapping[str, type], where: str) -> dict[str, Any]:
    """The values, lists as tuples and tables flat. Raises UserError for unknown keys and other types."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            raise UserError(f"{where}: there is no {key:.100}; {nearest(key, fields)}")
        if key == "regularizers" and value == ALL:
            value = [ALL]
        if not isinstance(value, fields[key]):
            raise UserError(f"{where}: {key} wants a {fields[key].__name__}, got {value!r:.100}")
        found[key] = tuple(value) if isinstance(value, list) else value
    seeds = found.get("seeds", (0,))
    if not seeds or not all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds):
        raise UserError(f"{where}: seeds are whole numbers from 0, got {list(seeds)!r:.100}")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"{where}: a seed is named twice in {list(seeds)!r:.100}")
    for gamma in found.get("gammas", ()):
        if gamma != "auto" and (type(gamma) not in (int, float) or not 0 <= gamma < float("inf")):
            raise UserError(f"{where}: gammas are numbers from 0, got {gamma!r:.100}")
    return found | ({"settings": flatten(found["settings"])} if "settings" in found else {})


def narrowed(
    plan: Plan,
    *,
    datasets: Sequence[str] = (),
    objectives: Sequence[str] = (),
    regularizers: Sequence[str] = (),
    gammas: Sequence[float | str] = (),
    seeds: Sequence[int] = (),
    settings: Mapping[str, Any] | None = None,
) -> Plan:
    """The plan with what was given in place of what it says. Gammas are tried with every regularizer. A regularizer
    that the plan has keeps the plan's gammas."""
    methods = plan.methods
    if regularizers:
        methods = tuple(method for name in regularizers for method in _only(plan, name))
    if gammas:
        methods = tuple(replace(method, gammas=tuple(gammas)) for method in methods)
    if objectives:
        methods = tuple(replace(method, objectives=()) for method in methods)
    plan = replace(plan, methods=methods, settings={**plan.settings, **(settings or {})})
    plan = replace(
        plan,
        datasets=tuple(datasets) or plan.datasets,
        objectives=tuple(objectives) or plan.objectives,
        seeds=tuple(seeds) or plan.seeds,
    )
    _checked({"seeds": list(plan.seeds)}, FIELDS, "--seeds")
    _checked({"gammas": list(gammas)}, METHOD_FIELDS, "--gammas")
    return plan


def _only(plan: Plan, name: str) -> Iterator[Method]:
    """The plan's methods of one regularizer, without those that have a label of their own; or a new one."""
    known = [replace(m, regularizers=(name,)) for m in plan.methods if name in m.regularizers and not m.label]
    yield from known or [Method((name,))]


def _check_names(plan: Plan) -> None:
    """Raises UserError for objectives and regularizers that do not exist. What does not go together is left out
    later."""
    for method in plan.methods:
        for objective in method.objectives or plan.objectives:
            look_up("objectives", objective, OBJECTIVES)
        for name in method.regularizers:
            for part in combined(name):
                if name != ALL:
                    check_name("regularizers", part.split(":")[0], REGULARIZERS)


def cells_of(plan: Plan) -> Iterator[Cell]:
    """All cells of a plan, those of a method together. A regularizer on which gamma has no effect is tried once.

    Raises UserError for names that do not exist, and for settings with which nothing could be trained."""
    kind = find_kind(plan.kind)
    _check_names(plan)
    for dataset in plan.datasets:
        for method in plan.methods:
            names = kind.regularizers if method.regularizers == (ALL,) else method.regularizers
            settings = kind.on_this_host({**plan.settings, **method.settings})
            for objective in method.objectives or plan.objectives:
                for name in names:
                    gammas = (method.gammas or (kind.gamma,)) if weighted(name) else (0.0,)
                    for gamma in gammas:
                        for seed in plan.seeds:
                            yield Cell(plan.kind, dataset, objective, name, gamma, seed, method.label, settings)
