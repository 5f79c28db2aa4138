"""Processes that belong together: starting ranks by torchrun, ending with them, and stopping on the same word.

    python -m launch.ranks TORCHRUN_ARGUMENTS -m launch.train ...

is torchrun with what it lacks here: a signal that comes twice is one; the exit code is what the ranks left (0, 2, 3 or
75) and not 1; its own errors are one line with the remedy; on several hosts it finds addresses and interface by itself.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from gan.errors import UserError
from gan.ranks.signals import TOGETHER

ROOT = Path(__file__).resolve().parent.parent
PARENT = "SADDLE_PARENT"  # environment variable: the process that started this one and waits for it
ENDED = "SADDLE_ENDED"  # environment variable: the file in which ranks leave the code they end with on purpose
WORD = 20  # characters of that file
REJOIN = "SADDLE_REJOIN"  # environment variable: seconds that a host waits for the others after its ranks have ended
REACH = "SADDLE_REACH"  # environment variable: seconds that a host waits for the meeting point to be there
DEFAULTS = {
    # Else ranks that torchrun starts again look for each other where the old ones were (pytorch#135712).
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    # Time to finish a step and save, between a signal and SIGKILL; a scheduler's own must be longer.
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "120",
    REJOIN: "300",
    REACH: "60",
    # torch's C++ tells of every lost connection in forty lines; what ranks say of it themselves is one.
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "OMP_NUM_THREADS": "1",  # else torchrun sets it, with a warning; ranks set their threads later
}
STOPPED = 5.0  # seconds to let other hosts end too, after the ranks here stopped on purpose
AGAIN = "the same command goes on from the newest training state"
# How torchrun meets: the longest to wait for the fewest hosts, and from then on for more of them.
MEETING = "join_timeout=300,last_call_timeout=10"
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def call(command: list[str], ranks: int) -> int:
    """Run a command that starts `ranks` ranks, to its end. -> its exit code.

    Signals go on to it; a terminal's Ctrl-C reaches only us, so that it hears one and not two. It ends its ranks, then
    itself, and we wait for that.
    """
    with subprocess.Popen(command, env=environment(ranks), process_group=0) as child:
        before = {n: signal.signal(n, lambda number, _: child.send_signal(number)) for n in PASSED_ON}
        try:
            code = child.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def torchrun(ranks: int, module: str, arguments: list[str]) -> list[str]:
    """The command line that runs a module on so many local ranks, as launch/single_node.sh does."""
    start = [sys.executable, "-m", "launch.ranks", "--standalone", f"--nproc-per-node={ranks}"]
    return [*start, "-m", module, *arguments]


def end_with_parent() -> None:
    """If torchrun or `call` started this process: end when the parent does, however that ends. On Linux only.

    No rank may train on unseen, holding the run. It may finish its step and save: this comes as SIGTERM.
    """
    if "WORLD_SIZE" not in os.environ and os.environ.get(PARENT) != str(os.getppid()):
        return
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def environment(ranks: int) -> dict[str, str]:
    """For child processes: our packages first whatever the working directory holds, threads shared out."""
    from gan.ranks.distributed import cores

    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    ours = {"PYTHONSAFEPATH": "1", "PYTHONPATH": path, PARENT: str(os.getpid())}
    return {"OMP_NUM_THREADS": str(max(cores() // ranks, 1)), **os.environ, **ours}


def leave(word: int | str) -> bool:
    """Tell the launcher above this rank the exit code it ends with on purpose, or a word -> is there a launcher?

    One write of fixed length over what another rank left: a rank may be killed between any two calls, and a file that
    it had emptied would have lost that word.
    """
    if ENDED in os.environ:
        file = os.open(os.environ[ENDED], os.O_WRONLY | os.O_CREAT)
        os.write(file, f"{word:<{WORD}}".encode())
        os.close(file)
    return ENDED in os.environ


def endpoint(arguments: list[str]) -> tuple[str, int] | None:
    """(host, port) of `--rdzv-endpoint=HOST:PORT`. UserError unless the host has an address."""
    given = [a.partition("=")[2] for a in arguments if a.replace("_", "-").startswith("--rdzv-endpoint=")]
    if not given:
        return None
    host, _, port = given[-1].rpartition(":")
    try:
        return socket.gethostbyname(host), int(port)
    except OSError as error:
        raise UserError(f"--rdzv-endpoint={given[-1]}: {host} has no address ({error.strerror})") from None
    except ValueError:
        raise UserError(f"--rdzv-endpoint={given[-1]}: write HOST:PORT") from None


def addresses(arguments: list[str]) -> list[str]:
    """torchrun's flags for a meeting point on another host or this one, where they are not among the arguments: who
    holds its store, and by which address others reach us. Sets the interface for gloo and NCCL, unless set.

    torchrun itself compares names, and many hosts take their own for 127.0.0.1. Raises UserError with the remedy.
    """
    from gan.ranks.selftest import interface, local_address

    meeting = endpoint(arguments)
    if not meeting:
        return []
    host, port = meeting
    flags = {a.replace("_", "-").partition("=")[0]: a.partition("=")[2] for a in arguments if a.startswith("--")}
    ours = flags.get("--local-addr") or local_address(host)
    name = interface(ours)
    if not ours or ours.startswith("127.") or not name:
        raise UserError(
            f"{host} is reached from here by {ours or 'no address'}, where other hosts cannot answer: give the address "
            "of a network that they share in --rdzv-endpoint, or this host's in --local-addr"
        )
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(variable, name)
    # Debian gives a host its own name as 127.0.1.1.
    holds = host in (ours, "127.0.0.1", "127.0.1.1")
    if holds:
        check_port(host, port)
    else:
        check_reach(host, port, float(os.environ[REACH]))
    added = [] if "--local-addr" in flags else [f"--local-addr={ours}"]
    return added if "--rdzv-conf" in flags else [*added, f"--rdzv-conf=is_host={int(holds)},{MEETING}"]


def check_port(host: str, port: int) -> None:
    """Raises UserError where something listens there already."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(
                f"port {port} of {host} cannot be used ({error.strerror}): another job runs here, choose another port"
            ) from None


