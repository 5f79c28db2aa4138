"""Capturing work as CUDA graphs, with what cannot be captured between them: sums over ranks.

A graph repeats the kernels of a step without the host's work for each of them. It repeats them on the same memory: what
differs from run to run must be copied into tensors that were there before (`gan.inputs`).
"""

import gc
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

_capturing: "Capture | None" = None


class Capture:
    """Captures work on the GPU's current stream in segments, and replays them in order.

    beside: a capture to share memory with. Each replay then overwrites what the other one left there, except tensors
    that something still refers to when the second one is captured. They must not run at the same time.
    """

    def __init__(self, beside: "Capture | None" = None) -> None:
        self.segments: list[Callable[[], object]] = []
        # The segments share memory too: later ones read what earlier ones made.
        self.pool: Any = beside.pool if beside else torch.cuda.graph_pool_handle()
        self.graph: torch.cuda.CUDAGraph | None = None

    def record(self, work: Callable[[], object]) -> None:
        """Capture `work` without running its kernels. Raises RuntimeError if it does what cannot be captured."""
        global _capturing
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()
        _capturing = self
        try:
            self._begin()
            work()
        except BaseException:  # which says more than the error that ending the segment may raise
            with suppress(RuntimeError):
                self._end()
            raise
        finally:
            _capturing = None
        self._end()

    def replay(self) -> None:
        """Run what was captured."""
        for segment in self.segments:
            segment()

    def between(self, work: Callable[[], object]) -> None:
        """End a segment; `work` is run at this place when the segments are replayed, not now; begin the next one."""
        self._end()
        self.segments.append(work)
        self._begin()

    def _begin(self) -> None:
        self.graph = torch.cuda.CUDAGraph()
        # Other threads, which read images and write files, may go on using the GPU.
        self.graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")

    def _end(self) -> None:
        if self.graph:
            graph = self.graph
            self.graph = None
            try:
                graph.capture_end()
            except RuntimeError:
                # torch has then not told its allocator, which would go on to set aside what other streams use, and
                # never free the pool. If it has, the first call raises, and the graph itself releases the pool.
                device = torch.cuda.current_device()
                with suppress(RuntimeError):
                    torch._C._cuda_endAllocateToPool(device, self.pool)
                    torch._C._cuda_releasePool(device, self.pool)
                raise
            self.segments.append(graph.replay)


def outside(work: Callable[[], object]) -> None:
    """Run `work`, or while a step is captured leave it to be run between two graphs."""
    if _capturing:
        _capturing.between(work)
    else:
        work()
