"""Which kernels serve this process: the compiled ones, or the reference.

SADDLE_OPS=reference  never compile, never load
SADDLE_OPS=compiled   compiled kernels or an error, for the GPUs here too
SADDLE_OPS=auto       (default) compiled kernels where they can be had; else the reference kernels, and one line on why
"""

import multiprocessing
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ops.build import CSRC, find, load, remembered, say
from ops.toolchain import BuildError, Recipe, recipe

MODES = ("reference", "compiled", "auto")


def mode() -> str:
    """SADDLE_OPS, checked: one of MODES. BuildError for anything else."""
    value = os.environ.get("SADDLE_OPS") or "auto"
    if value not in MODES:
        raise BuildError(f"SADDLE_OPS={value}: it must be one of {', '.join(MODES)}")
    return value


def choose(source: Path = CSRC) -> str:
    """Load the compiled kernels if SADDLE_OPS and this machine allow -> "compiled", else "reference", having said why.

    Raises BuildError for an unknown SADDLE_OPS, and where SADDLE_OPS=compiled cannot be had. Once per
    process (see `ops.registry.kernels`), since kernels can be registered once.
    """
    wanted = mode()
    if wanted == "reference":
        return wanted
    try:
        missing = _load_most(source, strict=wanted == "compiled")
    except BuildError as error:
        if wanted == "compiled":
            raise BuildError(f"SADDLE_OPS=compiled: {error}") from error
        _warn(f"ops: using the reference kernels, which are slower: {error}")
        return "reference"
    if missing:
        _warn(f"ops: using the reference kernels on the GPU, which are slower: {missing}")
    return "compiled"


def _load_most(source: Path, strict: bool) -> str:
    """Load the kernels for CPU and GPU, or unless strict at least for the CPU -> why there are none for the GPU."""
    made = recipe(source)
    if made.missing and strict:
        raise BuildError(made.missing)
    try:
        _load(made)
        return made.missing
    except BuildError as error:
        if made.nvcc is None or strict:
            raise
        _load(recipe(source, with_cuda=False))
        return str(error)


def _load(made: Recipe) -> None:
    if _is_worker() and find(made) is None:
        raise BuildError("a process that prepares data does not compile")
    load(made)


def _is_worker() -> bool:
    """A process that prepares data for another one: nobody there waits for a compiler."""
    return torch.utils.data.get_worker_info() is not None or multiprocessing.current_process().daemon


def _warn(message: str) -> None:
    if not _is_worker():
        say(f"{message} (saddle doctor tells more)")


@dataclass(frozen=True)
class Status:
    """What `choose` would do now."""

    mode: str
    kernels: str  # "compiled" or "reference"
    library: str  # its path in the cache, or nothing: it would be compiled first
    key: str
    missing: str  # why there are no compiled kernels, or none for the GPU; or nothing


def status(source: Path = CSRC) -> Status:
    """Look; compile and load nothing. BuildError for an unknown SADDLE_OPS."""
    wanted = mode()
    try:
        made = recipe(source)
    except BuildError as error:
        return Status(wanted, "reference", "", "", str(error))
    now = _status_of(made, wanted)
    if made.nvcc is None or wanted != "auto" or now.kernels == "compiled":
        return now
    alone = _status_of(recipe(source, with_cuda=False), wanted)  # as `_load_most`: at least those for the CPU
    return replace(alone, missing=alone.missing or now.missing)


def _status_of(made: Recipe, wanted: str) -> Status:
    """The status if this recipe is the only one."""
    try:
        found = find(made)
    except BuildError as error:
        return Status(wanted, "reference", "", made.key, str(error))
    failed = "" if found else remembered(made)
    kernels = "reference" if wanted == "reference" or failed else "compiled"
    return Status(wanted, kernels, str(found or ""), made.key, failed or made.missing)
