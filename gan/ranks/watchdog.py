"""Threads beside the training of each rank that end the rank when no step completes, and name the rank at fault.

Every few seconds a thread writes into the store at which the ranks met that this rank is alive, its step, and where its
main thread is. A rank that hangs in a collective or in a read still writes, since a thread of its own does; of one that
does not write, the process is stopped, or its host or the link to it is gone.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch.distributed as dist

from gan.errors import PeerError
from gan.ranks.distributed import Ranks
from gan.ranks.signals import StopRequest

ROOT = Path(__file__).resolve().parents[2]
FIRST = 3  # the first step after a start may take so many times the limit
HUNG = 1  # exit code


class Heartbeats:
    """What the ranks write about themselves into the store at which they met. A rank that is alone writes nothing.

    The store is asked by a client of its own: that of the process group may be waiting for an answer itself.
    """

    def __init__(self, ranks: Ranks, name: str, wait: float) -> None:
        self.ranks = ranks
        self.host = socket.gethostname()
        self.beats = 0  # how often this rank has written
        self.heard = time.monotonic()  # when the store last answered
        self.seen: dict[int, tuple[int, float]] = {}  # rank -> (its count of beats, when that last grew)
        self.last: dict[int, dict[str, Any]] = {}  # rank -> what it wrote last
        self.store: Any = None
        if ranks.world > 1:
            host = os.environ["MASTER_ADDR"]
            port = int(os.environ["MASTER_PORT"])
            self.address = f"{host}:{port}"
            client = dist.TCPStore(host, port, wait_for_workers=False, timeout=timedelta(seconds=max(wait, 1)))
            self.store = dist.PrefixStore(name, client)

    def say(self, step: int, doing: str, waiting: bool) -> None:
        """Write where this rank is. waiting: is it in a collective, waiting for others?

        As whatever asks a store whose host is gone, it may raise RuntimeError or never return, whatever the client's
        timeout (seen in torch 2.13).
        """
        if self.store:
            self.beats += 1
            row = {"beats": self.beats, "step": step, "host": self.host, "pid": os.getpid(), "doing": doing}
            self.store.set(str(self.ranks.rank), json.dumps({**row, "waiting": waiting}))

    def look(self, now: float) -> None:
        """Read what all ranks wrote."""
        if not self.store:
            return
        rows = self.store.multi_get([str(rank) for rank in range(self.ranks.world)])
        for rank, text in enumerate(rows):
            row = self.last[rank] = json.loads(text)
            if row["beats"] != self.seen.get(rank, (0, 0.0))[0]:
                self.seen[rank] = (row["beats"], now)
        self.heard = now

    def suspects(self, now: float, silence: float) -> str:
        """For which rank the others wait, in words. silence: seconds after which a rank that writes nothing is gone."""
        if self.ranks.world == 1:
            return "there are no other ranks"
        if now - self.heard > silence:
            return (
                f"the store at {self.address}, which the first host or its rank 0 holds, has not answered for "
                f"{now - self.heard:.0f} s: that host or process is stopped or gone, or the link to it"
            )
        quiet = [r for r, (_, when) in self.seen.items() if now - when > silence]
        busy = [r for r in self.last if r not in quiet and not self.last[r]["waiting"]]
        if quiet:
            return "; ".join(
                f"{self._name(r)} has said nothing for {now - self.seen[r][1]:.0f} s: stopped, or its host or the link "
                f"to it is gone; it was last seen at step {self.last[r]['step']}"
                for r in quiet
            )
        if busy:
            return "; ".join(f"the others wait for {self._name(r)}, at {self.last[r]['doing']}" for r in busy)
        return "all ranks wait: a link between them may be down" if self.last else "see what the other ranks said"

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self.last[rank]['host']} (process {self.last[rank]['pid']})"


class Watchdog:
    """Ends this process with exit code HUNG if no step completes for `limit` seconds, or if the run has not stopped
    `grace` seconds after it was asked to.

    run: the directory into which the stacks of all threads are written then, as `hang-rank<rank>.txt`.
    timeout: seconds after which a collective fails, by when it must be known which rank is at fault.
    `limit` counts only time in which this process could run: after a SIGSTOP and SIGCONT it goes on.
    """

    def __init__(
        self, ranks: Ranks, run: Path, limit: float, stop: StopRequest, timeout: float = 300.0, grace: float = 110.0
    ) -> None:
        self.ranks = ranks
        self.run = run
        self.limit = limit
        self.stop = stop
        self.grace = grace
        self.step = -1  # the last one that has completed
        self.age = 0.0  # seconds since then
        self.main = threading.get_ident()
        self.patience = min(limit, timeout) / 4  # seconds without a step after which it looks what other ranks do
        self.pause = min(self.patience / 2, 5.0)  # seconds between two looks
        self.heartbeats = Heartbeats(ranks, "heartbeat", self.pause)
        self.closed = threading.Event()
        self.heartbeats.say(self.step, "the start", False)
        self.threads = [
            threading.Thread(target=self._write_heartbeats, name="saddle-heartbeat", daemon=True),
            threading.Thread(target=self._watch, name="saddle-watchdog", daemon=True),
        ]
        for thread in self.threads:
            thread.start()

    def beat(self, step: int) -> None:
        """A step has completed."""
        self.step = step
        self.age = 0.0

    def close(self) -> None:
        """Stop watching. A thread that waits for a store that is gone is left behind."""
        self.closed.set()
        for thread in self.threads:
            thread.join(2 * self.pause)

    def suspects(self) -> str:
        """For which rank the others wait, by what was read so far."""
        return self.heartbeats.suspects(time.monotonic(), 4 * self.pause)

    def _write_heartbeats(self) -> None:
        """Runs in a thread apart from `_watch`, since a call of the store may never return."""
        while not self.closed.wait(self.pause):
            with suppress(RuntimeError):  # whatever the store raises is one
                self.heartbeats.say(self.step, *doing(self.main))
                if self.age > self.patience:
                    self.heartbeats.look(time.monotonic())
                else:
                    self.heartbeats.heard = time.monotonic()  # nobody asked

    def _watch(self) -> None:
        last = time.monotonic()
        while not self.closed.wait(self.pause):
            now = time.monotonic()
            self.age += min(now - last, 2 * self.pause)
            last = now
            limit = self.limit * (FIRST if self.step < 0 else 1)
            if self.age > limit:
                self._end(f"no step has completed for {self.age:.0f} s (run.watchdog={self.limit:g})")
            elif self.stop and now - self.stop.when > self.grace:
                self._end(f"not stopped {self.grace:.0f} s after {self.stop.by}")

    def _end(self, what: str) -> None:
        path = self.run / f"hang-rank{self.ranks.rank}.txt"
        with suppress(OSError), path.open("w") as file:
            faulthandler.dump_traceback(file)
        host = self.heartbeats.host
        print(
            f"rank {self.ranks.rank} on {host} ends itself at step {self.step + 1}, in {doing(self.main)[0]}: {what}; "
            f"{self.suspects()}; stacks in {path}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(HUNG)


def doing(thread: int) -> tuple[str, bool]:
    """Where in our code a thread is, and whether it waits in a collective: as `place` says it of the thread's stack."""
    return place(frames(sys._current_frames().get(thread)))


