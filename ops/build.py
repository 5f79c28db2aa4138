"""Compiles the kernels of ops/csrc once per machine, keeps them in a cache, and says what is missing if it cannot.

    python -m ops.build     ahead of time: in an image, or before a job. Exits 2 with one line if a piece is missing.

A library lies in <cache>/<key>/, where the key is a hash of all it is made from; its manifest, written last, holds its
checksum. One process of a machine compiles, under a lock that the system releases when the process ends, and the others
wait. The compiler runs in a child process, which also loads the library once: a library that crashes when it is loaded
ends that child only. torch's own lock file stays behind when a builder is killed, and whoever finds it waits for ever;
so each attempt compiles in a new directory.

SADDLE_CACHE=DIR              where to keep them: in DIR/saddlepoint/ops; else in $XDG_CACHE_HOME, else in ~/.cache.
                              A folder that other users may write is refused, as its libraries would be run
SADDLE_BUILD_TIMEOUT=SECONDS  the longest wait for another process, and for the compiler; 600
CXX, CUDA_HOME, TORCH_CUDA_ARCH_LIST and MAX_JOBS are those of torch.utils.cpp_extension; SADDLE_OPS: see ops/choice.py.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import torch

from ops.toolchain import BuildError, Recipe, recipe
from ops.trust import check_owner, close_to_others

CSRC = Path(__file__).resolve().parent / "csrc"
NAME = "gan_ops"
LIBRARY, MANIFEST, FAILURE, LOG = f"{NAME}.so", "manifest.json", "failed.json", "build.log"
NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
# Failures that another attempt may not meet again: they are remembered for PASSING_SECONDS, and others for good.
PASSING = re.compile(r"Killed|No space left|took longer|cannot allocate|memory exhausted|out of memory", re.IGNORECASE)
PASSING_SECONDS = 600
log = logging.getLogger(__name__)


def cache() -> Path:
    """The directory of all compiled kernels. BuildError if there is no home directory."""
    try:
        base = os.environ.get("SADDLE_CACHE") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return Path(base).expanduser().absolute() / "saddlepoint" / "ops"
    except RuntimeError:
        raise BuildError("there is no home directory: set SADDLE_CACHE to a directory that can be written") from None


def timeout() -> float:
    """SADDLE_BUILD_TIMEOUT in seconds. BuildError unless it is a positive number."""
    value = os.environ.get("SADDLE_BUILD_TIMEOUT") or "600"
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0
    if not seconds > 0:
        raise BuildError(f"SADDLE_BUILD_TIMEOUT={value}: it must be a positive number of seconds")
    return seconds


def find(made: Recipe) -> Path | None:
    """The compiled library of a recipe, if the cache has one with the right checksum.

    Raises BuildError if another user may have put it there: a manifest is as easy to forge as a library.
    """
    above = cache().parents[1]
    for home in _homes(made):
        with suppress(OSError, ValueError, KeyError, TypeError):
            check_owner(home / LIBRARY, above)
            check_owner(home / MANIFEST, above)
            manifest = json.loads((home / MANIFEST).read_text())
            if hashlib.sha256((home / LIBRARY).read_bytes()).hexdigest() == manifest["sha256"]:
                return home / LIBRARY
    return None


def _homes(made: Recipe) -> tuple[Path, Path]:
    """Where its library may be: for all machines, or, where their file system cannot lock, for this one alone."""
    return cache() / made.key, cache() / f"{made.key}-{socket.gethostname()}"


def remembered(made: Recipe) -> str:
    """Why the last attempt to compile this recipe failed, if another one would fail again; else an empty string."""
    for home in _homes(made):
        with suppress(OSError, ValueError, KeyError, TypeError):
            failure = json.loads((home / FAILURE).read_text())
            if not PASSING.search(failure["error"]) or 0 <= time.time() - failure["time"] < PASSING_SECONDS:
                return failure["error"]
    return ""


def build(made: Recipe, *, retry: bool = False) -> Path:
    """The library of a recipe, compiled if it is not in the cache yet.

    Raises BuildError if it cannot be compiled, and at once if that is known from an earlier attempt, unless `retry`.
    """
    limit = timeout()
    found = find(made)
    if found:
        return found
    try:
        _make_cache()
        with _locked(made, limit) as home:
            found = find(made)  # by another process, meanwhile
            if found:
                return found
            failed = remembered(made)
            if failed and not retry:
                raise BuildError(f"{failed}; python -m ops.build tries again")
            home.mkdir(mode=0o755, exist_ok=True)
            return _compile(made, home, limit)
    except OSError as error:
        raise BuildError(
            f"cannot keep compiled kernels in {cache()} ({error.strerror or error}): set SADDLE_CACHE to a directory "
            "that can be written and has space"
        ) from error


def _make_cache() -> None:
    """Make the cache if it is missing. Raises BuildError if others may write it."""
    folder = cache()
    above = folder.parents[1]
    above.mkdir(parents=True, exist_ok=True)
    folder.parent.mkdir(mode=0o755, exist_ok=True)
    folder.mkdir(mode=0o755, exist_ok=True)
    check_owner(folder, above)


@contextmanager
def _locked(made: Recipe, limit: float) -> Iterator[Path]:
    """Hold the lock of a recipe -> the directory it may write. The system lets go of it when this process ends."""
    shared, own = _homes(made)
    private = Path(tempfile.gettempdir()) / f"saddlepoint-{os.getuid()}"
    try:
        lock = _acquire(shared.with_suffix(".lock"), limit)
        home = shared
    except OSError as error:
        if error.errno not in NO_FLOCK:
            raise
        say(f"ops: the file system of {cache()} has no locks: compiling for this machine alone, in {own}")
        private.mkdir(mode=0o700, exist_ok=True)
        check_owner(private)
        lock = _acquire(private / f"{own.name}.lock", limit)
        home = own
    try:
        yield home
    finally:
        fcntl.flock(lock, fcntl.LOCK_UN)  # closing does not let go while a forked child has the file open
        lock.close()


def _acquire(path: Path, limit: float) -> IO[str]:
    file = open(path, "a+", opener=_open_no_link)  # noqa: SIM115 (returned while it is open)
    deadline = None
    try:
        while True:
            with suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}")
                file.flush()
                return file
            holder = path.read_text() or "another process"
            if deadline is None:
                deadline = time.monotonic() + limit
                say(f"ops: waiting for {holder} to compile the kernels, at most {limit:g} s")
            if time.monotonic() > deadline:
                raise BuildError(f"{holder} has held {path} for {limit:g} s: end it, or raise SADDLE_BUILD_TIMEOUT")
            time.sleep(0.05)
    except BaseException:
        file.close()
        raise


def _open_no_link(path: str, flags: int) -> int:
    """Open a lock, which is emptied and written: through a link that would be another file."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o644)


