"""Writing what a run saves, in a thread, while training continues."""

import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from gan.errors import UserError

SLACK = 2**20  # bytes beside the tensors: names, JSON, a grid


class Writer:
    """Does one write at a time, in a thread. A failed write is reported; training continues and earlier files stay."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="saddle-writer")
        self.last: Future[str | None] | None = None

    def start(self, write: Callable[[], object]) -> None:
        """Begin a write, after waiting for the one before it."""
        self.wait()
        self.last = self.pool.submit(self._attempt, write)

    def wait(self) -> str | None:
        """Wait for the last write. -> why it failed, or None. Raises errors that have other causes than the disk."""
        return self.last.result() if self.last else None

    def close(self) -> None:
        """Wait for the last write, and end the thread."""
        self.pool.shutdown()

    def _attempt(self, write: Callable[[], object]) -> str | None:
        try:
            write()
        except (OSError, UserError) as error:
            failed = f"NOT SAVED: {error}"
            self.say(f"{failed}; earlier states are kept, and the next snapshot tries again")
            return failed
        return None


def check_space(folder: Path, tensors: Iterable[Tensor] = ()) -> None:
    """Raises UserError if the disk has no room for the tensors. Called before anything is written."""
    needed = SLACK + sum(t.nbytes for t in tensors)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder} has {free / 1e6:.0f} MB free and {needed / 1e6:.0f} MB are needed; make room on that disk"
        )


def remove_parts(run: Path) -> None:
    """Remove the temporary files of a process that was killed while it wrote. The caller must have locked the run."""
    for part in [*run.glob("*.part"), *run.glob(".*.part.*")]:
        if part.is_dir():
            shutil.rmtree(part)
        else:
            os.unlink(part)
