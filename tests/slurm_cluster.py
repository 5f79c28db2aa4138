"""A real Slurm of two nodes on one machine: network namespaces joined by a bridge, for the controller and the nodes.

All of its files are in one folder, with a munge of its own, so that a Slurm that runs here is not touched.
"""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from hosts import family, ip, kill, wait_until, why_not

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "nsenter")
NODES = ("n1", "n2")
NETWORK = "10.78.0"
CONFIGURATION = """
ClusterName=saddle
SlurmctldHost={host}({network}.254)
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdTimeout=20
KillWait=30
SchedulerParameters=sched_interval=5
NodeName=n1 NodeAddr={network}.1 CPUs=1
NodeName=n2 NodeAddr={network}.2 CPUs=1
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def why_no_slurm() -> str:
    """Why there can be no such cluster here, or nothing."""
    missing = [name for name in PROGRAMS if not shutil.which(name, path=PATH)]
    if missing:
        return f"needs {', '.join(missing)} (Debian: apt-get install slurmctld slurmd slurm-client munge)"
    return why_not()


PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"  # where Debian has the daemons


class Cluster:
    """Started processes are killed, with all below them, by `end`."""

    def __init__(self, folder: Path):
        self.folder = folder
        tag = f"s{os.getpid() % 100000}"
        self.spaces = {name: f"{tag}-{name}" for name in ("ctl", *NODES)}
        self.cables = {name: f"{tag}{name}" for name in NODES}
        self.started: dict[str, subprocess.Popen] = {}
        self.env = {**os.environ, "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf"), "PYTHON": sys.executable}
        self.env |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "RANKS": "1"}
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            self.env.pop(variable, None)

    def build(self) -> None:
        for space in self.spaces.values():
            ip("netns", "add", space)
            ip("-n", space, "link", "set", "lo", "up")
        control = self.spaces["ctl"]
        ip("-n", control, "link", "add", "bridge", "type", "bridge")
        ip("-n", control, "addr", "add", f"{NETWORK}.254/24", "dev", "bridge")
        ip("-n", control, "link", "set", "bridge", "up")
        for number, (node, cable) in enumerate(self.cables.items(), 1):
            space = self.spaces[node]
            ip("link", "add", cable, "netns", control, "type", "veth", "peer", "name", "eth0", "netns", space)
            ip("-n", control, "link", "set", cable, "master", "bridge", "up")
            ip("-n", space, "addr", "add", f"{NETWORK}.{number}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "eth0", "up")
        names = "".join(f"{NETWORK}.{number} {node}\n" for number, node in enumerate(NODES, 1))
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n{NETWORK}.254 {socket.gethostname()}\n{names}")
        text = CONFIGURATION.format(host=socket.gethostname(), network=NETWORK, folder=self.folder)
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "state").mkdir()
        (self.folder / "key").write_bytes(os.urandom(128))
        (self.folder / "key").chmod(0o600)
        files = {name: f"--{name}-file={self.folder}/{file}" for name, file in (("key", "key"), ("pid", "munge.pid"))}
        files |= {"log": f"--log-file={self.folder}/munge.log", "seed": f"--seed-file={self.folder}/seed"}
        self.start("munged", ["munged", "-F", "--force", f"--socket={self.folder}/munge.socket", *files.values()])
        wait_until((self.folder / "munge.socket").exists, 30, "munge's socket")
        self.start("slurmctld", [*self.inside("ctl"), "slurmctld", "-D"])
        for node in NODES:
            self.start_node(node)
        wait_until(self.is_idle, 120, "two idle nodes")

    def is_idle(self) -> bool:
        """Are both nodes there, and do nothing?"""
        return self.ask("sinfo", "-h", "-o", "%D %t").strip() == "2 idle"

    def inside(self, name: str) -> list[str]:
        """The words before a command that runs on a host. `ip netns exec` would hide cgroups in /sys from slurmd."""
        host = socket.gethostname() if name == "ctl" else name
        shell = f'hostname {host}; mount --bind {self.folder}/hosts /etc/hosts; exec "$@"'
        space = f"--net=/run/netns/{self.spaces[name]}"
        return ["nsenter", space, "unshare", "--uts", "--mount", "sh", "-c", shell, "sh"]

    def start(self, name: str, command: list[str]) -> None:
        with (self.folder / f"{name}.out").open("a") as file:
            self.started[name] = subprocess.Popen(command, env=self.env, stdout=file, stderr=subprocess.STDOUT)

    def start_node(self, node: str) -> None:
        (self.folder / f"spool-{node}").mkdir(exist_ok=True)
        self.start(node, [*self.inside(node), "slurmd", "-D", "-N", node])

    def ask(self, *command: str) -> str:
        """What one of Slurm's commands prints, "" while the controller does not answer."""
        done = subprocess.run([*self.inside("ctl"), *command], env=self.env, capture_output=True, text=True, timeout=60)
        return done.stdout

    def submit(self, *arguments: str, folder: Path) -> int:
        command = [*self.inside("ctl"), "sbatch", "--parsable", *arguments]
        done = subprocess.run(command, env=self.env, cwd=folder, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    def job(self, number: int | str) -> dict[str, str]:
        """What `scontrol show job` says of a job, or of a task of an array, as in "7_0"."""
        words = self.ask("scontrol", "show", "job", str(number)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def lose(self, node: str) -> None:
        """A node is gone: all processes in its network namespace, at once."""
        inside = subprocess.run(["ip", "netns", "pids", self.spaces[node]], capture_output=True, text=True).stdout
        kill([int(pid) for pid in inside.split()])
        self.started[node].wait(timeout=30)

    def end(self) -> None:
        for node in NODES:
            if node in self.started:
                self.lose(node)
        for process in self.started.values():
            kill(family(process.pid))
            process.wait(timeout=30)
        for space in self.spaces.values():
            subprocess.run(["ip", "netns", "del", space], capture_output=True)