def _compile(made: Recipe, home: Path, limit: float) -> Path:
    """Compile and load in a child, in a directory of its own; move what is good into `home`, the manifest last."""
    for left in home.parent.glob(f"{home.name}.part-*"):  # by builders that were killed: we hold the lock
        shutil.rmtree(left, ignore_errors=True)
    work = home.with_name(f"{home.name}.part-{os.getpid()}")
    work.mkdir(mode=0o755)
    say(f"ops: compiling the kernels, once: a minute or two; into {home}")
    try:
        with (home / LOG).open("wb") as output:
            ended = _run_child(made, work, output, limit)
        if ended != 0 or not (work / LIBRARY).exists():
            error = f"{_reason(home / LOG, ended, limit)} (log: {home / LOG})"
            _write(home / FAILURE, {"error": error, "time": time.time()})
            raise BuildError(error)
        if recipe(Path(made.sources[0]).parent, made.nvcc is not None).key != made.key:
            raise BuildError("the sources of the kernels changed while they were compiled: start again")
        checksum = hashlib.sha256((work / LIBRARY).read_bytes()).hexdigest()
        close_to_others(work / LIBRARY)
        os.replace(work / LIBRARY, home / LIBRARY)
        (home / FAILURE).unlink(missing_ok=True)
        about = {"compiler": made.compiler.version, "flags": made.flags, "cuda_flags": made.cuda_flags}
        _write(home / MANIFEST, {"sha256": checksum, "torch": torch.__version__, "kernels": made.keys, **about})
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return home / LIBRARY


