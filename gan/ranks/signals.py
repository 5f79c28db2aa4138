"""Stopping on a signal: the first asks the run to finish its step and save, a second one ends the process at once."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PREEMPTED = 75  # exit code: stopped before its end, the state saved; EX_TEMPFAIL, "try again"
TOGETHER = 2.0  # seconds: a scheduler signals every process of a job and torchrun passes its own on, so one wish to
# stop arrives at a rank twice


@dataclass
class StopRequest:
    """The wish to stop. Set by the first signal, `by` its name."""

    by: str = ""
    when: float = field(default=0.0)

    def __bool__(self) -> bool:
        return bool(self.by)

    def hear(self, number: int, now: float) -> bool:
        """Take note of a signal at `now` seconds -> is it a second wish, and this process to end at once?"""
        if self.by:
            return now - self.when >= TOGETHER
        self.by, self.when = signal.Signals(number).name, now
        return False


@contextmanager
def listening() -> Iterator[StopRequest]:
    """Within the block, SIGTERM, SIGINT and SIGUSR1 set the request that is returned. Elsewhere than in the main thread
    nothing is heard.

    A thread listens: Python runs a signal's handler between two lines of the main thread, which may be waiting inside
    a collective for a rank that does not answer. Other threads and their reads go on undisturbed.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    thread = threading.Thread(target=_listen, args=(reader, request), name="saddle-signals", daemon=True)
    thread.start()
    handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
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
        if numbers[0] in SIGNALS and request.hear(numbers[0], time.monotonic()):
            print(f"stopped at once by {signal.Signals(numbers[0]).name}: nothing more is saved", file=sys.stderr)
            sys.stderr.flush()
            os._exit(128 + numbers[0])
