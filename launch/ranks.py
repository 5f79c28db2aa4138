"""Starting ranks by torchrun, passing signals on to them, and exiting with their exit code.

    python -m launch.ranks TORCHRUN_ARGUMENTS -m launch.train ...

runs torchrun and adds four things. Signals that arrive together count as one. The exit code is that of the ranks (0, 2,
3 or 75), where torchrun would exit with 1. torchrun's own errors become one line with the remedy. Addresses and network
interfaces are found, on one host (`--standalone`: loopback) and on several.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gan.errors import UserError
from gan.files import flush_output
from gan.ranks.signals import TOGETHER, not_ignored

ROOT = Path(__file__).resolve().parent.parent
# Environment variables.
PARENT = "SADDLE_PARENT"  # the process that started this one and waits for it
ENDED = "SADDLE_ENDED"  # the file into which ranks that end on purpose write their exit code
REJOIN = "SADDLE_REJOIN"  # seconds that a host waits for the others after its ranks have ended
REACH = "SADDLE_REACH"  # seconds that a host waits for the meeting point to answer

WORD = 20  # length of the file ENDED in characters
DEFAULTS = {
    # Otherwise restarted ranks find the addresses of the ranks before them (pytorch#135712).
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    # Seconds to finish a step and save, between a signal and SIGKILL; a scheduler's own grace must be longer.
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "120",
    REJOIN: "300",
    REACH: "60",
    # torch's C++ code prints forty lines about every lost connection; our ranks print one.
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "OMP_NUM_THREADS": "1",  # else torchrun sets it, with a warning; ranks set their threads later
}
STOPPED = 5.0  # seconds that the other hosts have to end, after this host's ranks ended on purpose
AGAIN = "the same command resumes from the newest training state, if one was saved"
STANDALONE = "--standalone"  # torchrun's flag for ranks that are all on this host
MEMORY = "memory"  # torchrun's name of our rendezvous for a launcher that is the only one
# Seconds that torchrun waits for the minimum number of hosts, and then for further ones.
MEETING = "join_timeout=300,last_call_timeout=10"


def call(command: list[str], ranks: int) -> int:
    """Run a command that starts `ranks` ranks, and wait for its end. -> its exit code.

    This process passes signals on to the command, and waits until its ranks and the command have ended. The command
    gets a process group of its own, so that a terminal's Ctrl-C reaches only this process and the command gets it once.
    """
    with subprocess.Popen(command, env=environment(ranks), process_group=0) as child:

        def pass_on(number: int, _: Any) -> None:
            child.send_signal(number)

        before = {number: signal.signal(number, pass_on) for number in not_ignored()}
        try:
            code = child.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def torchrun(ranks: int, module: str, arguments: list[str]) -> list[str]:
    """The command line that runs a module on `ranks` local ranks, as launch/single_node.sh does."""
    start = [sys.executable, "-m", "launch.ranks", "--standalone", f"--nproc-per-node={ranks}"]
    return [*start, "-m", module, *arguments]


def end_with_parent() -> None:
    """If torchrun or `call` started this process, let it get SIGTERM when its parent ends for any reason. Linux only.

    Otherwise a rank whose launcher was killed would go on training unnoticed, and keep its run locked.
    """
    if "WORLD_SIZE" not in os.environ and os.environ.get(PARENT) != str(os.getppid()):
        return
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def environment(ranks: int) -> dict[str, str]:
    """The environment for a command that starts `ranks` ranks: Python finds our packages before those of the working
    directory, and each rank gets an equal share of the threads."""
    from gan.ranks.distributed import cores

    users = os.environ.get("PYTHONPATH")
    return {
        "OMP_NUM_THREADS": str(max(cores() // ranks, 1)),
        **os.environ,
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{users}" if users else str(ROOT),
        PARENT: str(os.getpid()),
    }


def leave(word: int | str) -> bool:
    """Tell this rank's launcher, if there is one, with which exit code it ends on purpose, or a word. -> is there a
    launcher?

    One write of fixed length replaces what another rank wrote. A file that is emptied first could stay empty, since a
    rank may be killed between any two calls.
    """
    if ENDED in os.environ:
        file = os.open(os.environ[ENDED], os.O_WRONLY | os.O_CREAT)
        os.write(file, f"{word:<{WORD}}".encode())
        os.close(file)
    return ENDED in os.environ


def endpoint(arguments: list[str]) -> tuple[str, int] | None:
    """(IPv4 address, port) of `--rdzv-endpoint=HOST:PORT`, None without that flag. Raises UserError if the host has no
    address."""
    given = [a.partition("=")[2] for a in arguments if says_endpoint(a)]
    if not given:
        return None
    host, _, port = given[-1].rpartition(":")
    try:
        return socket.gethostbyname(host), int(port)
    except OSError as error:
        raise UserError(f"--rdzv-endpoint={given[-1]}: {host} has no address ({error.strerror})") from None
    except ValueError:
        raise UserError(f"--rdzv-endpoint={given[-1]}: write HOST:PORT") from None


def says_endpoint(argument: str) -> bool:
    """Is this argument of torchrun `--rdzv-endpoint=...`?"""
    return argument.replace("_", "-").startswith("--rdzv-endpoint=")


def addresses(arguments: list[str]) -> list[str]:
    """torchrun's arguments, with flags added that say where ranks meet, which host holds the store, and at which
    address others reach this host. Also sets the network interface for gloo and NCCL, unless it is set.

    torchrun itself compares the names of hosts, but many hosts resolve their own name to 127.0.0.1, or not at all.
    Raises UserError with the remedy.
    """
    if STANDALONE in arguments:
        return on_this_host([argument for argument in arguments if argument != STANDALONE])
    meeting = endpoint(arguments)
    return on_several_hosts(arguments, *meeting) if meeting else arguments


def on_this_host(arguments: list[str]) -> list[str]:
    """The flags for which torchrun's `--standalone` stands, except that the launcher, the only one, meets itself in its
    own memory. torchrun would listen at all addresses of this host, and load pickles from whoever reaches that port."""
    from torch.distributed.elastic.rendezvous import rendezvous_handler_registry

    from gan.ranks.distributed import LOOPBACK, use_loopback

    use_loopback()
    rendezvous_handler_registry.register(MEMORY, meet_in_memory)
    meeting = [f"--rdzv-backend={MEMORY}", f"--rdzv-endpoint={LOOPBACK}", f"--rdzv-id={uuid.uuid4()}"]
    return [*meeting, f"--local-addr={LOOPBACK}", *arguments]


def meet_in_memory(parameters: Any) -> Any:
    """torchrun's own rendezvous, with a store in this process's memory. parameters: torchrun's RendezvousParameters."""
    from torch.distributed import HashStore
    from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

    class Backend(C10dRendezvousBackend):
        name = MEMORY  # torchrun compares it with --rdzv-backend

    store = HashStore()
    return create_handler(store, Backend(store, parameters.run_id), parameters)