def _run_child(made: Recipe, work: Path, output: IO[bytes], limit: float) -> int | None:
    """-> exit code, or None if it took too long. The child and its compilers end with us: see _end_with_stdin."""
    root = str(Path(__file__).resolve().parent.parent)
    env = os.environ | {
        "PATH": os.pathsep.join([str(Path(made.ninja).parent), os.environ.get("PATH", os.defpath)]),
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
        "PYTHONSAFEPATH": "1",
        "CXX": made.compiler.path,
        "LC_ALL": "C",
        **({"CUDA_HOME": made.nvcc.home} if made.nvcc else {}),
    }
    arguments = [made.sources, made.flags, made.cuda_flags, made.keys, str(work)]
    command = [sys.executable, "-W", "ignore", "-c", "import ops.build; ops.build._child()", json.dumps(arguments)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, env=env, start_new_session=True
    ) as child:
        try:
            return child.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGTERM)  # on which ninja ends its compilers, in groups of their own


def _child() -> None:
    """In a process of its own: compile, load, and check that the library registers kernels for every key."""
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    from torch.utils import cpp_extension

    def registered(key: str) -> set[str]:
        names = torch._C._dispatch_get_registrations_for_dispatch_key(key)
        return {name for name in names if name.startswith(f"{NAME}::")}

    sources, flags, cuda_flags, keys, work = json.loads(sys.argv[1])
    before = {key: registered(key) for key in keys}
    cpp_extension.load(NAME, sources, flags, cuda_flags, build_directory=work, verbose=True, is_python_module=False)
    for key in keys:
        if registered(key) == before[key]:
            sys.exit(f"error: the library registers no {key} kernel")


def _end_with_stdin() -> None:
    """Nobody needs what a killed builder's compilers would make, and the next builder needs their cores."""
    os.read(0, 1)
    os.killpg(0, signal.SIGTERM)


def _reason(path: Path, ended: int | None, limit: float) -> str:
    """One line on why a build failed: the first error in its log, else its last line."""
    if ended is None:
        return f"compiling the kernels took longer than {limit:g} s: raise SADDLE_BUILD_TIMEOUT"
    text = path.read_text(errors="replace")
    missing = re.search(r"fatal error: (\S+?):? No such file or directory", text)
    if missing:
        return f"header {missing[1]} is missing: install the compiler's and PyTorch's development files"
    for pattern in ("No space left", r"\bKilled\b", r"\b[Ee]rror: ", "undefined (?:reference|symbol)"):
        line = re.search(f".*{pattern}.*", text)
        if line:
            return f"the kernels do not compile: {line[0].strip()}"
    last = (text.strip() or "no message").splitlines()[-1]
    return f"the compiled kernels do not load (exit code {ended}): {last}" if ended < 0 else f"the build failed: {last}"


def _write(path: Path, values: dict) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(values, indent=1))
    close_to_others(part)
    os.replace(part, path)


def say(message: str) -> None:
    """Log a warning (on standard error, unless logging is set up otherwise), on the first local rank only."""
    if os.environ.get("LOCAL_RANK") in (None, "0"):
        log.warning("%s", message)


def load(made: Recipe) -> Path:
    """Load the library of a recipe into this process, compiled if need be -> its path. Once per process. BuildError."""
    path = build(made)
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise BuildError(f"{path} does not load ({error}): delete its directory") from error
    return path


def main(source: Path = CSRC) -> int:
    """Compile now and say what and where -> 0, or 2 with one line naming what is missing."""
    try:
        made = recipe(source)
        devices = f"CPU and CUDA {made.nvcc.version}" if made.nvcc else "CPU"
        print(f"ops: {len(made.sources)} sources for {devices}, {made.compiler.version}", flush=True)
        print(f"ops: {' '.join((*made.flags, *made.cuda_flags))}", flush=True)
        print(f"ops: ready in {build(made, retry=True)}")
        if made.missing:
            raise BuildError(f"no kernels for the GPU: {made.missing}")
    except BuildError as error:
        print(f"ops.build: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