def check_reach(host: str, port: int, seconds: float) -> None:
    """Raises UserError where nothing listens for so long: torch would wait for minutes, and then not end."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=3).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
        if time.monotonic() > deadline:
            raise UserError(
                f"nothing answers at {host}:{port} for {seconds:g} s ({reason}): start the same command there, check "
                f"MASTER, PORT and the firewall; {REACH} is the time to wait"
            )
        time.sleep(1)


def raise_once(number: int, _: Any) -> None:
    """Signal handler: torchrun's way to pass a signal on to its ranks and end, once for several that come together. A
    later one is an order to end now: the ranks are killed."""
    from torch.distributed.elastic.multiprocessing.api import SignalException  # whole by now: `agent` imported it

    now, first = time.monotonic(), raise_once.first  # type: ignore[attr-defined]
    if first is not None and now - first < TOGETHER:
        return
    if first is None:
        raise_once.first = now  # type: ignore[attr-defined]
    else:
        for pid in children():
            os.kill(pid, signal.SIGKILL)
    raise SignalException(f"got {signal.Signals(number).name}", sigval=signal.Signals(number))


raise_once.first = None  # type: ignore[attr-defined]


def children() -> list[int]:
    """The processes that this one started and that have not ended. On Linux only; elsewhere none."""
    found = []
    for path in Path("/proc/self/task").glob("*/children"):
        for pid in path.read_text().split():
            with suppress(OSError):
                if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                    found.append(int(pid))
    return found


def end_when_left_alone(ended: Path) -> None:
    """End this launcher when it has had ranks and has none for REJOIN seconds; or for STOPPED seconds, where what they
    left in `ended` says that they stopped on purpose. On Linux only.

    torchrun waits for other hosts far longer than it says, and an outer scheduler must get its turn.
    """
    limit = float(os.environ[REJOIN])

    def watch() -> None:
        since = None
        while True:
            time.sleep(min(limit / 4, 1))
            now = time.monotonic()
            since = now if children() else since
            word = ended.read_text().strip()
            if since and word.isdigit() and int(word) and now - since > STOPPED:
                ended.unlink()
                os._exit(int(word))
            if since and now - since > limit:
                ended.unlink()
                tell(f"no ranks for {limit:g} s, the other hosts did not come back ({REJOIN}); {AGAIN}")
                os._exit(1)

    if list(Path("/proc/self/task").glob("*/children")):
        threading.Thread(target=watch, name="saddle-rejoin", daemon=True).start()


def tell(line: str) -> None:
    """One line of this host's launcher."""
    print(f"{socket.gethostname()}: {line}", file=sys.stderr, flush=True)


def agent(arguments: list[str]) -> int:
    """torchrun -> its exit code, its exceptions told in one line."""
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.run import main as run

    for number in PASSED_ON:
        signal.signal(number, raise_once)
    try:
        run(["--signals-to-handle=SIGQUIT", *addresses(arguments), *arguments])
        return 0
    except SignalException as stopped:
        return 128 + stopped.sigval
    except ChildFailedError as failed:
        code = failed.get_first_failure()[1].exitcode
        return code if code == 2 else 1
    except (RendezvousError, DistError) as error:
        where = next((a for a in arguments if "endpoint" in a), "the rendezvous")
        tell(
            f"{where} cannot be reached or did not answer: is the host that it names up, its launcher running, "
            f"the port open? ({' '.join(str(error).split())[:150]})"
        )
        return 2


def main() -> None:
    """torchrun, ending with its parent, and with the code that its ranks left."""
    end_with_parent()
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    with tempfile.NamedTemporaryFile(prefix="saddle-ended-") as ended:
        os.environ[ENDED] = ended.name
        end_when_left_alone(Path(ended.name))
        try:
            code = agent(sys.argv[1:])
        except UserError as error:
            print(f"launch.ranks: error: {error}", file=sys.stderr)
            sys.exit(2)
        word = ended.read().decode().strip()
    if word.isdigit():
        code = int(word)
    elif code == 2 and word:
        code = 1  # ranks had begun: nothing is wrong with the command
    elif code > 128:
        tell(f"stopped by a signal; {AGAIN}")
    sys.exit(code)


if __name__ == "__main__":
    main()
