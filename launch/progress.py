"""The progress of long work on standard error."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
LOG_SECONDS = 10.0  # between two lines in a log


def track(items: Iterable[T], total: int, label: str) -> Iterator[T]:
    """Yield the items, and show the progress on standard error: a bar on a terminal; otherwise, as in a log, a line
    every LOG_SECONDS."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(items, total=total, desc=label, mininterval=0.5)
        return
    started = shown = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - shown >= LOG_SECONDS:
            shown = now
            left = (now - started) / done * (total - done)
            print(f"{label}: {done} of {total}, about {left:.0f} s left", file=sys.stderr, flush=True)
