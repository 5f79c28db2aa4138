"""Batches in the order of the stateless shuffle, read ahead by one thread."""

import queue
import threading
from collections.abc import Generator, Iterator

import numpy as np

from data.dataset import ImageDataset
from data.sampler import sample_indices

Request = tuple[int, int, int]  # (first global sample, how many, level)
Batch = tuple[np.ndarray, np.ndarray | None]  # images uint8 [n, H, W, C], labels int64 [n]


def load(
    dataset: ImageDataset, requests: Iterator[Request], seed: int, depth: int = 2, check: bool = False
) -> Generator[Batch, None, None]:
    """The batch of every request, in order, up to `depth` read ahead by a thread (0: read by the caller).

    The thread alone advances `requests`. What it raises is raised here; closing this generator ends and joins it.
    """
    batches = (_fetch(dataset, request, seed, check) for request in requests)
    return _read_ahead(batches, depth) if depth else batches


def _fetch(dataset: ImageDataset, request: Request, seed: int, check: bool) -> Batch:
    first, count, level = request
    indices = sample_indices(first, count, len(dataset), seed)
    labels = dataset.labels
    return dataset.read(indices, level, check), None if labels is None else labels[indices]


def _read_ahead(batches: Iterator[Batch], depth: int) -> Generator[Batch, None, None]:
    """The same batches, computed by a daemon thread that stays at most `depth` ahead."""
    results: queue.SimpleQueue[Batch | BaseException] = queue.SimpleQueue()
    slots, stopping = threading.Semaphore(depth), threading.Event()

    def work() -> None:
        try:
            while slots.acquire() and not stopping.is_set():
                results.put(next(batches))
        except BaseException as error:  # whatever it is, the consumer must not wait for ever
            results.put(error)

    thread = threading.Thread(target=work, name="saddle-loader", daemon=True)
    thread.start()
    try:
        while True:
            result = results.get()
            if isinstance(result, StopIteration):
                return
            if isinstance(result, BaseException):
                raise result
            slots.release()
            yield result
    finally:
        stopping.set()
        slots.release()
        thread.join()
