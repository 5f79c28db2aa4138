"""Files of tensors (safetensors) and of JSON, read as what a stranger made: what a header says is compared with what it
should say before anything is loaded. ValueError says what is wrong; whoever reads adds the file's name."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from gan.files import sync

Layout = dict[str, tuple[str, tuple[int, ...]]]  # name of a tensor -> (dtype as safetensors calls it, shape)
Kinds = Mapping[str, type | tuple[type, ...]]  # name of a field -> its type
DTYPES = {torch.float32: "F32", torch.float64: "F64"}


def layout_of(tensors: Mapping[str, Tensor]) -> Layout:
    """The layout of tensors, which may be on the meta device."""
    return {name: (DTYPES.get(t.dtype, str(t.dtype)), tuple(t.shape)) for name, t in tensors.items()}


def read_layout(path: Path) -> Layout:
    """The layout of the tensors of a file, by its header alone. Raises SafetensorError or OSError if it has none."""
    with safe_open(path, "pt") as file:
        return layout_of_open(file)


def layout_of_open(file: Any) -> Layout:
    """The same of a file that `safe_open` has opened."""
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}


def check_layout(found: Layout, expected: Layout, optional: str = "") -> None:
    """Raises ValueError that names the first tensor that differs. `optional` may be missing."""
    for name in sorted(found.keys() | expected.keys()):
        there = found.get(name)
        here = expected.get(name)
        if there != here and not (there is None and name == optional):
            raise ValueError(f"{name} is {_words(there)}, and its configuration needs {_words(here)}")


def _words(entry: tuple[str, tuple[int, ...]] | None) -> str:
    return f"{entry[0]} {list(entry[1])}" if entry else "missing"


def digest(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 in hexadecimal of plain values and of tensors: JSON with sorted keys, then for each tensor in the order
    of names a line `NAME DTYPE [SHAPE]` and its bytes in row-major order."""
    sha256 = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, (dtype, shape) in sorted(layout_of(tensors).items()):
        sha256.update(f"\n{name} {dtype} {list(shape)}\n".encode())
        sha256.update(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a new file and flush it to disk. The file's content is in memory once more meanwhile: safetensors itself
    writes to a file whose name it makes up, which a killed process would leave behind."""
    path.write_bytes(save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, metadata))
    sync(path)


def parse_fields(text: str | bytes, kinds: Kinds, more: bool = False) -> dict[str, Any]:
    """The JSON object in a text that has the fields `kinds`, each of exactly its type, and no others unless `more`."""
    try:
        fields = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(fields, dict):
        raise ValueError(f"it is a JSON {type(fields).__name__} and not an object")
    for name, kind in kinds.items():
        if name not in fields:
            raise ValueError(f"{name} is missing")
        if type(fields[name]) not in (kind if isinstance(kind, tuple) else (kind,)):
            raise ValueError(f"{name} is {str(fields[name])[:40]!r}")
    unknown = fields.keys() - kinds.keys()
    if unknown and not more:
        raise ValueError(f"{min(unknown)!r:.40} is unknown")
    return fields
