"""A piece of work in a forked process, for what may end it by a signal or never end."""

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any


def forked(work: Callable[[], Any], seconds: int = 60) -> Any:
    """The result of `work`, which JSON can hold; "died of SIGNAL", SIGALRM after so many seconds; or a traceback."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(read)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)
        try:
            result = work()
        except BaseException:
            result = traceback.format_exc()
        with os.fdopen(write, "w") as file:
            json.dump(result, file)
        sys.stdout.flush()
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        text = file.read()
    _, status = os.waitpid(pid, 0)
    return json.loads(text) if text else f"died of {signal.Signals(os.WTERMSIG(status)).name}"
