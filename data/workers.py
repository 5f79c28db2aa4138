"""Work shared out to forked processes, its results in order."""

import faulthandler
import mmap
import multiprocessing
import os
import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from data.errors import DataError, Interrupted

T = TypeVar("T")
Bytes = bytes | memoryview
Result = tuple[Any, Sequence[Bytes]]  # anything small, and bytes that are not copied through a pipe
SLOTS = 2  # results of one worker that may wait to be taken


def in_order(
    work: Callable[[int], Result], tasks: Sequence[int], workers: int, slot_bytes: int, private: Sequence[int] = ()
) -> Generator[Result, None, None]:
    """work(task) of every task, in order; with one worker in this process, else by forked ones, each every so many.

    The bytes of one result, at most `slot_bytes`, are valid until the next is asked for. `private` are open files that
    a worker must not hold on to. What `work` raises is raised here; a worker that dies is an Interrupted error. Workers
    end when this generator is closed, and when this process dies.
    """
    if workers == 1:
        yield from map(work, tasks)
        return
    context = multiprocessing.get_context("fork")
    ours = []
    processes = []
    slots = [[mmap.mmap(-1, slot_bytes) for _ in range(SLOTS)] for _ in range(workers)]  # shared with the children
    try:
        for worker in range(workers):
            here, there = context.Pipe()
            ours.append(here)
            arguments = (
                work,
                tasks[worker::workers],
                there,
                slots[worker],
                [*private, *(end.fileno() for end in ours)],
            )
            processes.append(context.Process(target=_serve, args=arguments, daemon=True))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # threads of numpy's; the child needs none of them
                processes[-1].start()
            there.close()
        for turn in range(len(tasks)):
            worker = turn % workers
            slot = slots[turn % workers][turn // workers % SLOTS]
            yield _receive(ours[worker], processes[worker], slot)
            with suppress(OSError):  # its last task is done and it has gone
                ours[worker].send(None)
    finally:
        for process, here in zip(processes, ours, strict=False):
            process.kill()
            process.join()
            here.close()


def _receive(here: Connection, process: Any, slot: mmap.mmap) -> Result:
    try:
        result, lengths = here.recv()
    except (EOFError, OSError):
        process.join()
        raise Interrupted(
            f"a worker died (exit code {process.exitcode}; -9 may mean that memory ran out): run the same command "
            "again to go on, with fewer --workers if need be"
        ) from None
    if isinstance(result, BaseException):
        raise result
    view = memoryview(slot)
    values = []
    end = 0
    for length in lengths:
        values.append(view[end : end + length])
        end += length
    return result, values


def _serve(
    work: Callable[[int], Result], tasks: Sequence[int], there: Connection, slots: list[mmap.mmap], private: list[int]
) -> None:
    """The life of a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, and that ends us
    for file in private:
        os.close(file)  # else our parent's death would neither end our siblings nor free its lock
    with suppress(OSError, EOFError):  # the parent is gone
        for turn, task in enumerate(tasks):
            try:
                result, values = work(task)
            except (DataError, OSError) as error:
                there.send((error, []))
                return
            except Exception:
                there.send((RuntimeError(traceback.format_exc()), []))
                return
            if turn >= SLOTS:
                there.recv()  # until the slot is free
            end = 0
            for value in values:
                slots[turn % SLOTS][end : end + len(value)] = value
                end += len(value)
            there.send((result, [len(value) for value in values]))
        while True:
            there.recv()  # stay, so that the parent can still send


def in_child(work: Callable[[], T], if_killed: str) -> T:
    """The result of `work`, done by a forked process that ends when this one does. What it raises is raised here.

    DataError with `if_killed`, and the name of the signal, if the process dies of one.
    """
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    until, lifeline = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(work, there, until, lifeline), daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads of numpy's; the child needs none of them
        process.start()
    there.close()
    until.close()
    try:
        result = here.recv()
    except (EOFError, OSError):
        process.join()
        code = process.exitcode or 0
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        raise DataError(f"{if_killed} (its reader died of {name})") from None
    finally:
        process.kill()
        process.join()
        here.close()
        lifeline.close()
    if isinstance(result, BaseException):
        raise result
    return result


def _send_result(work: Callable[[], Any], there: Connection, until: Connection, lifeline: Connection) -> None:
    faulthandler.disable()  # if this process dies, its parent says so in one line
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, and that ends us
    lifeline.close()
    threading.Thread(target=_end_with, args=(until,), daemon=True).start()
    try:
        there.send(work())
    except Exception as error:
        there.send(error)


def _end_with(until: Connection) -> None:
    """End this process when its parent has: then nobody holds the other end of the pipe."""
    with suppress(EOFError, OSError):
        until.recv()
    os._exit(1)
