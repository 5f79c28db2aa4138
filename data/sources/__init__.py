"""Where images come from: each module of this package declares, as KINDS, the kinds of sources that it opens."""

import os
from dataclasses import replace
from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from data.errors import DataError
from data.items import Source
from data.kinds import Kind
from data.names import printable


@cache
def kinds() -> tuple[Kind, ...]:
    """All kinds of sources, in the order in which they are asked (see `Turn`).

    The modules are imported at the first call, so that a module may itself import `open_source` for what it is made of.
    """
    modules = sorted(module.name for module in iter_modules(__path__))
    found = [kind for name in modules for kind in import_module(f"{__name__}.{name}").KINDS]
    return tuple(sorted(found, key=lambda kind: kind.turn))


def open_source(source: str, max_images: int | None = None) -> Source:
    """The source called `source`: a built-in name or a path; only its first `max_images` items if given.

    DataError if there is no such source, no image in it, or anything wrong with it as a whole.
    """
    try:
        kind = next((kind for kind in kinds() if source and kind.claims(source)), None)
        if kind is not None:
            opened = kind.open(source, max_images)
            return replace(opened, name=printable(opened.name))
        problem = "is damaged or of no known kind" if source and os.path.exists(source) else "does not exist"
    except OSError as error:
        problem = f"cannot be read ({error.strerror or error})"
    *known, last = (kind.description for kind in kinds())
    raise DataError(f"{source or 'nothing'} {problem}: a source is {', '.join(known)}, or {last}")
