"""A part of another source: some images of it, chosen at random, for tests, or all the others, for training."""

import re
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from data.errors import DataError
from data.items import Item, Source
from data.kinds import Kind, Turn
from data.sources import open_source

FORM = re.compile(r"(train|test):([0-9]{1,12}):(.+)", re.DOTALL)
SEED = 0


def open_part(source: str, max_images: int | None) -> Source:
    """The source called `test:N:SOURCE`, N images of another, or `train:N:SOURCE`, all but those.

    Which ones depends only on N and on how many images there are. DataError if none would be left on either side.
    """
    form = FORM.fullmatch(source)
    assert form
    part, held_out, name = form.groups()
    of = open_source(name)
    if not 0 < int(held_out) < of.count:
        raise DataError(f"{source}: {of.name} has {of.count} images, of which from 1 to {of.count - 1} can be held out")
    order = np.random.RandomState(SEED).permutation(of.count)
    chosen = order[: int(held_out)] if part == "test" else order[int(held_out) :]
    positions = np.sort(chosen)[:max_images]

    def read(start: int = 0, stop: int | None = None) -> Iterator[Item]:
        wanted = positions[start:stop].tolist()
        if not wanted:
            return
        keep = set(wanted)  # in one pass: an archive need not be opened for each image
        for position, item in enumerate(of.read(wanted[0], wanted[-1] + 1), wanted[0]):
            if position in keep:
                yield item

    return replace(of, name=f"{part}:{held_out}:{of.name}", count=len(positions), read=read)


KINDS = (
    Kind(
        "train:N:SOURCE or test:N:SOURCE",
        "all but N random images of any other source, or those N",
        Turn.NAME,
        lambda source: FORM.fullmatch(source) is not None,
        open_part,
    ),
)