def on_several_hosts(arguments: list[str], host: str, port: int) -> list[str]:
    """torchrun's arguments with the flags for a meeting point at host:port. If that is this host, its store listens
    from now on, at this host's address only (see `gan.ranks.distributed.listen`)."""
    from gan.ranks.selftest import interface, local_address

    flags = {a.replace("_", "-").partition("=")[0]: a.partition("=")[2] for a in arguments if a.startswith("--")}
    ours = flags.get("--local-addr") or local_address(host)
    name = interface(ours)
    if not ours or ours.startswith("127.") or not name:
        raise UserError(
            f"this host reaches {host} from {ours or 'no address'}, where other hosts cannot answer: give the address "
            "of a network that they share in --rdzv-endpoint, or this host's in --local-addr"
        )
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(variable, name)
    # On Debian a host's own name resolves to 127.0.1.1.
    holds = host in (ours, "127.0.0.1", "127.0.1.1")
    added = [] if "--local-addr" in flags else [f"--local-addr={ours}"]
    added += [] if "--rdzv-conf" in flags else [f"--rdzv-conf=is_host={int(holds)},{MEETING}"]
    if not holds:
        check_reach(host, port, float(os.environ[REACH]))
        return [*added, *arguments]
    stores.append(hold_store(ours, port))
    # Here the host's own name may mean 127.0.1.1, where the store does not listen.
    return [*added, *(f"--rdzv-endpoint={ours}:{port}" if says_endpoint(a) else a for a in arguments)]


stores: list[Any] = []  # the store that this launcher holds, until it ends


def hold_store(address: str, port: int) -> Any:
    """A store that listens at this address. Raises UserError if another process does so."""
    from gan.ranks.distributed import listen

    try:
        return listen(address, port)
    except OSError as error:
        raise UserError(
            f"port {port} of {address} cannot be used ({error.strerror}): another job runs here, choose another port"
        ) from None


