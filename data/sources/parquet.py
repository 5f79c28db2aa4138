"""Parquet files with encoded images in them, as the Hugging Face hub stores them: one file, or a folder of shards.

The images are a column of bytes, or of structs with a field `bytes`, called `image` or `img` unless there is but one.
The labels are a column called as in LABELS: integers, named by the ClassLabel in the metadata, or vectors. Of a folder
with files `train*` only those are read: the others are for tests.
"""

import io
import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.errors import DataError
from data.image_files import open_image
from data.items import Item, Source
from data.kinds import path_kind
from data.labels import Labels, labels_from_array, no_labels
from data.listing import holds_only
from data.names import hidden

IMAGES = ("image", "img")
LABELS = ("label", "fine_label", "labels")
SUFFIX = ".parquet"
BATCH = 64  # rows that are decoded at once


class Group(NamedTuple):
    """A row group: the rows of a file that are stored together."""

    path: Path
    number: int
    first: int  # row of the file
    rows: int


class Columns(NamedTuple):
    """What the files of one source have in common."""

    image: str
    label: str | None
    classes: tuple[str, ...] | None


def is_parquet(path: Path) -> bool:
    """Whether a file is a parquet file by how it begins."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"PAR1"


def holds_parquet(path: Path) -> bool:
    """Whether a folder is one of parquet files."""
    return holds_only(path, (SUFFIX,))


def open_parquet(path: Path, max_images: int | None) -> Source:
    """The source of one parquet file."""
    return _open_files(path.name, [path], max_images)


def open_parquet_folder(path: Path, max_images: int | None) -> Source:
    """The source of the parquet files in a folder, in the order of their names."""
    files = [file for file in sorted(path.iterdir()) if file.name.lower().endswith(SUFFIX) and not hidden(file.name)]
    training = [file for file in files if file.name.lower().startswith("train")]
    return _open_files(path.resolve().name, training or files, max_images)


def _line(error: Exception) -> str:
    """The first line of what pyarrow says, which may be a page."""
    return str(error).partition("\n")[0]


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError("parquet files are read by pyarrow, which is missing: pip install pyarrow") from error
    return pyarrow


def _open_files(name: str, files: Sequence[Path], max_images: int | None) -> Source:
    columns, groups, found = _look_into(files[0])
    for path in files[1:]:
        others, more_groups, more_labels = _look_into(path)
        if others != columns:
            raise DataError(f"{path} has other columns or class names than {files[0]}: give the folder of one data set")
        groups += more_groups
        found += more_labels
    ends = list(accumulate(group.rows for group in groups))
    if not ends or not ends[-1]:
        raise DataError(f"no images in {name}: it has no rows")
    labels = _labels(name, found, ends[-1], columns.classes)
    count = min(ends[-1], max_images or ends[-1])

    def read(start: int = 0, stop: int | None = None) -> Iterator[Item]:
        start, stop, _ = slice(start, stop).indices(count)
        for position in range(bisect_right(ends, start), len(groups)):
            group = groups[position]
            begin = ends[position] - group.rows
            if begin >= stop:
                return
            rows = range(max(start - begin, 0), min(stop - begin, group.rows))
            for row, image in zip(rows, _images(group, columns.image, rows), strict=True):
                yield Item(f"{group.path.name} row {group.first + row}", image, labels.values[begin + row])

    return Source(name, count, labels.classes, read, label_dim=labels.dim, files=files)


def _look_into(path: Path) -> tuple[Columns, list[Group], list[np.ndarray]]:
    """Which columns matter, the row groups, and the labels (one array, or none if there is no such column)."""
    pyarrow = _pyarrow()
    try:
        with path.open("rb") as opened, pyarrow.parquet.ParquetFile(opened) as file:
            schema = file.schema_arrow
            metadata = file.metadata
            label = next((name for name in LABELS if name in schema.names), None)
            columns = Columns(_image_column(path, schema), label, _class_names(schema, label))
            rows = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
            firsts = [0, *accumulate(rows)]
            groups = [Group(path, number, firsts[number], count) for number, count in enumerate(rows)]
            if label is None:
                return columns, groups, []
            return columns, groups, [_numbers(path, file.read([label], use_threads=False)[label])]
    except (pyarrow.ArrowException, UnicodeDecodeError, KeyError, OSError) as error:
        raise DataError(f"{path} is a damaged parquet file ({_line(error)}): copy it again") from error


def _image_column(path: Path, schema: Any) -> str:
    import pyarrow.types as types

    def holds_bytes(kind: Any) -> bool:
        if types.is_struct(kind):
            return any(field.name == "bytes" and holds_bytes(field.type) for field in kind)
        return types.is_binary(kind) or types.is_large_binary(kind)

    columns = [field.name for field in schema if holds_bytes(field.type)]
    named = [name for name in IMAGES if name in columns]
    if not named and len(columns) != 1:
        raise DataError(
            f"which column of {path} has the images is not clear: name it image; it has {', '.join(schema.names)}, "
            f"and {len(columns)} of them hold bytes"
        )
    return (named or columns)[0]


def _class_names(schema: Any, column: str | None) -> tuple[str, ...] | None:
    """The names of a ClassLabel, from what the Hugging Face library left in the metadata."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[column]["names"]
    except (KeyError, ValueError, TypeError, RecursionError):
        return None
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _numbers(path: Path, column: Any) -> np.ndarray:
    """A column of labels as [N] or [N, d]."""
    if column.null_count:
        raise DataError(f"{path}: {column.null_count} rows have no label")
    try:
        return np.array(column.to_pylist())
    except ValueError as error:  # vectors of several lengths
        raise DataError(f"{path}: the labels are vectors of different lengths") from error


def _labels(name: str, columns: Sequence[np.ndarray], count: int, classes: tuple[str, ...] | None) -> Labels:
    columns = [column for column in columns if len(column)]
    if not columns:
        return no_labels(count)
    if len({(column.dtype.kind, column.shape[1:]) for column in columns}) > 1:
        raise DataError(f"{name}: the labels of some files are of another kind than those of others")
    labels = np.concatenate(columns)
    if labels.dtype.kind == "i" and (labels == -1).all():
        return no_labels(count)  # so the hub marks sets whose labels are kept secret
    return labels_from_array(name, labels, count, classes)


def _images(group: Group, column: str, rows: range) -> Iterator[Any]:
    """The images of some rows of a group, opened, or why they cannot be."""
    pyarrow = _pyarrow()
    done = rows.start
    try:
        with group.path.open("rb") as opened, pyarrow.parquet.ParquetFile(opened) as file:
            first = 0
            for batch in file.iter_batches(BATCH, [group.number], [column], use_threads=False):
                begin = max(rows.start - first, 0)
                end = min(rows.stop - first, len(batch))
                first += len(batch)
                for value in batch.column(0)[begin:end] if begin < end else ():
                    done += 1
                    yield _open_value(value.as_py())
                if first >= rows.stop:
                    return
        reason = "the file is shorter than it says"
    except (pyarrow.ArrowException, UnicodeDecodeError, KeyError, OSError) as error:
        reason = f"cannot be opened: {_line(error)}"
    for _ in range(done, rows.stop):
        yield reason


def _open_value(value: Any) -> Any:
    content = value.get("bytes") if isinstance(value, dict) else value
    return open_image(io.BytesIO(content)) if content is not None else "no bytes, only a path or nothing"


KINDS = (
    path_kind("a parquet file", is_parquet, open_parquet, details="as the Hugging Face hub stores images"),
    path_kind("a folder of parquet files", holds_parquet, open_parquet_folder),
)
