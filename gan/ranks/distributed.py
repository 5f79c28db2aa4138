"""`torch.distributed` under `torchrun`: joining the group, each rank's share, and what must be equal on all ranks."""

import os
import re
import socket
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.rendezvous import rendezvous

from gan.errors import EverywhereError, UserError
from gan.ranks.selftest import interface

LOOPBACK = "127.0.0.1"
CPU = torch.device("cpu")
MEETING = timedelta(minutes=10)  # the longest to wait for other ranks: their host may still be compiling the ops


@dataclass(frozen=True)
class Ranks:
    """This process's rank, the number of ranks, and this rank's device."""

    rank: int = 0
    world: int = 1
    device: torch.device = CPU

    @property
    def first(self) -> bool:
        """Is this rank 0, which writes files and logs?"""
        return self.rank == 0


def start(timeout: float = 300.0, check: Callable[[Any, int, int], Any] | None = None) -> Ranks:
    """Join the process group that torchrun's environment variables describe, by NCCL on GPUs and gloo on CPUs. Without
    these variables, this process is the only rank.

    timeout: the longest that a collective may take, in seconds, once all ranks have met; for that they have MEETING.
    check: called with (store, rank, world) before there are collectives.
    """
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "WORLD_SIZE" not in os.environ:
        return Ranks(device=device)
    if os.environ["WORLD_SIZE"] == os.environ.get("LOCAL_WORLD_SIZE"):
        os.environ["MASTER_ADDR"] = LOOPBACK  # torchrun sets this host's name, which may not resolve
        use_loopback()
    listening = listen_as_first_rank()  # kept until `rendezvous` has made the store that uses it
    store, rank, world = next(rendezvous("env://", timeout=MEETING))
    del listening
    if check:
        check(store, rank, world)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=MEETING)
    sum_over_ranks(torch.zeros(1, device=device))  # after this sum all ranks have met; now the shorter timeout holds
    _set_pg_timeout(timedelta(seconds=timeout))
    return Ranks(rank, world, device)


def use_loopback() -> None:
    """Let gloo and NCCL listen at the loopback interface only, for ranks that are all on this host: their sockets ask
    nobody for a password. Raises UserError if the loopback interface is down."""
    name = interface(LOOPBACK)
    if name:
        os.environ["GLOO_SOCKET_IFNAME"] = name
        os.environ["NCCL_SOCKET_IFNAME"] = name
    elif sys.platform == "linux":  # elsewhere `interface` finds none
        raise UserError(f"no network interface has the address {LOOPBACK}, where ranks meet: run ip link set lo up")


def listen(address: str, port: int) -> dist.TCPStore:
    """The server of a store, which listens at one IPv4 address of this host. Raises OSError if that is not possible.

    TCPStore itself listens at all addresses of a host. A TCPStore that this process makes for the same port with
    `multi_tenant` uses this server while it exists, and then keeps it; torchrun and `rendezvous` make such stores.
    """
    server = socket.create_server((address, port))
    port = server.getsockname()[1]
    return dist.TCPStore(
        address, port, is_master=True, wait_for_workers=False, multi_tenant=True, master_listen_fd=server.detach()
    )