def frames(frame: FrameType | None) -> Iterator[tuple[str, str, int]]:
    """(file, function, line) of a stack, innermost first."""
    while frame is not None:
        yield frame.f_code.co_filename, frame.f_code.co_name, frame.f_lineno
        frame = frame.f_back


def place(stack: Iterator[tuple[str, str, int]]) -> tuple[str, bool]:
    """("all_reduce from sum_gradients (gan/ranks/gradients.py:67)", True): the innermost function of ours in a stack,
    with the collective that it called, and whether there is one.

    stack: (file, function, line) of each frame, innermost first.
    """
    called = ""  # the collective, once one is met
    for file, function, line in stack:
        path = Path(file)
        if path.name == "distributed_c10d.py":
            called = function
        elif path.is_relative_to(ROOT) and "site-packages" not in path.parts:
            where = f"{function} ({path.relative_to(ROOT)}:{line})"
            return (f"{called} from {where}", True) if called else (where, False)
    return called or "no code of ours", bool(called)


@contextmanager
def naming(watchdog: Watchdog, when: Callable[[], str]) -> Iterator[None]:
    """A collective that fails inside the block raises PeerError, which says: this rank, its host, `when()` in words,
    where in our code it was, and which rank may be at fault."""
    try:
        yield
    except RuntimeError as error:
        where, in_collective = place(reversed(list(_raised_at(error.__traceback__))))
        if not in_collective:
            raise
        rank = watchdog.ranks.rank
        host = watchdog.heartbeats.host
        reason = " ".join(str(error).split())[:200]
        raise PeerError(f"rank {rank} on {host}, {when()}, in {where}: {reason}; {watchdog.suspects()}") from error


def _raised_at(trace: TracebackType | None) -> Iterator[tuple[str, str, int]]:
    for frame, line in traceback.walk_tb(trace):
        yield frame.f_code.co_filename, frame.f_code.co_name, line
