"""A test before ranks train together: do they run the same code on the same task, and can they reach each other?

They exchange this through the store of their rendezvous, before they use collectives, since collectives of different
versions of torch may not work together.
"""

import hashlib
import json
import os
import platform
import socket
import struct
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy
import torch

from gan.errors import EverywhereError, PeerError, UserError

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("gan", "ops", "data", "launch")
SUFFIXES = {".py", ".cpp", ".cu", ".h", ".cuh", ".toml"}


def versions() -> dict[str, str]:
    """The versions that must be the same on all ranks, for any task."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "code of Saddlepoint": code_hash()[:16],
    }


def code_hash() -> str:
    """SHA-256 over the names and contents of our packages' source files."""
    total = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*")):
            if path.suffix in SUFFIXES:
                total.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return total.hexdigest()


def compare(store: Any, rank: int, world: int, mine: Mapping[str, Any], refusal: str, seconds: float) -> list[str]:
    """Send this rank's values to all ranks, and compare theirs. -> the names of all hosts, by rank.

    mine: name -> plain value that must be the same on all ranks. refusal: why this rank cannot train, or "".
    Raises EverywhereError, which names the first rank that refuses or differs, its host and the differences;
    PeerError if a rank has not arrived after `seconds`.
    """
    host = socket.gethostname()
    store.set(f"selftest/{rank}", json.dumps({"host": host, "mine": dict(mine), "refusal": refusal}))
    rows: list[dict[str, Any]] = []
    for peer in range(world):
        try:
            store.wait([f"selftest/{peer}"], timedelta(seconds=seconds))
            rows.append(json.loads(store.get(f"selftest/{peer}")))
        except RuntimeError as error:
            known = ", ".join(f"rank {r} on {row['host']}" for r, row in enumerate(rows)) or "none"
            reason = str(error).partition(". ")[0].splitlines()[0]
            raise PeerError(
                f"rank {rank} on {host}: rank {peer} did not arrive within {seconds:g} s, or the store is gone "
                f"(arrived: {known}; {reason})"
            ) from error
    store.set(f"selftest/heard/{rank}", "")
    if rank == 0:  # its process may hold the store, and must not end before all ranks have read it
        with suppress(RuntimeError):
            store.wait([f"selftest/heard/{peer}" for peer in range(world)], timedelta(seconds=30))
    for peer, row in enumerate(rows):
        if row["refusal"]:
            others = all(other["refusal"] == row["refusal"] for other in rows)
            raise EverywhereError(row["refusal"] if others else f"rank {peer} on {row['host']}: {row['refusal']}")
    for peer, row in enumerate(rows):
        theirs = row["mine"]
        ours = rows[0]["mine"]
        names = [name for name in {**ours, **theirs} if theirs.get(name) != ours.get(name)]
        if names:
            told = ", ".join(f"{name} {theirs.get(name)} instead of {ours.get(name)}" for name in names[:4])
            raise EverywhereError(
                f"rank {peer} on {row['host']} differs from rank 0 on {rows[0]['host']}: {told}; make them the same"
            )
    return [row["host"] for row in rows]


def check_address(world: int, local_world: int) -> None:
    """Raises UserError if there are several hosts and gloo would tell the others that this host is 127.0.0.1."""
    if world == local_world or os.environ.get("GLOO_SOCKET_IFNAME"):
        return
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
    except OSError:
        address = "nothing"
    if address == "nothing" or address.startswith("127."):
        master = os.environ.get("MASTER_ADDR", "")
        raise UserError(
            f"{host} resolves to {address}, where ranks on other hosts cannot reach it: export "
            f"GLOO_SOCKET_IFNAME={interface(local_address(master)) or '<interface>'} (launch/multi_node.sh does)"
        )


def local_address(other: str) -> str:
    """The IPv4 address from which this host reaches another one, "" if there is no route. Sends nothing."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((other, 9))
            return probe.getsockname()[0]
    except OSError:
        return ""


def interface(address: str) -> str:
    """The network interface that has an IPv4 address, "" if none has. On Linux only."""
    try:
        import fcntl
    except ImportError:
        return ""
    get_address = 0x8915  # SIOCGIFADDR
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                reply = fcntl.ioctl(probe, get_address, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # this interface has no IPv4 address
            if socket.inet_ntoa(reply[20:24]) == address:
                return name
    return ""
