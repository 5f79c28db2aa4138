"""The labels of images: a class number each, or a vector of floats each, or none. They are checked here, on entry."""

import json
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import numpy as np

from data.errors import DataError
from data.names import composed, printable, tidy

LABELS_FILE = "dataset.json"  # as StyleGAN's data sets have it: {"labels": [["00000/img0.png", 3], ...]}
MAX_CLASSES = 1 << 20
MAX_DIGITS = 255  # of a folder that is sorted as a number; file systems allow no longer name, archives do

Label = int | np.ndarray | None  # a class number; float32 [d]; none


class Labels(NamedTuple):
    """The labels of a list of images."""

    values: Sequence[Label]
    classes: tuple[str, ...] | None = None  # names by number, if the values are integers
    dim: int | None = None  # length of the vectors, if they are vectors
    note: str = ""  # why there are none, if the user may have meant them to be some


def no_labels(count: int) -> Labels:
    """The labels of `count` images without."""
    return Labels([None] * count)


def labels_from_array(
    where: object,
    labels: np.ndarray,
    count: int,
    classes: Sequence[str] | None = None,
    name: Callable[[int], str] = "image {}".format,
) -> Labels:
    """Labels of `count` images: integers [N] or [N, 1], or vectors of numbers [N, d].

    The names of integers are `classes`, or else "0", "1" and so on, to the largest that occurs.
    DataError, starting with `where`, if they are neither, or do not fit the images or the classes.
    """
    if len(labels) != count:
        raise DataError(f"{where} has {len(labels)} labels for {count} images")
    if labels.dtype.kind in "iu" and labels.shape[1:] == (1,):
        labels = labels[:, 0]
    if labels.dtype.kind in "iu" and labels.ndim == 1:
        limit = MAX_CLASSES if classes is None else len(classes)
        for index in np.flatnonzero((labels < 0) | (labels >= limit))[:1]:
            raise DataError(f"{where}: the label of {name(index)} is {labels[index]}, outside of 0 to {limit - 1}")
        numbers = range(int(labels.max()) + 1 if count else 0)
        names = (printable(composed(name)) for name in classes) if classes else map(str, numbers)
        return Labels(labels.tolist(), tuple(names))
    if labels.dtype.kind in "biuf" and labels.ndim == 2 and labels.shape[1]:
        with np.errstate(over="ignore"):
            vectors = labels.astype(np.float32)
        for index in np.flatnonzero(~np.isfinite(vectors).all(1))[:1]:
            raise DataError(f"{where}: the label of {name(index)} is not finite")
        return Labels(list(vectors), dim=labels.shape[1])
    raise DataError(
        f"{where}: labels of type {labels.dtype} and shape {labels.shape} are neither one integer for each image nor "
        "one vector of numbers"
    )


def labels_from_json(where: object, names: Sequence[str], values: Sequence[Any]) -> Labels:
    """Labels that were JSON: all integers, all vectors of one length, or all null. DataError names one that differs."""
    kinds = [_kind(value) for value in values]
    for name, kind, value in zip(names, kinds, values, strict=True):
        if kind is None:
            raise DataError(
                f"{where}: the label of {name} is {value!r:.40}: an integer or a vector of numbers is needed"
            )
        if kind != kinds[0]:
            raise DataError(f"{where}: the label of {name} is {kind}, that of {names[0]} {kinds[0]}")
    if not kinds or kinds[0] == "missing":
        return no_labels(len(names))
    if kinds[0] == "an integer":
        values = [min(max(value, -1), MAX_CLASSES) for value in values]  # what int64 cannot hold stays out of bounds
    try:
        array = np.array(values, np.int64 if kinds[0] == "an integer" else np.float64)
    except OverflowError as error:
        raise DataError(f"{where}: a label is not finite: {error}") from error
    return labels_from_array(where, array, len(names), name=names.__getitem__)


def _kind(label: Any) -> str | None:
    if label is None:
        return "missing"
    if type(label) is int:  # True is no number
        return "an integer"
    if isinstance(label, list) and label and all(type(number) in (int, float) for number in label):
        return f"a vector of {len(label)}"
    return None


def labels_from_file(where: str, content: bytes, names: Sequence[str], refused: Sequence[str]) -> Labels:
    """The labels that the content of a LABELS_FILE gives the images `names` (tidy); `refused` images need none.

    DataError, starting with `where`, if it cannot be understood, leaves out an image, or names one that is not there.
    """
    try:
        pairs = json.loads(content)["labels"]
        if pairs is None:
            return no_labels(len(names))
        labels = {tidy(name): label for name, label in pairs}
        repeated = len(labels) < len(pairs)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(
            f'{where} is not of the form {{"labels": [["image.png", 3], ...]}} ({type(error).__name__}: {error})'
        ) from error
    if repeated:
        raise DataError(f"{where} names a file twice")
    missing = [name for name in names if name not in labels]
    if missing:
        raise DataError(f"{where} has no label for {missing[0]}, and for {len(missing) - 1} other images")
    known = {*names, *refused}
    absent = [name for name in labels if name not in known]
    if absent:
        raise DataError(f"{where} has a label for {absent[0]!r}, and {len(absent) - 1} others, which is no image here")
    return labels_from_json(where, names, [labels[name] for name in names])


def label_by_folder(names: Sequence[str]) -> Labels:
    """Labels of files by name: the class is the first folder below those that all names share.

    None, and a note if other names have one, if a name has no such folder. Classes are sorted, as numbers if all of
    them are.
    """
    paths = [name.split("/") for name in names]
    while paths and len({path[0] for path in paths}) == 1 and all(len(path) > 1 for path in paths):
        paths = [path[1:] for path in paths]
    folders = {path[0] for path in paths if len(path) > 1}
    strays = [name for name, path in zip(names, paths, strict=True) if len(path) == 1]
    if strays or not folders:
        return no_labels(len(names))._replace(note=_stray_note(strays, folders))
    numeric = all(folder.isdecimal() and len(folder) <= MAX_DIGITS for folder in folders)
    classes = tuple(sorted(folders, key=lambda folder: (int(folder) if numeric else 0, folder)))
    numbers = {folder: number for number, folder in enumerate(classes)}
    return Labels([numbers[path[0]] for path in paths], classes)


def _stray_note(strays: Sequence[str], folders: Collection[str]) -> str:
    if not folders:
        return ""
    others = f" and {len(strays) - 1} other images lie" if len(strays) > 1 else " lies"
    return (
        f"no classes, because {strays[0]}{others} beside the folders ({', '.join(sorted(folders)[:3])}"
        f"{', ...' if len(folders) > 3 else ''}): for these to be classes, move every image into one of them"
    )
