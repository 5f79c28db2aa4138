"""Two hosts on one machine: network namespaces joined by a cable that can be cut, each with a name of its own."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAMES, NETWORK = ("nodea", "nodeb"), "10.77.0"


def why_not() -> str:
    """Why there can be no such hosts here, or nothing."""
    if sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
        return "needs Linux, root, ip and unshare"
    trial = f"saddle-trial-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", trial], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", trial], capture_output=True)
    return made.stderr.strip()


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, timeout=20)


def family(pid: int) -> list[int]:
    """A process and all below it, by what /proc says."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended meanwhile
        if fields[0] != "Z":
            parents[int(stat.parent.name)] = int(fields[1])
    found, last = {pid} & parents.keys(), set()
    while found != last:
        last, found = found, found | {p for p, parent in parents.items() if parent in found}
    return sorted(found)


def ranks_of(pid: int) -> dict[int, int]:
    """{rank: process} of the ranks below a launcher, by the environment they were started with."""
    found = {}
    for p in family(pid):
        try:
            variables = Path(f"/proc/{p}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        rank = [v.removeprefix(b"RANK=") for v in variables if v.startswith(b"RANK=")]
        if rank:
            found[int(rank[0])] = p
    return found


def listens(pids: list[int]) -> set[str]:
    """The IP addresses at which these processes listen for TCP, each seen from its own network namespace."""
    found = set()
    for pid in pids:
        sockets = set()
        for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
            with suppress(OSError):  # closed meanwhile
                sockets.add(os.readlink(descriptor))
        for name, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
            with suppress(OSError):
                for row in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
                    fields = row.split()
                    if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:  # 0A: listening
                        words = bytes.fromhex(fields[1].partition(":")[0])
                        groups = [words[i : i + 4][::-1] for i in range(0, len(words), 4)]
                        found.add(socket.inet_ntop(family, b"".join(groups)))
    return found


def kill(pids: list[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def wait_until(condition, seconds: float, what: str = "it") -> float:
    """-> how long it took."""
    begin = time.time()
    while not condition():
        assert time.time() - begin < seconds, f"{what} did not happen in {seconds} s"
        time.sleep(0.05)
    return time.time() - begin


class Hosts:
    """Started processes are killed, with all below them, when `two_hosts` ends."""

    def __init__(self, folder: Path):
        self.folder, self.tag, self.started = folder, f"s{os.getpid() % 100000}", []
        self.spaces = [f"{self.tag}-{name}" for name in NAMES]
        self.cables = [f"{self.tag}v{i}" for i in range(2)]
        (folder / "hosts").write_text(
            "127.0.0.1 localhost\n" + "".join(f"{NETWORK}.{i + 1} {name}\n" for i, name in enumerate(NAMES))
        )

    def build(self) -> None:
        for space in self.spaces:
            ip("netns", "add", space)
        (a, b), (va, vb) = self.spaces, self.cables
        ip("link", "add", va, "netns", a, "type", "veth", "peer", "name", vb, "netns", b)
        for i, (space, cable) in enumerate(zip(self.spaces, self.cables, strict=True)):
            ip("-n", space, "addr", "add", f"{NETWORK}.{i + 1}/24", "dev", cable)
            ip("-n", space, "link", "set", "lo", "up")
            ip("-n", space, "link", "set", cable, "up")

    def cable(self, state: str) -> None:
        """up | down"""
        ip("-n", self.spaces[0], "link", "set", self.cables[0], state)

    def start(self, host: int, command: list[str], log: Path, env: dict[str, str] | None = None) -> subprocess.Popen:
        inside = f'hostname {NAMES[host]}; mount --bind {self.folder}/hosts /etc/hosts; exec "$@"'
        wrapped = ["ip", "netns", "exec", self.spaces[host], "unshare", "--uts", "--mount", "sh", "-c", inside, "sh"]
        base = {k: v for k, v in os.environ.items() if k not in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}
        env = {**base, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **(env or {})}
        with log.open("a") as file:
            process = subprocess.Popen([*wrapped, *command], env=env, stdout=file, stderr=subprocess.STDOUT)
        self.started.append(process)
        return process

    def lose(self, process: subprocess.Popen) -> None:
        """The host of a launcher is gone: it, its ranks, at once."""
        kill(family(process.pid))
        process.wait(timeout=30)

    def end(self) -> None:
        for process in self.started:
            if process.poll() is None:
                self.lose(process)
        for space in self.spaces:
            subprocess.run(["ip", "netns", "del", space], capture_output=True)


@contextmanager
def two_hosts(folder: Path) -> Iterator[Hosts]:
    hosts = Hosts(folder)
    try:
        hosts.build()
        yield hosts
    finally:
        hosts.end()
