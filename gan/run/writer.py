"""Writing what a run saves, in a thread beside the training that goes on."""

import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from gan.errors import UserError

SLACK = 2**20  # bytes beside the tensors: names, JSON, a grid


class Writer:
    """Does one write at a time, in a thread. What fails is said; training goes on and what was there before stays."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="saddle-writer")
        self.last: Future[str | None] | None = None

    def start(self, write: Callable[[], object]) -> None:
        """Begin a write, when the one before it is done."""
        self.wait()
        self.last = self.pool.submit(self._attempt, write)

    def wait(self) -> str | None:
        """Until nothing is being written. -> why the last write failed, or None. Raises what is no matter of disks."""
        return self.last.result() if self.last else None

    def close(self) -> None:
        """Wait, and end the thread."""
        self.pool.shutdown()

    def _attempt(self, write: Callable[[], object]) -> str | None:
        try:
            write()
        except (OSError, SafetensorError, UserError) as error:
            failed = f"NOT SAVED: {error}"
            self.say(f"{failed}; what was saved before stays, and the next snapshot is another try")
            return failed
        return None


def check_space(folder: Path, tensors: Iterable[Tensor]) -> None:
    """Raises UserError where the disk has no room for them, before anything is written."""
    needed = SLACK + sum(t.nbytes for t in tensors)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(f"{folder} has {free / 1e6:.0f} MB free and {needed / 1e6:.0f} MB are needed; free some")


def remove_parts(run: Path) -> None:
    """What a process that was killed in a write left behind. The run must be held."""
    for part in [*run.glob("*.part"), *run.glob(".*.part.*")]:
        if part.is_dir():
            shutil.rmtree(part)
        else:
            os.unlink(part)
