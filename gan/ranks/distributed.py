"""`torch.distributed` under `torchrun`: joining it, who computes what, and what all ranks must have the same."""

import os
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
    """This process among its peers."""

    rank: int = 0
    world: int = 1
    device: torch.device = CPU

    @property
    def first(self) -> bool:
        """Does this rank write files and speak?"""
        return self.rank == 0


def start(timeout: float = 300.0, check: Callable[[Any, int, int], Any] | None = None) -> Ranks:
    """Join the ranks that torchrun's environment variables describe, by NCCL on GPUs and gloo on CPUs; without them,
    be the only rank.

    timeout: the longest that a collective may take, in seconds, once all have met; they get MEETING to do so.
    check: called with (store, rank, world) before there are collectives.
    """
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "WORLD_SIZE" not in os.environ:
        return Ranks(device=device)
    if os.environ["WORLD_SIZE"] == os.environ.get("LOCAL_WORLD_SIZE"):
        os.environ["MASTER_ADDR"] = LOOPBACK  # torchrun says this host's name, which may not resolve
        use_loopback()
    store, rank, world = next(rendezvous("env://", timeout=MEETING))
    if check:
        check(store, rank, world)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=MEETING)
    sum_over_ranks(torch.zeros(1, device=device))  # now all have met, and must answer sooner from here on
    _set_pg_timeout(timedelta(seconds=timeout))
    return Ranks(rank, world, device)


def use_loopback() -> None:
    """Let gloo and NCCL talk over the loopback interface, unless another is chosen: for ranks that are all on one host.
    Else gloo looks up the host's name. Raises UserError where that interface is down."""
    name = interface(LOOPBACK)
    if name:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
    elif sys.platform == "linux":  # elsewhere `interface` finds none
        raise UserError(f"no network interface has the address {LOOPBACK}, by which ranks meet: ip link set lo up")


def stop() -> None:
    """Leave the group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def end_rank(code: int = 0) -> None:
    """End this process, a rank that is done, past the interpreter's own end.

    There ranks were seen to abort ("terminate called without an active exception", in 1 of 5 and 4 of 8 runs of three
    ranks on two cores, with no Python frame left), and torchrun then ends the other ranks too.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def check_devices(local_ranks: int) -> None:
    """Raises UserError where a host with GPUs has fewer of them than ranks; without GPUs ranks are processes."""
    count = torch.cuda.device_count()
    if 0 < count < local_ranks:
        raise UserError(f"{local_ranks} ranks on this host but {count} GPUs; start {count} of them")


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_threads(threads: int) -> int:
    """Set the intra-op threads, 0 for an equal share of rank 0's cores; -> what was set.

    Sums depend on the number, so all ranks have the same, and it is saved with the training state.
    """
    threads = from_first(threads or max(cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1))
    torch.set_num_threads(threads)
    return threads


def set_precision(ranks: Ranks, deterministic: bool) -> None:
    """On CUDA: tf32 products, and deterministic algorithms if asked. On a CPU there is nothing to choose."""
    if ranks.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(deterministic)


def share(count: int, ranks: Ranks) -> range:
    """The contiguous share of a batch's `count` coupling groups that this rank computes; shares differ by one at most.

    Raises UserError when there are more ranks than groups.
    """
    if ranks.world > count:
        raise UserError(
            f"{ranks.world} ranks but only {count} coupling groups in a batch; raise the batch, lower "
            f"distributed.group or use at most {count} ranks"
        )
    return range(count * ranks.rank // ranks.world, count * (ranks.rank + 1) // ranks.world)


def sum_over_ranks(values: Tensor) -> Tensor:
    """In place, where there are ranks."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def fingerprint(tensors: Iterable[Tensor]) -> Tensor:
    """A sum of the bits of all tensors, int64 [1], on their device: one changed bit changes it."""
    total: Tensor | int = 0
    for weight, tensor in enumerate(tensors):
        bits = tensor.detach().view(torch.int64 if tensor.element_size() == 8 else torch.int32)
        total = total + (2 * weight + 1) * bits.sum(dtype=torch.int64)
    return torch.as_tensor(total).view(1)


def find_strangers(value: Tensor, ranks: Ranks) -> list[int]:
    """The ranks whose `value`, int64 [1], differs from that of most ranks, in a tie from that of rank 0. All ranks get
    the same answer."""
    if ranks.world == 1:
        return []
    gathered = [torch.empty_like(value) for _ in range(ranks.world)]
    dist.all_gather(gathered, value)
    values = torch.cat(gathered).tolist()
    usual = max(values, key=values.count)
    return [rank for rank, other in enumerate(values) if other != usual]


def same_on_all(what: str, value: Any) -> Any:
    """`value`, if every rank passes the same; else UserError on all ranks, which names the first that differs."""
    if dist.is_initialized():
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise UserError(f"rank {rank} has {what} {other!r} and rank 0 has {values[0]!r}: make them the same")
    return value


def from_first(value: Any) -> Any:
    """On every rank, the value that rank 0 passes."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_first(ranks: Ranks, function: Callable[[], Any]) -> Any:
    """What a function returns on rank 0, on every rank. A UserError that it raises there becomes an EverywhereError on
    every rank: they stop together or not at all."""
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
