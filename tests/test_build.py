"""Compiling the kernels: once, under a lock, never half; what is missing is named, and nobody is stopped by it.

The sources here are tiny. The wrapper around the compiler writes down every call that compiles.
"""

import ctypes
import errno
import fcntl
import grp
import hashlib
import json
import logging
import os
import pwd
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ops.build
import ops.choice
import ops.registry
from ops import toolchain
from ops.build import CSRC, FAILURE, LIBRARY, LOG, MANIFEST, build, find, remembered
from ops.choice import choose, status
from ops.toolchain import BuildError, Nvcc, Recipe, architectures, gencode, recipe

ROOT = Path(__file__).resolve().parent.parent
COMPILER = shutil.which("c++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
WRAPPER = """#!/bin/sh
for word; do
    [ "$word" = -c ] || continue
    echo $$ >> "$CALLS"
    [ -z "$HANG" ] || exec sleep 600
done
exec COMPILER "$@"
"""
TINY = """
#include <omp.h>
extern "C" int threads() {
    int count = 0;
    #pragma omp parallel
    #pragma omp single
    count = omp_get_num_threads();
    return count;
}
"""


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A folder with one tiny source; an empty cache; a compiler that counts."""
    wrapper = tmp_path / "c++"
    wrapper.write_text(WRAPPER.replace("COMPILER", str(COMPILER)))
    wrapper.chmod(0o755)
    for name in ("SADDLE_OPS", "SADDLE_BUILD_TIMEOUT", "LOCAL_RANK", "TORCH_CUDA_ARCH_LIST", "HANG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CXX", str(wrapper))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("SADDLE_CACHE", str(tmp_path / "a cache"))
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "tiny.cpp").write_text(TINY)
    return folder


def calls() -> list[int]:
    path = Path(os.environ["CALLS"])
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def start(code: str, before: Sequence[str] = (), **env: str) -> subprocess.Popen:
    """A Python of its own, in this environment and another folder."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), **env}
    command = [*before, sys.executable, "-W", "error", "-c", code]
    return subprocess.Popen(
        command, env=environment, cwd="/", text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish(process: subprocess.Popen) -> tuple[str, str]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out, err


def alive(pid: int) -> bool:
    """Whether a process runs. A dead one whose parent has not asked is a zombie, not alive."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition, what: str) -> None:
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError(f"{what} did not happen")


# ---- the cache


def test_compiles_once_and_finds_it_again(source, tmp_path):
    made = recipe(source)
    assert find(made) is None
    library = build(made)
    assert library == tmp_path / "a cache" / "saddlepoint" / "ops" / made.key / LIBRARY
    manifest = json.loads((library.parent / MANIFEST).read_text())
    assert manifest["sha256"] == hashlib.sha256(library.read_bytes()).hexdigest()
    assert build(recipe(source)) == library == find(made)
    assert len(calls()) == 1
    assert {path.name for path in library.parent.parent.iterdir()} == {made.key, f"{made.key}.lock"}, (
        "nothing left over"
    )
    # A damaged library is not found, and is made again.
    good = library.read_bytes()
    for damaged in (good[: len(good) // 2], good[:-1] + bytes([good[-1] ^ 1]), b""):
        library.write_bytes(damaged)
        assert find(made) is None
    assert build(made) == library and find(made) == library and len(calls()) == 2
    ctypes.CDLL(str(library))
    (library.parent / MANIFEST).unlink()  # killed between the two moves
    assert find(made) is None
    (library.parent / MANIFEST).write_text("[]")
    assert find(made) is None


def test_the_key_is_a_hash_of_all_that_matters(source, monkeypatch, tmp_path):
    keys = [recipe(source).key, recipe(source).key]
    assert keys[0] == keys[1]

    def changed(what):
        keys.append(recipe(source).key)
        assert keys[-1] not in keys[:-1], what

    (source / "tiny.cpp").write_text(TINY + " ")
    changed("a byte")
    (source / "tiny.cpp").rename(source / "small.cpp")
    changed("a name")
    (source / "small.h").write_text("")
    changed("a header")
    monkeypatch.setattr(torch, "__version__", "2.99")
    changed("torch")
    monkeypatch.setattr(toolchain, "FLAGS", ("-O2",))
    changed("a flag")
    other = tmp_path / "another"
    other.write_text(f'#!/bin/sh\necho "-march=another" >&2\nexec {COMPILER} "$@"')  # another CPU, same compiler
    other.chmod(0o755)
    monkeypatch.setenv("CXX", str(other))
    changed("the CPU")
    unchanged = recipe(source).key
    (source / "gpu.cu").write_text("")
    assert recipe(source).key == unchanged, "no CUDA here"
    monkeypatch.setattr(toolchain, "cuda", lambda: (Nvcc("/cuda", "13.0", (90,), True), ("-gencode",), ""))
    changed("CUDA")
    monkeypatch.setattr(toolchain, "cuda", lambda: (Nvcc("/cuda", "13.1", (90,), True), ("-gencode",), ""))
    changed("nvcc")


def test_a_compiler_without_march_native_makes_portable_code(source, monkeypatch, tmp_path):
    other = tmp_path / "portable"
    other.write_text(f'#!/bin/sh\ncase "$*" in *-march=native*) exit 1;; esac\nexec {COMPILER} "$@"')
    other.chmod(0o755)
    monkeypatch.setenv("CXX", str(other))
    assert "-march=native" not in recipe(source).flags
    monkeypatch.setenv("CXX", str(source.parent / "c++"))
    assert "-march=native" in recipe(source).flags


def test_sources_edited_meanwhile_are_not_kept_under_the_wrong_key(source, monkeypatch):
    real = ops.build._run_child

    def edited_meanwhile(*arguments):
        (source / "tiny.cpp").write_text(TINY + " ")
        return real(*arguments)

    monkeypatch.setattr(ops.build, "_run_child", edited_meanwhile)
    made = recipe(source)
    with pytest.raises(BuildError, match="changed while they were compiled"):
        build(made)
    assert find(made) is None and not remembered(made)
    assert build(recipe(source)) == find(recipe(source))


def test_stale_locks_and_files_of_killed_builds_stop_no_build(source):
    made = recipe(source)
    home = ops.build.cache() / made.key
    for folder in (home, home.with_name(f"{made.key}.part-{os.getpid()}"), home.with_name(f"{made.key}.part-1")):
        folder.mkdir(parents=True)
        (folder / "lock").touch()  # torch's own: it would wait for it for ever
    home.with_suffix(".lock").write_text("process 1 on another machine")
    assert build(made) == find(made)
    assert not list(home.parent.glob("*.part-*"))


# ---- a cache that others may write

needs_root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root, to be two users")
OTHER = 12345


def plant(source) -> Recipe:
    """Put a library with a right manifest into the cache, as another user could. -> its recipe."""
    made = recipe(source)
    home = ops.build.cache() / made.key
    home.mkdir(parents=True)
    (home / LIBRARY).write_bytes(b"a library")
    (home / MANIFEST).write_text(json.dumps({"sha256": hashlib.sha256(b"a library").hexdigest()}))
    return made


@pytest.fixture
def planted(source):
    """A recipe whose library is found until somebody else may have made it."""
    made = plant(source)
    assert find(made)
    yield made
    assert not calls(), "nothing was compiled into it either"


def refused(made) -> str:
    """The one reason for which the cache is refused, by whoever looks for a library or wants to make one."""
    said = set()
    for ask in (find, build):
        with pytest.raises(BuildError) as error:
            ask(made)
        said.add(str(error.value))
    (reason,) = said
    assert "\n" not in reason and "set SADDLE_CACHE to a folder of your own" in reason
    return reason


@pytest.mark.parametrize("part", ["base", "saddlepoint", "ops", "key", LIBRARY, MANIFEST])
def test_a_cache_that_others_may_write_is_refused(planted, part, tmp_path):
    home = ops.build.cache() / planted.key
    paths = {"base": tmp_path / "a cache", "saddlepoint": home.parents[1], "ops": home.parent, "key": home}
    path = paths.get(part, home / part)
    path.chmod(path.stat().st_mode | 0o002)
    assert refused(planted).startswith(f"others may write {path}, and could put any code there")


@needs_root
@pytest.mark.parametrize("part", ["base", "saddlepoint", "ops", "key", LIBRARY, MANIFEST])
def test_a_cache_of_another_user_is_refused(planted, part, tmp_path):
    home = ops.build.cache() / planted.key
    paths = {"base": tmp_path / "a cache", "saddlepoint": home.parents[1], "ops": home.parent, "key": home}
    path = paths.get(part, home / part)
    os.chown(path, OTHER, OTHER)
    assert refused(planted).startswith(f"{path} belongs to user {OTHER}, who could put any code there")


def test_a_cache_that_is_a_link_to_elsewhere_is_refused(planted):
    home = ops.build.cache() / planted.key
    home.rename(home.with_name("elsewhere"))
    home.symlink_to(home.with_name("elsewhere"))
    assert refused(planted).startswith(f"{home} is a link")


def test_a_cache_in_a_folder_like_tmp_and_behind_a_link_of_the_user_is_used(source, tmp_path, monkeypatch):
    """Nobody else can remove or rename what this user makes there. Many link ~/.cache to another disk."""
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    (tmp_path / "link").symlink_to(shared)
    monkeypatch.setenv("SADDLE_CACHE", str(tmp_path / "link"))
    assert find(plant(source))


def test_what_a_user_makes_who_lets_all_write_is_closed_to_others(source, tmp_path):
    (tmp_path / "a cache").mkdir()
    before = os.umask(0)
    try:
        made = recipe(source)
        assert build(made) == find(made)
    finally:
        os.umask(before)


def test_a_group_may_write_only_if_it_is_the_users_own(source, monkeypatch, tmp_path):
    made = plant(source)
    folder = ops.build.cache()
    folder.chmod(0o775)
    user = pwd.struct_passwd(("me", "x", os.getuid(), folder.stat().st_gid, "", "/", "/bin/sh"))
    monkeypatch.setattr(pwd, "getpwuid", lambda _: user)
    for name, members, fine in (("me", [], True), ("me", ["me"], True), ("me", ["you"], False), ("lab", [], False)):
        entry = grp.struct_group((name, "x", user.pw_gid, members))
        monkeypatch.setattr(grp, "getgrgid", lambda _, entry=entry: entry)
        assert fine == (not _raises(lambda: find(made)))


def _raises(call) -> bool:
    try:
        call()
    except BuildError:
        return True
    return False


def test_a_lock_that_is_a_link_is_not_followed(source, tmp_path):
    made = recipe(source)
    precious = tmp_path / "precious"
    precious.write_text("precious")
    ops.build.cache().mkdir(parents=True)
    (ops.build.cache() / f"{made.key}.lock").symlink_to(precious)
    with pytest.raises(BuildError, match="cannot keep compiled kernels"):
        build(made)
    assert precious.read_text() == "precious"


@needs_root
@pytest.mark.parametrize("how", ["another user's", "open to all", "a link"])
def test_a_folder_for_locks_that_others_may_write_is_refused(source, monkeypatch, how, tmp_path):
    def no_flock(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(ops.build.fcntl, "flock", no_flock)
    monkeypatch.setattr(ops.build.tempfile, "gettempdir", lambda: str(tmp_path))
    private = tmp_path / f"saddlepoint-{os.getuid()}"
    precious = tmp_path / "precious"
    precious.mkdir()
    if how == "a link":
        private.symlink_to(precious)
    else:
        private.mkdir()
        private.chmod(0o777 if how == "open to all" else 0o755)
        os.chown(private, OTHER if how == "another user's" else 0, 0)
    with pytest.raises(BuildError, match=f"{private}"):
        build(recipe(source))
    assert not list(precious.iterdir()) and not calls()


def test_the_doctor_and_the_choice_say_why_a_cache_is_refused(source, monkeypatch, caplog):
    plant(source)
    ops.build.cache().chmod(0o777)
    now = status(source)
    assert (now.kernels, now.library) == ("reference", "") and "others may write" in now.missing
    assert choose(source) == "reference"
    assert "using the reference kernels, which are slower: others may write" in caplog.text
    monkeypatch.setenv("SADDLE_OPS", "compiled")
    with pytest.raises(BuildError, match="SADDLE_OPS=compiled: others may write"):
        choose(source)


# ---- many processes

BUILD = "import sys; from pathlib import Path; from ops.toolchain import recipe; from ops.build import load;"


def test_processes_that_start_together_compile_once(source):
    together = [start(f"{BUILD} print(load(recipe(Path({str(source)!r}))))", LOCAL_RANK=str(i)) for i in range(3)]
    paths = {finish(process)[0].strip() for process in together}
    assert paths == {str(find(recipe(source)))}
    assert len(calls()) == 1


NO_LOCKS = """
import errno, ops.build
flock = ops.build.fcntl.flock
def only_elsewhere(file, operation):
    if str(getattr(file, "name", "")).startswith(str(ops.build.cache())):
        raise OSError(errno.ENOLCK, "No locks available")
    return flock(file, operation)
ops.build.fcntl.flock = only_elsewhere
"""


@needs_root
@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare, for another host's name")
@pytest.mark.parametrize("locks", [True, False], ids=["with locks", "without"])
def test_two_hosts_that_share_a_cache_both_get_sound_kernels(source, locks):
    """Without locks on the file that they share, each compiles its own, into a folder with its name."""
    code = f"{BUILD}\n{'' if locks else NO_LOCKS}print(load(recipe(Path({str(source)!r}))))"
    together = [
        start(code, before=("unshare", "--uts", "sh", "-c", f'hostname {name}; exec "$@"', "sh")) for name in "ab"
    ]
    paths = {finish(process)[0].strip() for process in together}
    key = recipe(source).key
    assert {Path(path).parent.name for path in paths} == ({key} if locks else {f"{key}-a", f"{key}-b"})
    assert len(calls()) == len(paths)
    for path in paths:
        ctypes.CDLL(path)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_killed_builder_leaves_nothing_that_stops_the_next(source):
    builder = start(f"{BUILD} load(recipe(Path({str(source)!r})))", HANG="1")
    wait_for(calls, "the compiler's start")
    builder.send_signal(signal.SIGKILL)
    builder.wait()
    wait_for(lambda: not alive(calls()[0]), "the end of its compiler")
    builder.stdout.close(), builder.stderr.close()
    made = recipe(source)
    assert list(ops.build.cache().glob("*.part-*")), "what it left"
    assert build(made) == find(made)
    assert not list(ops.build.cache().glob("*.part-*"))


def test_a_live_holder_is_named_when_the_wait_is_over(source, monkeypatch, caplog):
    monkeypatch.setenv("SADDLE_BUILD_TIMEOUT", "0.2")
    made = recipe(source)
    lock = ops.build.cache() / f"{made.key}.lock"
    lock.parent.mkdir(parents=True)
    with lock.open("w") as holder:
        holder.write("process 1234 on node7")
        holder.flush()
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(
            BuildError, match=r"process 1234 on node7 has held .*\.lock for 0.2 s.*SADDLE_BUILD_TIMEOUT"
        ):
            build(made)
    assert [record.message for record in caplog.records if "waiting for process 1234 on node7" in record.message]
    assert len(caplog.records) == 1, "said once"
    for bad in ("soon", "-1", "0", "nan"):
        monkeypatch.setenv("SADDLE_BUILD_TIMEOUT", bad)
        with pytest.raises(BuildError, match="SADDLE_BUILD_TIMEOUT"):
            build(made)
    assert not calls()


def test_without_file_locks_a_machine_compiles_for_itself(source, monkeypatch, caplog):
    real = fcntl.flock

    def no_flock_in_the_cache(file, operation):
        if str(ops.build.cache()) in file.name:
            raise OSError(errno.ENOLCK, "No locks available")
        return real(file, operation)

    monkeypatch.setattr(ops.build.fcntl, "flock", no_flock_in_the_cache)
    monkeypatch.setattr(ops.build.tempfile, "gettempdir", lambda: str(source.parent))
    made = recipe(source)
    library = build(made)
    assert library.parent.name == f"{made.key}-{ops.build.socket.gethostname()}"
    assert build(made) == library and len(calls()) == 1
    assert "for this machine alone" in caplog.text


# ---- failures


def test_a_failed_build_is_remembered_until_asked_for(source, capsys):
    (source / "tiny.cpp").write_text("int answer() { return 42 }")
    made = recipe(source)
    with pytest.raises(BuildError, match=r"do not compile: .*tiny\.cpp:1:.*error: expected .;.") as first:
        build(made)
    assert (ops.build.cache() / made.key / LOG).read_text() and str(ops.build.cache() / made.key / LOG) in str(
        first.value
    )
    with pytest.raises(BuildError, match=r"python -m ops\.build tries again"):
        build(made)
    assert len(calls()) == 1, "the second time it was known"
    assert ops.build.main(source) == 2
    assert len(calls()) == 2, "asked for by a person"
    error = capsys.readouterr().err.splitlines()
    assert [line for line in error if line.startswith("ops.build: error: the kernels do not compile")] == error[-1:]
    (source / "tiny.cpp").write_text(TINY)  # another key
    assert build(recipe(source))
    with pytest.raises(BuildError):
        build(made)


def test_a_failure_that_may_pass_is_forgotten_after_a_while(source, monkeypatch):
    made = recipe(source)
    monkeypatch.setenv("SADDLE_BUILD_TIMEOUT", "0.1")
    with pytest.raises(BuildError, match=r"took longer than 0\.1 s"):
        build(made)
    marker = ops.build.cache() / made.key / FAILURE
    failure = json.loads(marker.read_text())
    assert remembered(made)
    marker.write_text(json.dumps(failure | {"time": failure["time"] - ops.build.PASSING_SECONDS - 1}))
    assert not remembered(made)
    marker.write_text(json.dumps({"error": "tiny.cpp:1: error", "time": 0}))
    assert remembered(made), "a mistake in the source stays one"


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("#include <no/such.h>\n", r"header no/such\.h is missing"),
        ("struct Trap { Trap() { __builtin_trap(); } } trap;\n", r"do not load \(exit code -\d+\)"),
        ("void nowhere();\nstruct Use { Use() { nowhere(); } } use;\n", "undefined symbol"),
        ("// TORCH_LIBRARY_IMPL(gan_ops, CPU, m)\n", "registers no CPU kernel"),
    ],
)
def test_what_is_wrong_is_named_and_nothing_bad_is_kept(source, code, says):
    (source / "tiny.cpp").write_text(code)
    made = recipe(source)
    with pytest.raises(BuildError, match=says):
        build(made)
    assert find(made) is None
    assert {path.name for path in (ops.build.cache() / made.key).iterdir()} == {FAILURE, LOG}


def test_missing_pieces_are_named(source, monkeypatch, tmp_path):
    monkeypatch.setenv("SADDLE_CACHE", str(source / "tiny.cpp"))
    with pytest.raises(BuildError, match="set SADDLE_CACHE"):
        build(recipe(source))
    monkeypatch.setattr(toolchain, "find_ninja", lambda: None)
    with pytest.raises(BuildError, match="ninja is missing: pip install ninja"):
        recipe(source)
    monkeypatch.undo()
    monkeypatch.setenv("CXX", "/bin/false")
    with pytest.raises(BuildError, match="no working C\\+\\+ compiler: /bin/false fails"):
        recipe(source)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path / "csrc"))
    with pytest.raises(BuildError, match=r"no C\+\+ compiler: c\+\+ not found"):
        recipe(source)


def test_ninja_is_found_beside_python_whatever_the_path(monkeypatch):
    if not Path(sys.executable).with_name("ninja").exists():
        pytest.skip("ninja is not in this environment")
    monkeypatch.setenv("PATH", "/nowhere")
    assert toolchain.find_ninja() == str(Path(sys.executable).with_name("ninja"))


# ---- which kernels


def test_without_a_compiler_the_reference_kernels_run_after_one_warning(source):
    code = "from ops.registry import kernels; print(kernels(), kernels())"
    out, err = finish(start(code, CXX="/nonexistent"))
    assert out.split() == ["reference", "reference"]
    (line,) = err.splitlines()
    assert "reference kernels" in line and "no C++ compiler: /nonexistent" in line and "saddle doctor" in line
    assert finish(start(code, CXX="/nonexistent", LOCAL_RANK="1")) == ("reference reference\n", "")


def test_forced_to_be_compiled_a_missing_compiler_is_an_error(source, monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent")
    monkeypatch.setenv("SADDLE_OPS", "compiled")
    with pytest.raises(BuildError, match=r"SADDLE_OPS=compiled: no C\+\+ compiler"):
        choose(source)
    assert status(source).kernels == "reference"


def test_the_mode_decides(source, monkeypatch, caplog):
    monkeypatch.setenv("SADDLE_OPS", "fast")
    for function in (choose, status):
        with pytest.raises(BuildError, match="SADDLE_OPS=fast: it must be one of reference, compiled, auto"):
            function(source)
    monkeypatch.setenv("SADDLE_OPS", "reference")
    assert choose(source) == "reference"
    assert not calls() and not caplog.records
    monkeypatch.setenv("SADDLE_OPS", "")
    assert (status(source).kernels, status(source).library) == ("compiled", ""), "it would be"
    assert choose(source) == "compiled"
    assert status(source).library == str(find(recipe(source)))


def test_if_only_cuda_cannot_be_compiled_the_cpu_kernels_are_and_a_warning_says_why(source, monkeypatch, caplog):
    monkeypatch.setattr(toolchain, "cuda", lambda: (None, (), "nvcc is missing: install it"))
    assert choose(source) == "compiled"
    (said,) = [record.message for record in caplog.records if record.levelno >= logging.WARNING][1:]
    assert "reference kernels on the GPU" in said and "nvcc is missing" in said
    monkeypatch.setenv("SADDLE_OPS", "compiled")
    with pytest.raises(BuildError, match="nvcc is missing"):
        choose(source)
    assert ops.build.main(source) == 2


def test_if_the_gpu_kernels_do_not_compile_those_for_the_cpu_are_used_and_the_status_says_so(
    source, monkeypatch, caplog
):
    toolkit = Nvcc("/nonexistent", "13.0", (90,), True)
    monkeypatch.setattr(toolchain, "cuda", lambda: (toolkit, (*toolchain.CUDA_FLAGS, *gencode("9.0")), ""))
    (source / "gpu.cu").write_text("")
    both, alone = recipe(source), recipe(source, with_cuda=False)
    assert (status(source).kernels, status(source).key) == ("compiled", both.key), "nobody has tried"
    assert choose(source) == "compiled"
    failed = remembered(both)
    assert failed and failed in caplog.text
    now = status(source)
    assert (now.kernels, now.library, now.key, now.missing) == ("compiled", str(find(alone)), alone.key, failed)
    monkeypatch.setenv("SADDLE_OPS", "compiled")
    assert (status(source).kernels, status(source).missing) == ("reference", failed)
    monkeypatch.delenv("SADDLE_OPS")
    (source / "tiny.cpp").write_text("no C++")
    assert choose(source) == "reference"
    now = status(source)
    assert (now.kernels, now.library, now.missing) == ("reference", "", remembered(recipe(source, with_cuda=False)))


class AsksForKernels(torch.utils.data.Dataset):
    """What a data worker sees that asks."""

    def __init__(self, source: Path) -> None:
        self.source = source

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> str:
        return choose(self.source)


def test_data_workers_do_not_compile_but_use_what_there_is(source):
    loader = torch.utils.data.DataLoader(
        AsksForKernels(source), num_workers=1, batch_size=None, multiprocessing_context="spawn"
    )
    assert list(loader) == ["reference"]
    assert not calls()
    build(recipe(source))
    assert list(loader) == ["compiled"]


def test_importing_ops_compiles_nothing(source):
    slow = {"ops.build", "torch._dynamo", "torch.utils.cpp_extension"}
    assert finish(start(f"import sys, ops; print({slow} & set(sys.modules))")) == ("set()\n", "")
    assert not calls() and not ops.build.cache().exists()


def test_many_threads_choose_once(monkeypatch):
    chosen, seen = [], []
    together = threading.Barrier(8)

    def slow_choice():
        chosen.append(1)
        time.sleep(0.05)
        return "compiled"

    def ask():
        together.wait()
        seen.append(ops.registry.kernels())

    monkeypatch.setattr(ops.registry, "_kernels", "")
    monkeypatch.setattr(ops.choice, "choose", slow_choice)
    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == ["compiled"] * 8 and len(chosen) == 1


def test_kernels_may_first_be_chosen_while_torch_compile_traces(monkeypatch):
    chosen = []
    monkeypatch.setattr(ops.registry, "_kernels", "")
    monkeypatch.setattr(ops.choice, "choose", lambda: chosen.append(1) or "compiled")

    @torch.compile(backend="eager", fullgraph=True)
    def face(x):
        return x + 1 if ops.registry.kernels() == "compiled" else x - 1

    with torch._dynamo.config.patch(error_on_recompile=True):
        assert [face(torch.zeros(1)).item() for _ in range(2)] == [1, 1]
    assert len(chosen) == 1 and ops.registry.kernels() == "compiled"


def test_a_failed_choice_is_made_again(monkeypatch):
    def refuse():
        raise BuildError("no compiler")

    monkeypatch.setattr(ops.registry, "_kernels", "")
    monkeypatch.setattr(ops.choice, "choose", refuse)
    for _ in range(2):
        with pytest.raises(BuildError):
            ops.registry.kernels()


# ---- what is made


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_the_library_uses_the_threads_of_torch(source):
    code = f"""{BUILD}
import ctypes, torch
from launch.doctor import openmp_runtimes
library = ctypes.CDLL(str(load(recipe(Path({str(source)!r})))))
for threads in (3, 1, 2):
    torch.set_num_threads(threads)
    print(library.threads(), len(openmp_runtimes()))
"""
    build(recipe(source))
    assert finish(start(code))[0].split() == ["3", "1", "1", "1", "2", "1"]


def test_the_kernels_compile_without_a_warning(monkeypatch):
    monkeypatch.delenv("SADDLE_BUILD_TIMEOUT", raising=False)
    library = build(recipe(CSRC))
    assert "warning:" not in (library.parent / LOG).read_text()
    assert "CPU" in json.loads((library.parent / MANIFEST).read_text())["kernels"]


# ---- CUDA, without one


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        ([(9, 0)], "9.0"),
        ([(8, 0), (9, 0), (9, 0)], "8.0;9.0"),
        ([(13, 0)], "12.1+PTX"),  # newer than nvcc
        ([(10, 1)], "10.0+PTX"),  # between two that it knows
        ([(9, 0), (13, 5)], "9.0;12.1+PTX"),
        ([(6, 1), (9, 0)], "9.0"),  # too old: not served, the other is
        ([(12, 1), (12, 2)], "12.1;12.1+PTX"),
    ],
)
def test_architectures(gpus, expected):
    assert architectures(gpus, [75, 80, 86, 89, 90, 100, 103, 120, 121]) == expected


def test_a_gpu_too_old_for_nvcc_is_named():
    with pytest.raises(ValueError, match=r"\(6\.1\)"):
        architectures([(6, 1)], [75, 80])


def test_flags_of_architectures():
    one = "-gencode=arch=compute_90,code=sm_90"
    two = ["-gencode=arch=compute_121,code=sm_121", "-gencode=arch=compute_121,code=compute_121"]
    assert gencode("9.0;12.1+PTX") == [one, *two]


def test_what_cuda_lacks_is_named(monkeypatch, tmp_path):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(toolchain, "capabilities", lambda: [(9, 0)])
    monkeypatch.setattr(torch.version, "cuda", None)
    assert toolchain.cuda() == (None, (), ""), "torch for the CPU alone"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    good = Nvcc("/cuda", "13.2", (80, 90), True)

    def lacks(nvcc):
        monkeypatch.setattr(toolchain, "find_nvcc", lambda: nvcc)
        return toolchain.cuda()

    assert lacks(good) == (good, (*toolchain.CUDA_FLAGS, *gencode("9.0")), "")
    assert "nvcc is missing" in lacks(None)[2]
    assert "is of CUDA 12.8" in lacks(replace(good, version="12.8"))[2]
    assert "headers are missing" in lacks(replace(good, has_headers=False))[2]
    assert "no longer compiles for the GPUs here (9.0)" in lacks(replace(good, architectures=(100,)))[2]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6")
    assert lacks(good) == (good, toolchain.CUDA_FLAGS, ""), "torch reads the variable"
    for value in ("native", ""):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", value)
        assert lacks(good) == (good, (*toolchain.CUDA_FLAGS, *gencode("9.0")), "")
    monkeypatch.setattr(toolchain, "capabilities", list)
    for value in ("native", ""):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", value)
        assert lacks(good) == (None, (), ""), "no GPU, and none named"


def test_capabilities_come_from_the_gpus_or_none_in_a_forked_process(monkeypatch):
    def refuse(device):
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", [(9, 0), (8, 0), (9, 0)].__getitem__)
    assert toolchain.capabilities() == [(8, 0), (9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", refuse)
    assert toolchain.capabilities() == []


def test_version_and_architectures_come_from_nvcc(monkeypatch, tmp_path):
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text(
        '#!/bin/sh\n[ "$1" = -V ] && echo "Cuda compilation tools, release 13.0, V13.0.88" || echo sm_90 sm_75'
    )
    nvcc.chmod(0o755)
    (tmp_path / "targets" / "x86_64-linux" / "include").mkdir(parents=True)
    (tmp_path / "targets" / "x86_64-linux" / "include" / "cuda_runtime.h").touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert toolchain.find_nvcc() == Nvcc(str(tmp_path), "13.0", (75, 90), True)
