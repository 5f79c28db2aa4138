"""Where the processes of a run listen, from its first moment to its last."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hosts import ROOT, family, kill, listens
from torch.distributed.rendezvous import rendezvous

from data.prepare import prepare
from gan.errors import UserError
from gan.ranks.distributed import listen_as_first_rank
from gan.ranks.selftest import interface, local_address
from launch.ranks import environment, hold_store

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
FLAGS = [
    *("--preset=digits", "--batch=16", "--tick=0.16", "--set=growth.mode=none", "--kimg=0.64"),
    *("--set=run.threads=1", "--set=network.widths=[8,8]", "--set=network.z_dim=8"),
]
COMMANDS = {
    "train --gpus=2": [sys.executable, "-m", "launch.train", "--gpus=2"],
    "single_node.sh": [str(ROOT / "launch" / "single_node.sh")],
}


def watched(process: subprocess.Popen) -> set[str]:
    """The addresses at which a process and all below it ever listened, until it ends."""
    seen: set[str] = set()
    deadline = time.monotonic() + 400
    try:
        while process.poll() is None and time.monotonic() < deadline:
            seen |= listens(family(process.pid))
            time.sleep(0.2)
    finally:
        kill(family(process.pid))
    return seen


def test_listening_sockets_are_found_at_the_addresses_of_either_family():
    with socket.create_server(("127.0.0.3", 0)), socket.create_server(("::", 0), family=socket.AF_INET6):
        assert listens([os.getpid()]) >= {"127.0.0.3", "::"}


def test_a_store_listens_at_the_address_of_its_host_that_is_given(monkeypatch):
    """The launcher's store, and that of rank 0 with what torch then makes of the same port."""
    before = listens([os.getpid()])
    store = hold_store("127.0.0.5", 0)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.6")
    monkeypatch.setenv("MASTER_PORT", str(free_port("127.0.0.6")))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    held = listen_as_first_rank()
    theirs, _, _ = next(rendezvous("env://"))
    del held
    assert listens([os.getpid()]) - before == {"127.0.0.5", "127.0.0.6"}
    theirs.set("key", "value")
    assert store.port and theirs.get("key") == b"value"


def test_a_rank_that_cannot_listen_where_it_should_says_so(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(UserError, match=r"ranks cannot meet at 127.0.0.1:\d+ .*start the same command again"):
            listen_as_first_rank()
        monkeypatch.setenv("RANK", "1")
        assert listen_as_first_rank() is None


def free_port(address: str) -> int:
    with socket.create_server((address, 0)) as server:
        return server.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_on_one_host_nothing_listens_beyond_loopback(tmp_path: Path, name: str):
    prepare("digits", tmp_path / "digits.lmdb", resolution=(8, 8), max_images=100)
    command = [*COMMANDS[name], f"--data={tmp_path / 'digits.lmdb'}", f"--outdir={tmp_path / 'runs'}", *FLAGS]
    # As a cluster's profile may set it, for jobs on several hosts.
    outside = interface(local_address("198.51.100.1")) or "lo"
    wide = {"GLOO_SOCKET_IFNAME": outside, "RANKS": "2", "PYTHON": sys.executable}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment(2) | wide, stdout=log, stderr=subprocess.STDOUT)
    seen = watched(process)
    assert process.returncode == 0, (tmp_path / "log").read_text()
    assert seen == {"127.0.0.1"}  # the ranks' store, and gloo
