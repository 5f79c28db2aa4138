"""Times of functions that do the same work, taken side by side, and what they were taken on."""

import platform
import re
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from gan.errors import UserError
from gan.ranks.distributed import cores

Call = Callable[[], Any]
FEWEST = 3  # samples of each, however slow: a median needs them


@dataclass(frozen=True)
class Times:
    """Of one contestant: median, 10th and 90th percentile of its samples in milliseconds, and how many there are."""

    median: float
    p10: float
    p90: float
    samples: int


@dataclass(frozen=True)
class Sampling:
    """How a contestant is sampled: a sample is the mean of `calls`; its host takes `host_seconds` to start them."""

    calls: int
    host_seconds: float


class Clock(Protocol):
    """What a contest is timed by."""

    name: str
    budget: float  # seconds that a contest should not go on beyond

    def warm_up(self, call: Call) -> Sampling:
        """Warm up, and see how long a call takes."""

    def sample(self, call: Call, sampling: Sampling) -> float:
        """Mean seconds of one call."""


class HostClock:
    """For work of the CPU. One thread is timed by the CPU time of the process, which other jobs disturb less."""

    sample_seconds = 0.004
    most_calls = 1000
    budget = 5.0

    def __init__(self, threads: int) -> None:
        self.name = "CPU time" if threads == 1 else "wall time"
        self.now = time.process_time if threads == 1 else time.perf_counter

    def warm_up(self, call: Call) -> Sampling:
        """See Clock."""
        call()
        started = self.now()
        call()
        seconds = self.now() - started
        return Sampling(min(max(int(self.sample_seconds / max(seconds, 1e-7)), 1), self.most_calls), seconds)

    def sample(self, call: Call, sampling: Sampling) -> float:
        """See Clock. What short calls find in the cache is what they left there, not what another contestant did."""
        if sampling.calls > 1:
            call()
        started = self.now()
        for _ in range(sampling.calls):
            call()  # the result is freed here
        return (self.now() - started) / sampling.calls


class DeviceClock:
    """For work of a GPU: CUDA events round a queue of calls.

    The GPU is kept waiting until the host has queued them: else the host would be timed, which takes longer to start
    most ops than they last. `keep` results are held meanwhile, so that calls do not write over the same cached memory.
    """

    name = "CUDA events"
    sample_seconds = 0.003
    most_calls = 50
    most_wait = 0.1
    cycles_per_second = 2e9  # of the fastest GPU clock
    budget = 1.0

    def __init__(self, keep: int) -> None:
        self.keep = keep

    def warm_up(self, call: Call) -> Sampling:
        """See Clock."""
        call()
        torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        queued = time.perf_counter()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        calls = min(max(int(self.sample_seconds / max(seconds, 1e-7)), 1), self.most_calls)
        return Sampling(calls, queued - started)

    def sample(self, call: Call, sampling: Sampling) -> float:
        """See Clock."""
        results: deque[Any] = deque(maxlen=self.keep)
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        wait = min(1.5 * sampling.host_seconds * sampling.calls, self.most_wait)
        torch.cuda._sleep(int(wait * self.cycles_per_second))
        start.record()
        for _ in range(sampling.calls):
            results.append(call())
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / sampling.calls


class ReplayClock:
    """For work of a GPU without the host's: CUDA events round a graph in which a call was captured several times.

    The calls must belong to the current stream, which must not be the default one (see `own_stream`). `keep` results
    are held meanwhile, so that calls do not write over the same cached memory.
    """

    name = "CUDA events round graphs"
    sample_seconds = 0.002
    most_calls = 100
    budget = 1.0
    launch_cycles = 400_000  # that the GPU waits for the graph: a fifth of a millisecond at the fastest clock

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self.graphs: dict[Call, torch.cuda.CUDAGraph] = {}

    def warm_up(self, call: Call) -> Sampling:
        """See Clock."""
        call()
        torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        calls = max(min(int(self.sample_seconds / seconds), self.most_calls), self.keep + 1)
        self.graphs[call] = self._capture(call, calls)
        return Sampling(calls, 0.0)

    def _capture(self, call: Call, calls: int) -> torch.cuda.CUDAGraph:
        """So many calls as a graph that has run once. NotImplementedError if they cannot be captured."""
        graph = torch.cuda.CUDAGraph()
        results: deque[Any] = deque(maxlen=self.keep)
        here = torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, stream=here, capture_error_mode="thread_local"):
                for _ in range(calls):
                    results.append(call())
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise NotImplementedError(f"it cannot be captured: {error}") from error
        graph.replay()
        torch.cuda.synchronize()
        return graph

    def sample(self, call: Call, sampling: Sampling) -> float:
        """See Clock."""
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(self.launch_cycles)
        start.record()
        self.graphs[call].replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / sampling.calls


