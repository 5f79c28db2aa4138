"""Processes that belong together: starting local ranks, ending with them, and stopping on the same word."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gan.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
PARENT = "SADDLE_PARENT"  # environment variable: the process that started this one and waits for it


def call(command: list[str], ranks: int) -> int:
    """Run a command that starts `ranks` ranks, to its end. -> its exit code.

    SIGTERM goes on to it; Ctrl-C has reached it already. It ends its ranks, then itself, and we wait for that.
    """
    with subprocess.Popen(command, env=environment(ranks)) as child:
        before = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
        try:
            while True:
                try:
                    return child.wait()
                except KeyboardInterrupt:
                    continue
        finally:
            signal.signal(signal.SIGTERM, before)


def torchrun(ranks: int, module: str, arguments: list[str]) -> list[str]:
    """The command line that runs a module on so many local ranks: torchrun, but this module lets it end with us."""
    start = [sys.executable, "-m", "launch.ranks", "--standalone", f"--nproc-per-node={ranks}"]
    return [*start, "-m", module, *arguments]


def end_with_parent() -> None:
    """If torchrun or `call` started this process: end when the parent does, however that ends. On Linux only.

    No rank may train on unseen, holding the run.
    """
    if "WORLD_SIZE" not in os.environ and os.environ.get(PARENT) != str(os.getppid()):
        return
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def environment(ranks: int) -> dict[str, str]:
    """For child processes: our packages first whatever the working directory holds, threads shared out."""
    from gan.distributed import cores

    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    ours = {"PYTHONSAFEPATH": "1", "PYTHONPATH": path, PARENT: str(os.getpid())}
    return {"OMP_NUM_THREADS": str(max(cores() // ranks, 1)), **os.environ, **ours}


def on_first(ranks: Any, function: Callable[[], Any]) -> Any:
    """What it returns on rank 0, or the UserError it raises there, on every rank: they stop together or not at all."""
    from gan.distributed import from_first

    result = None
    if ranks.first:
        try:
            result = function()
        except UserError as error:
            result = error
    result = from_first(result)
    if isinstance(result, UserError):
        raise result
    return result


def main() -> None:
    """torchrun, ending with its parent, and quietly where a signal ends it."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.run import main as run

    end_with_parent()
    try:
        run()
    except SignalException as stopped:
        print("stopped by a signal; the same command goes on from the newest training state", file=sys.stderr)
        sys.exit(128 + stopped.sigval)


if __name__ == "__main__":
    main()
