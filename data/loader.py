"""Batches in the order of the stateless shuffle, read ahead by threads into memory that is used again and again."""

import math
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import cycle

import numpy as np

from data.dataset import Dataset, ImageDataset
from data.sampler import ClassGroups, grouped_indices, sample_indices

Request = tuple[int, int, int]  # (first global sample, how many, level): growth stage k trains on level k
# Images uint8 [n, H, W, C], or vectors float32 [n, 1, K, 1]; labels [n] or [n, d] as they are stored.
Batch = tuple[np.ndarray, np.ndarray | None]
Allocate = Callable[[int], np.ndarray]  # bytes -> uint8 [bytes]
Order = Callable[[int, int], np.ndarray]  # (first global sample, how many) -> indices
Check = Callable[[int, int], bool]  # (first global sample, level) of a request -> verify its records' checksums?

RUN = 2048  # indices that are computed at once, which costs each of them a tenth of what a batch's few would


def pageable(size: int) -> np.ndarray:
    """uint8 [size] of ordinary memory."""
    return np.empty(size, np.uint8)


def unchecked(first: int, level: int) -> bool:
    """No record is verified."""
    return False


def load(
    dataset: Dataset,
    requests: Iterator[Request],
    seed: int,
    *,
    block: int = 1,
    groups: ClassGroups | None = None,
    workers: int = 1,
    check: Check = unchecked,
    allocate: Allocate = pageable,
) -> Generator[Batch, None, None]:
    """The batch of every request, in order, `workers` + 1 of them read ahead by so many threads (0: by the caller).

    A batch is valid until the next one is asked for: then its memory, of which `allocate` makes `workers` + 2 pieces,
    is written again. With `groups` each group has one label. One thread is enough for raw images; encoded ones are
    decoded by as many as there are. The caller advances `requests`. What a thread raises is raised here in place of its
    batch; closing the generator joins them.
    """
    order: Order = partial(sample_indices, length=len(dataset), seed=seed, block=block)
    if groups:
        order = partial(grouped_indices, groups=groups, seed=seed)
    wanted = _find(requests, order, check)
    if not workers:
        buffer = Buffer(allocate)
        yield from (_fetch(dataset, *one, buffer) for one in wanted)
        return
    ahead = workers + 1
    buffers = cycle([Buffer(allocate) for _ in range(ahead + 1)])  # the caller holds one of them
    pool = ThreadPoolExecutor(workers, "saddle-loader")
    waiting: deque[Future[Batch]] = deque()
    try:
        for one in wanted:
            waiting.append(pool.submit(_fetch, dataset, *one, next(buffers)))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


class Buffer:
    """Memory that batches are written into one after the other; it grows where one does not fit."""

    def __init__(self, allocate: Allocate) -> None:
        self.allocate = allocate
        self.memory = np.empty(0, np.uint8)

    def shaped(self, *shape: int) -> np.ndarray:
        """Its beginning as uint8 [*shape]."""
        size = math.prod(shape)
        if self.memory.size < size:
            self.memory = self.allocate(size)
        return self.memory[:size].reshape(shape)


def _find(requests: Iterator[Request], order: Order, check: Check) -> Iterator[tuple[np.ndarray, int, bool]]:
    """(indices, level, verify them?) of every request."""
    start = 0
    run = np.empty(0, np.int64)
    for first, count, level in requests:
        if not start <= first <= first + count <= start + len(run):
            start = first
            run = order(first, max(count, RUN))
        yield run[first - start : first - start + count], level, check(first, level)


def _fetch(dataset: Dataset, indices: np.ndarray, level: int, check: bool, buffer: Buffer) -> Batch:
    labels = dataset.labels
    out = buffer.shaped(len(indices), *dataset.shape(level)) if isinstance(dataset, ImageDataset) else None
    images = dataset.read(indices, level, check, out)
    return images, None if labels is None else labels[indices]