def own_stream(device: torch.device) -> AbstractContextManager[Any]:
    """Within the block work on a GPU goes to a stream of its own, which can be captured."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()


def contest(
    calls: Mapping[str, Call], clock: Clock, repeats: int, seconds: Callable[[], float] = time.monotonic
) -> tuple[dict[str, Times], dict[str, str]]:
    """Time each of `calls` `repeats` times -> ({name: times}, {name: why it could not take part}).

    In each round every one is sampled once, so that whatever else the machine does slows all of them down; each round
    begins with another one. Once the clock's budget is spent no further round begins, except the first three.
    """
    samplings: dict[str, Sampling] = {}
    left_out: dict[str, str] = {}
    for name, call in calls.items():
        try:
            samplings[name] = clock.warm_up(call)
        except (torch.OutOfMemoryError, NotImplementedError) as error:
            left_out[name] = str(error).splitlines()[0]
    samples: dict[str, list[float]] = {name: [] for name in samplings}
    names = list(samplings)
    started = seconds()
    for turn in range(repeats):
        if turn >= FEWEST and seconds() - started > clock.budget:
            break
        first = turn % max(len(names), 1)
        for name in names[first:] + names[:first]:
            samples[name].append(clock.sample(calls[name], samplings[name]))
    return {name: percentiles(values) for name, values in samples.items()}, left_out


def percentiles(seconds: list[float]) -> Times:
    """Samples in seconds -> Times in milliseconds."""
    p10, median, p90 = (float(q) for q in np.percentile(np.array(seconds) * 1e3, [10, 50, 90]))
    return Times(median, p10, p90, len(seconds))


def fastest(times: Mapping[str, Times], group: str) -> tuple[str, Times] | None:
    """The fastest of the contestants named "group: variant" -> (variant, times), or None if there are none."""
    of_group = {name: times[name] for name in times if name.partition(":")[0] == group}
    if not of_group:
        return None
    best = min(of_group, key=lambda name: of_group[name].median)
    return best.partition(": ")[2], of_group[best]


def find_device(name: str) -> torch.device:
    """ "cpu" or "cuda". UserError, with the reason, if there is no GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        why = "this torch is built for the CPU alone" if torch.version.cuda is None else "torch sees no GPU"
        raise UserError(f"--device=cuda: {why}; --device=cpu works, and saddle doctor tells more")
    return torch.device(name)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What figures depend on: processor, cores, threads, torch, kernels, and whether malloc keeps pages."""
    from ops.memory import keep_pages
    from ops.registry import kernels

    try:
        chosen = kernels()
    except ValueError as error:  # of SADDLE_OPS
        raise UserError(str(error)) from error
    # "compiled" may be true of the CPU alone: the dispatcher knows what serves this device.
    serves = torch._C._dispatch_has_kernel_for_dispatch_key("gan_ops::upfirdn2d", device.type.upper())
    return {
        "device": device.type,
        "processor": torch.cuda.get_device_name() if device.type == "cuda" else processor(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "clock": DeviceClock.name if device.type == "cuda" else HostClock(torch.get_num_threads()).name,
        "torch": torch.__version__,
        "kernels": chosen if serves or chosen == "reference" else "reference",
        "keeps_pages": bool(keep_pages()),
    }


def machine_line(machine: Mapping[str, Any]) -> str:
    """The same in one line."""
    kept = "keeps the pages of freed tensors" if machine["keeps_pages"] else "is as the system or the user set it"
    return (
        f"{machine['processor']}, {machine['cores']} cores, threads {machine['threads']}, torch {machine['torch']}, "
        f"{machine['kernels']} kernels, malloc {kept}, {machine['clock']}"
    )


def processor() -> str:
    """The name of the CPU."""
    about = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", about.read_text(), re.MULTILINE) if about.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()
