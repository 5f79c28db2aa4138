"""Stopping on a signal: at the first one the run finishes its step and saves; a later one ends the process at once."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
PREEMPTED = 75  # exit code: stopped before its end, the state saved; EX_TEMPFAIL, "try again"
# Seconds within which several signals count as one request: a scheduler signals every process of a job, and torchrun
# passes its own signal on to its ranks, so a rank gets two signals for one request.
TOGETHER = 2.0


def not_ignored() -> list[signal.Signals]:
    """The SIGNALS that this process does not ignore.

    Under `nohup` a command ignores SIGHUP, to outlive its terminal, and a shell script's background commands ignore
    SIGINT. If we set a handler for these signals, they would stop the process after all.
    """
    return [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


@dataclass
class StopRequest:
    """A request to stop, set by the first signal. by: the signal's name, "" before it. when: its time.monotonic()."""

    by: str = ""
    when: float = field(default=0.0)

    def __bool__(self) -> bool:
        return bool(self.by)

    def hear(self, number: int, now: float) -> bool:
        """Note a signal that arrived at `now` seconds. -> is it a second request, which ends this process at once?"""
        if self.by:
            return now - self.when >= TOGETHER
        self.when = now  # before `by`, as another thread may read both as soon as `by` is set
        self.by = signal.Signals(number).name
        return False


@contextmanager
def listening() -> Iterator[StopRequest]:
    """Within the block, each of SIGNALS sets the request that is returned, except signals that this process ignores.

    A thread receives them: Python runs a signal's handler between two instructions of the main thread, which may be
    waiting inside a collective for a rank that does not answer. Handlers can be set in the main thread only, so a block
    that runs in another thread gets no signals.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    thread = threading.Thread(target=_listen, args=(reader, request), name="saddle-signals", daemon=True)
    thread.start()
    handlers = {number: signal.signal(number, lambda *_: None) for number in not_ignored()}
    old = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield request
    finally:
        signal.set_wakeup_fd(old)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(writer)
        thread.join()
        os.close(reader)


def _listen(reader: int, request: StopRequest) -> None:
    while numbers := os.read(reader, 1):
        number = numbers[0]
        if number not in SIGNALS:
            continue
        if number == signal.SIGHUP:
            sys.stdout = LossyOutput(sys.stdout)
            sys.stderr = LossyOutput(sys.stderr)
        if request.hear(number, time.monotonic()):
            with suppress(OSError):  # the reader of standard error may be gone
                print(f"stopped at once by {signal.Signals(number).name}, without saving again", file=sys.stderr)
                sys.stderr.flush()
            os._exit(128 + number)


class LossyOutput:
    """A text stream that ignores errors of writing.

    SIGHUP means that the terminal was closed. A run that prints its next status line to that terminal, or to a `tee`
    that ended with it, would otherwise fail before its state is saved.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write the text if possible."""
        with suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush if possible."""
        with suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