def check_reach(host: str, port: int, seconds: float) -> None:
    """Raises UserError if nothing answers at this address for so many seconds. torch itself would wait for minutes, and
    then not end."""
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
    """Signal handler that raises torchrun's SignalException: torchrun then passes the signal on to its ranks and ends.
    It is raised once for several signals that arrive together. At a later one this handler kills the ranks."""
    # `agent` has imported this before: a handler that runs during an import could get an incomplete module.
    from torch.distributed.elastic.multiprocessing.api import SignalException

    now = time.monotonic()
    first = raise_once.first  # type: ignore[attr-defined]
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
    """The ids of this process's children that have not ended. On Linux only; elsewhere none."""
    found = []
    for path in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):  # the thread has ended meanwhile
            found += [int(pid) for pid in path.read_text().split() if not _has_ended(pid)]
    return found


def _has_ended(pid: str) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state == "Z"  # a zombie: it has ended, and its parent has not asked for its exit code


@contextmanager
def end_when_left_alone(ended: Path) -> Iterator[None]:
    """Within the block, end this launcher if its ranks have been gone for REJOIN seconds; or for STOPPED seconds, if
    they wrote into the file `ended` that they stopped on purpose. On Linux only.

    torchrun waits for other hosts much longer than its time limits, but the scheduler must be able to restart the job.
    """
    closed = threading.Event()
    thread = threading.Thread(target=_watch_ranks, args=(ended, closed), name="saddle-rejoin", daemon=True)
    if list(Path("/proc/self/task").glob("*/children")):
        thread.start()
    try:
        yield
    finally:
        closed.set()
        if thread.is_alive():
            thread.join()  # it reads the file `ended`, which the caller removes next


def _watch_ranks(ended: Path, closed: threading.Event) -> None:
    limit = float(os.environ[REJOIN])
    since = None  # when ranks were last seen
    while not closed.wait(min(limit / 4, 1)):
        now = time.monotonic()
        if children():
            since = now
        if since is None:
            continue
        word = ended.read_text().strip()
        if word.isdigit() and int(word) and now - since > STOPPED:
            ended.unlink()
            os._exit(int(word))
        if now - since > limit:
            ended.unlink()
            tell(f"no ranks for {limit:g} s ({REJOIN}), as the other hosts did not come back; {AGAIN}")
            os._exit(1)


def tell(line: str) -> None:
    """Print a line with this host's name on standard error, if that is still open."""
    with suppress(OSError):
        print(f"{socket.gethostname()}: {line}", file=sys.stderr, flush=True)


def agent(arguments: list[str]) -> int:
    """Run torchrun. -> its exit code. Its exceptions become one line each."""
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.run import main as run

    numbers = not_ignored()
    for number in numbers:
        signal.signal(number, raise_once)
    try:
        run(["--signals-to-handle=SIGQUIT", *addresses(arguments)])
        return 0
    except SignalException as stopped:
        return 128 + stopped.sigval
    except ChildFailedError as failed:
        code = failed.get_first_failure()[1].exitcode
        return code if code == 2 else 1
    except (RendezvousError, DistError) as error:
        where = next((a for a in arguments if "endpoint" in a), "the rendezvous")
        tell(
            f"{where} cannot be reached or did not answer: check that this host is up, that its launcher runs and that "
            f"the port is open ({' '.join(str(error).split())[:150]})"
        )
        return 2
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)  # torchrun has ended; a late signal must not change the exit code


def main() -> None:
    """Run torchrun, end when the parent process does, and exit with the code that the ranks wrote."""
    end_with_parent()
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    with tempfile.NamedTemporaryFile(prefix="saddle-ended-") as ended:
        os.environ[ENDED] = ended.name
        try:
            with end_when_left_alone(Path(ended.name)):
                code = agent(sys.argv[1:])
        except UserError as error:
            print(f"launch.ranks: error: {error}", file=sys.stderr)
            sys.exit(2)
        word = ended.read().decode().strip()
    if word.isdigit():
        code = int(word)
    elif code == 2 and word:
        code = 1  # ranks had started, so that the command itself is not wrong
    elif code > 128:
        tell(f"stopped by a signal; {AGAIN}")
    flush_output()  # torchrun may have written to a terminal that is closed
    sys.exit(code)


if __name__ == "__main__":
    main()
