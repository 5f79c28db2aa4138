"""Threads on each rank that end the rank if no step completes, and say which rank is at fault.

Every few seconds a thread writes a heartbeat into the store of the ranks' rendezvous: this rank's step, and where in
the code its main thread is. While the main thread hangs in a collective or in a read, the heartbeat continues. If a
rank's heartbeat stops, its process was stopped or killed, or its host or the link to it is down.
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
FIRST = 3  # the first step after a start may take this many times the limit
HUNG = 1  # exit code


class Heartbeats:
    """What the ranks write about themselves into the store of their rendezvous. An only rank writes nothing.

    It has its own client of the store, as the process group's client may itself be waiting for an answer.
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
        """Write this rank's step and place in the code. waiting: is it in a collective, waiting for other ranks?

        If the store's host is gone, this call may raise RuntimeError or never return, as every call of the store,
        whatever the client's timeout (seen in torch 2.13).
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
        """A sentence that says which rank the others wait for. silence: seconds without a heartbeat after which a rank
        counts as gone."""
        if self.ranks.world == 1:
            return "there are no other ranks"
        if now - self.heard > silence:
            return (
                f"the store at {self.address}, which the first host or its rank 0 holds, has not answered for "
                f"{now - self.heard:.0f} s: that host or process is stopped or gone, or the link to it is down"
            )
        quiet = [r for r, (_, when) in self.seen.items() if now - when > silence]
        busy = [r for r in self.last if r not in quiet and not self.last[r]["waiting"]]
        if quiet:
            return "; ".join(
                f"{self._name(r)} has sent nothing for {now - self.seen[r][1]:.0f} s: it was stopped, or its host or "
                f"the link to it is down; its last message was from step {self.last[r]['step']}"
                for r in quiet
            )
        if busy:
            return "; ".join(f"the others wait for {self._name(r)}, at {self.last[r]['doing']}" for r in busy)
        return "all ranks wait: a link between them may be down" if self.last else "see the other ranks' messages"

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self.last[rank]['host']} (process {self.last[rank]['pid']})"


class Watchdog:
    """Ends this process with exit code HUNG if no step completes for `limit` seconds, or if the run has not stopped
    `grace` seconds after it was asked to.

    run: the directory into which it then writes the stacks of all threads, as `hang-rank<rank>.txt`.
    timeout: seconds after which a collective fails; by then this rank must know which rank is at fault.
    Only time in which this process runs counts toward `limit`, so that a process continues after SIGSTOP and SIGCONT.
    """

    def __init__(
        self, ranks: Ranks, run: Path, limit: float, stop: StopRequest, timeout: float = 300.0, grace: float = 110.0
    ) -> None:
        self.ranks = ranks
        self.run = run
        self.limit = limit
        self.stop = stop
        self.grace = grace
        self.step = -1  # the last completed step
        self.age = 0.0  # seconds since it completed
        self.main = threading.get_ident()
        self.patience = min(limit, timeout) / 4  # seconds without a step after which it reads the others' heartbeats
        self.pause = min(self.patience / 2, 5.0)  # seconds between two heartbeats, and between two checks
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
        """Note that a step has completed."""
        self.step = step
        self.age = 0.0

    def close(self) -> None:
        """Stop watching. A thread that still waits for a store that is gone is not waited for."""
        self.closed.set()
        for thread in self.threads:
            thread.join(2 * self.pause)

    def suspects(self) -> str:
        """A sentence that says which rank the others wait for, by the heartbeats read so far."""
        return self.heartbeats.suspects(time.monotonic(), 4 * self.pause)

    def _write_heartbeats(self) -> None:
        """Runs in another thread than `_watch`, since a call of the store may never return."""
        while not self.closed.wait(self.pause):
            with suppress(RuntimeError):  # all errors of the store are RuntimeErrors
                self.heartbeats.say(self.step, *doing(self.main))
                if self.age > self.patience:
                    self.heartbeats.look(time.monotonic())
                else:
                    self.heartbeats.heard = time.monotonic()  # the store was not read, so it is not late

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
        with suppress(OSError):  # the reader of standard error may be gone
            print(
                f"rank {self.ranks.rank} on {host} ends itself at step {self.step + 1}, in {doing(self.main)[0]}: "
                f"{what}; {self.suspects()}; stacks in {path}",
                file=sys.stderr,
                flush=True,
            )
        os._exit(HUNG)


def doing(thread: int) -> tuple[str, bool]:
    """Where in our code a thread is, and whether it waits in a collective: `place` of the thread's stack."""
    return place(frames(sys._current_frames().get(thread)))


def frames(frame: FrameType | None) -> Iterator[tuple[str, str, int]]:
    """(file, function, line) of a stack, innermost first."""
    while frame is not None:
        yield frame.f_code.co_filename, frame.f_code.co_name, frame.f_lineno
        frame = frame.f_back


def place(stack: Iterator[tuple[str, str, int]]) -> tuple[str, bool]:
    """Our innermost function in a stack, with the collective that it called; and is there such a collective? As in
    ("all_reduce from sum_gradients (gan/ranks/gradients.py:67)", True).

    stack: (file, function, line) of each frame, innermost first.
    """
    called = ""  # the collective, once one is found
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
    """If a collective fails inside the block, raise PeerError. It names this rank and its host, says when (by `when()`)
    and where in our code the collective failed, and which rank may be at fault."""
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
