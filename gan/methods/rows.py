"""Tables of named rows, and how a row is asked for: "name" or "name:key=value,key=value", as in "f:jsw:pi=0.3"."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from gan.config import HUGE, nearest, parse_assignment
from gan.errors import UserError

Made = TypeVar("Made")  # what the entries of a table make: an Objective, a Regularizer, a Divergence


@dataclass(frozen=True)
class Entry(Generic[Made]):
    """One row of a table: how it is made, `make(**parameters)`, with a default for each parameter."""

    summary: str  # one line for `--help`, with the paper
    make: Callable[..., Made]
    parameters: Mapping[str, float | int | str] = field(default_factory=dict)

    def __str__(self) -> str:
        options = ",".join(f"{k}={v}" for k, v in self.parameters.items())
        return f"{self.summary} [:{options}]" if options else self.summary


def look_up(what: str, text: str, table: Mapping[str, Entry[Made]], **context: Any) -> Made:
    """What `text` asks for, "name" or "name:key=value,...", made; `context` goes to its `make` too.

    what: the setting that `text` was given for; messages begin with it. Raises UserError for names and parameters that
    do not exist, naming the nearest, and for values that the row refuses.
    """
    name = max((n for n in table if f"{text}:".startswith(f"{n}:")), key=len, default="")
    if not name:
        raise UserError(f"{what}={text} is unknown; {nearest(text, table)}")
    entry = table[name]
    values = {}
    for part in filter(None, text[len(name) + 1 :].split(",")):
        key, value = parse_assignment(part)
        if key not in entry.parameters:
            known = nearest(key, entry.parameters) if entry.parameters else f"{name} takes none"
            raise UserError(f"{what}={text}: no parameter {key}; {known}")
        values[key] = _like(entry.parameters[key], value, f"{what}={text}: {key}")
    try:
        return entry.make(**context, **{**entry.parameters, **values})
    except UserError as error:
        raise UserError(f"{what}={text}: {error}") from None


def _like(default: float | int | str, value: Any, what: str) -> Any:
    """A value of the default's type. UserError where it is of another."""
    if isinstance(default, float) and type(value) in (int, float) and abs(value) <= HUGE:
        return float(value)
    if isinstance(default, str) and isinstance(value, str | int | float):
        return str(value)
    if isinstance(default, int) and type(value) in (int, bool):
        return int(value)
    raise UserError(f"{what} wants {'a number' if isinstance(default, float) else 'a whole number'}, got {value!r}")


def split_names(text: str) -> list[str]:
    """ "kl,jsw:pi=0.3,alpha:alpha=2" -> names; a part without a letter before its "=" belongs to the one before it."""
    names: list[str] = []
    for part in filter(None, map(str.strip, text.split(","))):
        if "=" in part and ":" not in part and names:
            names[-1] += f",{part}"
        else:
            names.append(part)
    return names


def help_lines(table: Mapping[str, Entry[Any]]) -> list[tuple[str, str]]:
    """(name, one line about it) of every row of a table, for `--help`."""
    return [(name, str(entry)) for name, entry in table.items()]
