"""Where images come from: the table of the kinds of sources, each a lazy, repeatable, ordered list of items."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from zipfile import is_zipfile

from data.arrays import is_idx, is_npz, open_idx, open_npz
from data.cifar import is_cifar_folder, is_cifar_tar, is_pickle, open_cifar_file, open_cifar_folder, open_cifar_tar
from data.digits import STACKED, open_digits, open_stacked, open_stacked_digits, stacked_choice
from data.errors import DataError
from data.folders import open_folder, open_zip
from data.items import Item, Source, open_image, quiet_pillow
from data.labels import label_by_folder
from data.lmdbs import is_lmdb, open_lmdb
from data.parquet import holds_parquet, is_parquet, open_parquet, open_parquet_folder
from data.tars import BRACES, holds_shards, is_tar, open_shard_folder, open_shard_pattern, open_tar

__all__ = ["Item", "Source", "label_by_folder", "open_image", "open_source", "quiet_pillow", "stacked_choice"]


class Kind(NamedTuple):
    """A kind of source."""

    description: str  # for people
    claims: Callable[[Path], bool]  # told from the name and how the content begins, for a path that need not exist
    open: Callable[[Path, int | None], Source]  # (path, max_images); DataError if it is damaged, or without an image


BUILT_IN: dict[str, Callable[[str, int | None], Source]] = {
    "digits": open_digits,
    STACKED: open_stacked_digits,
}

KINDS = (  # the first that claims a path has it
    Kind("a folder of CIFAR batches", is_cifar_folder, open_cifar_folder),
    Kind("an LMDB of saddle prepare or with keys SIZE-INDEX", is_lmdb, open_lmdb),
    Kind("a folder of parquet files", holds_parquet, open_parquet_folder),
    Kind("a folder of tars", holds_shards, open_shard_folder),
    Kind("a folder of images", Path.is_dir, open_folder),
    Kind("an npz", is_npz, open_npz),
    Kind("a zip of images", lambda path: path.is_file() and is_zipfile(path), open_zip),
    Kind("a parquet file", is_parquet, open_parquet),
    Kind("an IDX file of images", is_idx, open_idx),
    Kind("a CIFAR batch", is_pickle, open_cifar_file),
    Kind("a CIFAR archive", is_cifar_tar, open_cifar_tar),
    Kind("a tar of images or of webdataset", is_tar, open_tar),
    Kind("shards such as set-{000..003}.tar", lambda path: BRACES.search(str(path)) is not None, open_shard_pattern),
)


def open_source(source: str, max_images: int | None = None) -> Source:
    """The source called `source`: a built-in name or a path; only its first `max_images` items if given.

    DataError if there is no such source, no image in it, or anything wrong with it as a whole.
    """
    if source in BUILT_IN:
        return BUILT_IN[source](source, max_images)
    if source.startswith(f"{STACKED}:"):
        return open_stacked(source, max_images, open_source)
    path = Path(source)
    try:
        if source:
            for kind in KINDS:
                if kind.claims(path):
                    return kind.open(path, max_images)
        problem = "is damaged or of no known kind" if source and path.exists() else "does not exist"
    except OSError as error:
        problem = f"cannot be read ({error.strerror or error})"
    known = (*(kind.description for kind in KINDS), *BUILT_IN, f"{STACKED}:SOURCE")
    raise DataError(f"{source or 'nothing'} {problem}: a source is {', '.join(known[:-1])}, or {known[-1]}")
