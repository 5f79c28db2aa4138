"""Replacing the bad records of a dataset with what its source still holds."""

import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from data.build_plan import BuildPlan, Progress, silent
from data.encodings import MODE_OF_CHANNELS, encode_image, for_key, with_crc
from data.errors import DataError
from data.items import Item
from data.resizing import pyramid
from data.sources import open_source
from data.store import LABELS, Manifest, expected_entries, image_key, open_reader
from data.store_writer import lock
from data.verify import Findings, check_records, content_hash, stored_labels


def repair(source: str, dest: str | os.PathLike[str], progress: Progress = silent) -> list[str]:
    """Rebuild the bad records of the dataset `dest` from the source it was made of; what was wrong, one line each.

    All in one transaction, and only if the dataset then has the content hash that it was built with: DataError if it
    would not, because the source has changed, or if more than records is damaged.
    """
    path = Path(dest)
    found = check_records(path, progress, lambda found: found)
    if not found.whole or (found.rest and not (found.bad or found.labels)):
        raise DataError(f"{found.rest[0]}: that is more than bad records, build it anew")
    if not found.problems:
        return []
    manifest, labels = _read(path, found)
    plan = _plan_of(manifest, source)
    records: dict[bytes, bytes] = {}
    for index, item in _items(plan, manifest, sorted({index for _, index in found.bad})):
        top = plan.fit(item)
        if isinstance(top, str):
            raise DataError(f"{item.name} of {source} cannot be read any longer ({top}): repair needs the same source")
        values, digest = encode_image([level[0] for level in pyramid(top[None], len(plan.levels))], plan.encoding)
        if found.digests.setdefault(index, digest) != digest:
            raise _differs(source, f"{item.name} has other pixels")
        records |= {image_key(level, index): value for level, value in zip(plan.levels, values, strict=True)}
    if found.labels:
        skipped = set(manifest.skipped_positions)  # in one pass: a source may read a whole batch to give one item
        labels = np.array([item.label for place, item in enumerate(plan.source.read()) if place not in skipped])
        records[LABELS] = with_crc(stored_labels(labels))
    if content_hash(manifest, found.digests, labels) != manifest.content_hash:
        raise _differs(source, "its labels or images are others")
    bad = {image_key(*place) for place in found.bad} | {LABELS}
    records = {key: value for key, value in records.items() if key in bad}
    if manifest.version >= 3:
        records = {key: for_key(key, value) for key, value in records.items()}
    _replace(path, records, expected_entries(manifest))
    return found.problems


def _read(path: Path, found: Findings) -> tuple[Manifest, np.ndarray | None]:
    """Manifest and labels, None if those are bad; nobody here has the file open afterwards."""
    reader = open_reader(path)
    return reader.manifest, None if found.labels else reader.labels()


def _differs(source: str, what: str) -> DataError:
    return DataError(f"{source} is not what the dataset was made of: {what}; nothing was changed")


def _plan_of(manifest: Manifest, source: str) -> BuildPlan:
    """The plan by which a dataset was built, with the source opened again."""
    count = manifest.count + len(manifest.skipped_positions)
    opened = open_source(source, max_images=count)
    if (opened.count, opened.classes, opened.label_dim) != (count, manifest.classes, manifest.label_dim):
        raise _differs(source, f"{opened.count} images of {count}, or other labels")
    return BuildPlan(
        source=opened,
        size=manifest.resolution,
        base=manifest.base,
        levels=manifest.levels,
        mode=MODE_OF_CHANNELS[manifest.channels],
        fixed_mode=True,
        transform=manifest.transform,
        encoding=manifest.encoding,
    )


def _items(plan: BuildPlan, manifest: Manifest, indices: Sequence[int]) -> Iterator[tuple[int, Item]]:
    """(index, the item of the source that it was made of) of stored images."""
    positions = np.delete(np.arange(plan.source.count), manifest.skipped_positions)
    for index in indices:
        position = int(positions[index])
        for item in plan.source.read(position, position + 1):
            yield index, item


def _replace(path: Path, records: dict[bytes, bytes], entries: int) -> None:
    """Put records into a dataset, all or none."""
    import lmdb

    # A record that is replaced takes new pages, and so does every page on the way to it.
    room = 2 * path.stat().st_size + 2 * sum(map(len, records.values())) + (16 << 20)
    file = lock(path)
    try:
        # Readers are not disturbed: a single transaction writes to no page that the one before it uses.
        with (
            closing(lmdb.open(os.fsencode(path), subdir=False, lock=False, map_size=room)) as env,
            env.begin(write=True) as transaction,
        ):
            for key, value in records.items():
                transaction.put(key, value)
            if transaction.stat()["entries"] != entries:
                raise DataError(f"{path} holds keys that are none of a dataset: build it anew")
    except (lmdb.Error, OSError) as error:
        raise DataError(f"cannot write {path}: {error}; nothing was changed") from error
    finally:
        os.close(file)
