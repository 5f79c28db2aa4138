"""What a source is: an ordered, repeatable list of items, each an image or the reason why there is none."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from data.labels import Label, Labels

if TYPE_CHECKING:
    from PIL.Image import Image


class Item(NamedTuple):
    """One image of a source."""

    name: str
    image: "Image | np.ndarray | str"  # opened, header read; or uint8 [H, W] or [H, W, 3 or 4]; or why there is none
    label: Label


class Read(Protocol):
    """How a source is read."""

    def __call__(self, start: int = 0, stop: int | None = None) -> Iterator[Item]:
        """The items in [start, stop), in order."""


@dataclass(frozen=True)
class Source:
    """An ordered set of images. `read` may be called again, and from forked children: it opens its files itself.

    An item is valid until the next one is asked for. A source does not pickle.
    """

    name: str
    count: int  # items that `read` yields, unreadable ones included
    classes: tuple[str, ...] | None  # class names by label; None: labels are vectors, or there are none
    read: Read
    ignored: Mapping[str, int] = field(default_factory=dict)  # suffix of files that are no images -> how many
    label_dim: int | None = None  # length of the float32 vectors that are the labels
    notes: tuple[str, ...] = ()  # what the user should know of it, such as why there are no classes
    files: Sequence[Path] = ()  # that it is made of: when one changes, this is another source


def array_source(name: str, images: np.ndarray, labels: Labels, max_images: int | None, item: str = "image") -> Source:
    """The source of uint8 images [N, H, W] or [N, H, W, C] in memory, each called `item` and its number."""
    count = min(len(images), max_images or len(images))

    def read(start: int = 0, stop: int | None = None) -> Iterator[Item]:
        for index in range(*slice(start, stop).indices(count)):
            yield Item(f"{item} {index}", np.ascontiguousarray(images[index]), labels.values[index])

    return Source(name, count, labels.classes, read, label_dim=labels.dim)


def show_counts(counts: Mapping[str, int]) -> str:
    """Such as "12 .txt, 3 .heic and 2 others": the eight most frequent, in that order."""
    shown = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:8]
    parts = ", ".join(f"{count} {name}" for name, count in shown)
    rest = sum(counts.values()) - sum(count for _, count in shown)
    return f"{parts} and {rest} others" if rest else parts