def listen_as_first_rank() -> dist.TCPStore | None:
    """On rank 0, if it holds the store of the ranks: `listen` at the address that our launcher gives. Else None, as
    under a torchrun that was started without us: it gives a name, which need not be that of an address of this host.

    Raises UserError if rank 0 cannot listen there.
    """
    address = os.environ["MASTER_ADDR"]
    held_by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if os.environ["RANK"] != "0" or held_by_torchrun or not re.fullmatch(r"[\d.]+", address):
        return None
    try:
        return listen(address, int(os.environ["MASTER_PORT"]))
    except OSError as error:
        raise UserError(
            f"ranks cannot meet at {address}:{os.environ['MASTER_PORT']} ({error.strerror}): start the same command "
            "again, or give another --local-addr"
        ) from error


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def end_rank(code: int = 0) -> None:
    """End this process, a rank that is done, by os._exit, without the interpreter's shutdown.

    During the shutdown some ranks aborted ("terminate called without an active exception", in 1 of 5 and 4 of 8 runs of
    three ranks on two cores, with no Python frame left), and torchrun then ends the other ranks too.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def check_devices(local_ranks: int) -> None:
    """Raises UserError if a host has GPUs, but fewer than ranks. A host without GPUs may have any number of ranks."""
    count = torch.cuda.device_count()
    if 0 < count < local_ranks:
        raise UserError(f"{local_ranks} ranks on this host but {count} GPUs; start {count} ranks")


def cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_threads(threads: int) -> int:
    """Set the number of intra-op threads, 0 for an equal share of the cores of rank 0's host. -> the number set.

    The rounding of sums depends on this number, so all ranks use the same one, and training states record it.
    """
    threads = from_first(threads or max(cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1))
    torch.set_num_threads(threads)
    return threads


def set_precision(ranks: Ranks, deterministic: bool) -> None:
    """On CUDA: allow tf32 products, and use deterministic algorithms if `deterministic`. On a CPU: let denormals, which
    are numbers too small for all their digits (below 1.2e-38 in float32), be 0.

    A processor computes with denormals a hundred times more slowly, and the gradients of importance weights are full of
    them: a step of an IWAE of 50 samples took 1.29 s with them and .15 s without. Threads take this setting from the
    one that starts them, so call this before torch's first large operation.
    """
    torch.set_flush_denormal(True)
    if ranks.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(deterministic)


def share(count: int, ranks: Ranks) -> range:
    """The indices of the blocks, of a batch's `count`, that this rank computes. Shares differ by at most one block.

    Raises UserError if there are more ranks than blocks.
    """
    if ranks.world > count:
        raise UserError(
            f"{ranks.world} ranks but only {count} coupling groups in a batch; raise the batch, lower "
            f"distributed.group or use at most {count} ranks"
        )
    return range(count * ranks.rank // ranks.world, count * (ranks.rank + 1) // ranks.world)


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum a tensor over all ranks, in place, and return it. A process that is the only rank changes nothing."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def least_over_ranks(value: int, ranks: Ranks) -> int:
    """The smallest of all ranks' values."""
    least = torch.tensor(value, device=ranks.device)
    if ranks.world > 1:
        dist.all_reduce(least, dist.ReduceOp.MIN)
    return int(least)


def fingerprint(tensors: Iterable[Tensor]) -> Tensor:
    """A weighted sum of the bits of all tensors, int64 [1], on their device: changing one bit changes the sum."""
    total: Tensor | int = 0
    for weight, tensor in enumerate(tensors):
        bits = tensor.detach().view(torch.int64 if tensor.element_size() == 8 else torch.int32)
        total = total + (2 * weight + 1) * bits.sum(dtype=torch.int64)
    return torch.as_tensor(total).view(1)


def find_strangers(value: Tensor, ranks: Ranks) -> list[int]:
    """The ranks whose `value`, int64 [1], differs from the most frequent one; in a tie, from that of the lowest rank.
    All ranks get the same answer."""
    if ranks.world == 1:
        return []
    gathered = [torch.empty_like(value) for _ in range(ranks.world)]
    dist.all_gather(gathered, value)
    values = torch.cat(gathered).tolist()
    usual = max(values, key=values.count)
    return [rank for rank, other in enumerate(values) if other != usual]


def same_on_all(what: str, value: Any) -> Any:
    """Return `value` if it is the same on all ranks. Otherwise all ranks raise UserError, which names the first rank
    that differs from rank 0."""
    if dist.is_initialized():
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise UserError(f"rank {rank} has {what} {other!r} and rank 0 has {values[0]!r}: make them the same")
    return value


def from_first(value: Any) -> Any:
    """Return rank 0's `value` on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_first(ranks: Ranks, function: Callable[[], Any]) -> Any:
    """Call a function on rank 0 and return its result on every rank. If it raises UserError, every rank raises
    EverywhereError, so that all ranks stop together."""
    result = None
    if ranks.first:
        try:
            result = function()
        except UserError as error:
            result = error
    result = from_first(result)
    if isinstance(result, UserError):
        raise EverywhereError(str(result))
    return result
