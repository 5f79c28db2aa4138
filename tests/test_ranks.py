"""What is compared before ranks train, what their launcher says and exits with, and the scripts that start it."""

import os
import shutil
import socket
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from hosts import family, kill

from data.prepare import prepare
from gan.errors import EverywhereError, PeerError, UserError
from gan.ranks import selftest
from launch.ranks import addresses, check_reach, endpoint, environment, hold_store, leave

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["single_node.sh", "multi_node.sh", "slurm.sbatch"]


def compared(have: list[dict], refusals: tuple = (), seconds: float = 20.0, absent: int = 0) -> list:
    """What `compare` returns or raises on each rank; the last `absent` ranks never come."""
    store, results = dist.HashStore(), [None] * len(have)
    store.set_timeout(timedelta(seconds=20))

    def one(rank: int) -> None:
        refusal = dict(refusals).get(rank, "")
        try:
            results[rank] = selftest.compare(store, rank, len(have), have[rank], refusal, seconds)
        except (UserError, PeerError) as error:
            results[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(have) - absent)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_ranks_that_are_alike_know_each_others_hosts():
    assert compared([selftest.versions()] * 3) == [[socket.gethostname()] * 3] * 3


@pytest.mark.parametrize("name", ["torch", "code of Saddlepoint", "dataset", "config batch"])
def test_the_rank_that_differs_is_named_with_what_differs(name):
    ours = {**selftest.versions(), "dataset": "d0", "config batch": 32}
    results = compared([ours, ours, {**ours, name: "other"}])
    host = socket.gethostname()
    said = f"rank 2 on {host} differs from rank 0 on {host}: {name} other instead of {ours[name]}; make them the same"
    assert all(isinstance(r, EverywhereError) and str(r) == said for r in results)


def test_one_rank_that_refuses_makes_all_raise_its_message():
    results = compared([{}, {}], ((1, "no dataset /data/x.lmdb"),))
    assert [str(r) for r in results] == [f"rank 1 on {socket.gethostname()}: no dataset /data/x.lmdb"] * 2
    assert [str(r) for r in compared([{}, {}], ((0, "no"), (1, "no")))] == ["no"] * 2


def test_a_rank_that_does_not_arrive_is_named():
    *came, absent = compared([{}, {}, {}], seconds=0.5, absent=1)
    assert absent is None and all(isinstance(r, PeerError) for r in came)
    assert "rank 2 did not arrive within 0.5 s, or the store is gone (arrived: rank 0 on" in str(came[0])


def test_the_hash_of_the_code_sees_one_changed_byte(tmp_path, monkeypatch):
    for package in ("gan", "ops", "data", "launch"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    before = selftest.code_hash()
    monkeypatch.setattr(selftest, "ROOT", tmp_path)
    assert selftest.code_hash() == before
    path = tmp_path / "gan" / "layers.py"
    path.write_bytes(path.read_bytes().replace(b"\n", b" \n", 1))
    assert selftest.code_hash() != before


def test_a_host_that_takes_itself_for_localhost_is_told_which_interface_to_name(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(socket, "gethostbyname", lambda _: "127.0.1.1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    selftest.check_address(world=4, local_world=4)  # one host needs none
    with pytest.raises(UserError, match=r"resolves to 127.0.1.1, .* GLOO_SOCKET_IFNAME=lo"):
        selftest.check_address(world=4, local_world=2)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    selftest.check_address(world=4, local_world=2)


def test_meeting_points_that_cannot_be_are_refused_with_the_remedy():
    assert endpoint(["--nnodes=2"]) is None and endpoint(["--rdzv-endpoint=127.0.0.1:80"]) == ("127.0.0.1", 80)
    for given, said in (("nowhere.invalid:80", "has no address"), ("127.0.0.1", "write HOST:PORT")):
        with pytest.raises(UserError, match=said):
            endpoint([f"--rdzv-endpoint={given}"])
    with pytest.raises(UserError, match=r"where other hosts cannot answer: give the address"):
        addresses(["--rdzv-endpoint=127.0.0.1:80"])
    assert addresses(["--nproc-per-node=2"]) == ["--nproc-per-node=2"]
    said = r"cannot be used .* choose another port"
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match=said):
        hold_store("127.0.0.1", taken.getsockname()[1])
    with socket.create_server(("127.0.0.1", 0)) as there:
        port = there.getsockname()[1]
        check_reach("127.0.0.1", port, 5.0)
    with pytest.raises(UserError, match=r"nothing answers at 127.0.0.1:\d+ for 0 s .* start the same command there"):
        check_reach("127.0.0.1", port, 0.0)


def test_ranks_of_one_host_meet_at_the_loopback_address(monkeypatch):
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(variable, "eth0")  # as a cluster's profile may do, for ranks on several hosts
    flags = addresses(["--standalone", "--nproc-per-node=2", "-m", "x"])
    assert flags[-3:] == ["--nproc-per-node=2", "-m", "x"] and "--standalone" not in flags
    assert {"--rdzv-backend=memory", "--local-addr=127.0.0.1"} < set(flags)
    assert os.environ["GLOO_SOCKET_IFNAME"] == os.environ["NCCL_SOCKET_IFNAME"] == "lo"


needs_namespaces = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("unshare"), reason="needs Linux, root and unshare"
)


@needs_namespaces
@pytest.mark.slow
@pytest.mark.multihost
def test_ranks_start_on_a_host_whose_own_name_does_not_resolve(tmp_path):
    prepare("digits", tmp_path / "digits.lmdb", resolution=(8, 8), max_images=100)
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n")
    inside = f'hostname no-such-host; mount --bind {tmp_path}/hosts /etc/hosts; exec "$@"'
    train = [sys.executable, "-m", "launch.train", f"--data={tmp_path / 'digits.lmdb'}", f"--outdir={tmp_path}/runs"]
    train += ["--batch=16", "--kimg=0.032", "--preset=digits", "--set=growth.mode=none", "--set=network.z_dim=8"]
    train += ["--set=network.widths=[8,8]", "--gpus=2"]
    process = subprocess.Popen(
        ["unshare", "--uts", "--mount", "sh", "-c", inside, "sh", *train],
        env=environment(2),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=100)  # without an address the ranks wait for many minutes
    finally:
        kill(family(process.pid))
    assert process.returncode == 0, output
    assert "self-test: 2 ranks on no-such-host agree" in output


@needs_namespaces
@pytest.mark.multihost
def test_a_host_whose_loopback_interface_is_down_is_told_the_remedy():
    command = ["unshare", "--net", sys.executable, "-m", "launch.ranks", "--standalone", "-m", "x"]
    env = {k: v for k, v in environment(1).items() if k not in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "ip link set lo up" in done.stderr


def test_a_launcher_that_ends_while_a_thread_looks_for_its_ranks_prints_nothing():
    """As under load: the thread that looks is slow, and the launcher has removed its files before it is done."""
    code = """
import sys, time
from launch import ranks
ranks.agent = lambda arguments: time.sleep(1.5) or 0
ranks.children = lambda: time.sleep(2) or [1]
try:
    ranks.main()
except SystemExit as ended:
    time.sleep(2)
    sys.exit(ended.code)
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(1), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_signal_that_was_ignored_at_the_start_is_not_passed_on():
    """As nohup ignores SIGHUP. What ends the child is the next signal, which nobody ignores."""
    child = """
import os, signal, time
print(signal.getsignal(signal.SIGHUP).name, flush=True)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.kill(os.getppid(), signal.SIGHUP)
time.sleep(1)
os.kill(os.getppid(), signal.SIGTERM)
time.sleep(60)
"""
    code = f"""
import signal, sys
signal.signal(signal.SIGHUP, signal.SIG_IGN)
from launch import ranks
sys.exit(ranks.call([sys.executable, "-c", {child!r}], 1))
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(1), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (128 + 15, "SIG_IGN\n"), done.stderr


def test_exit_codes_are_written_only_for_a_launcher(monkeypatch, tmp_path):
    monkeypatch.delenv("SADDLE_ENDED", raising=False)
    assert not leave(75)
    monkeypatch.setenv("SADDLE_ENDED", str(tmp_path / "ended"))
    assert leave("begun") and (tmp_path / "ended").read_text().strip() == "begun"
    assert leave(75) and (tmp_path / "ended").read_text().strip() == "75"


@pytest.mark.slow
def test_what_all_ranks_refuse_is_one_line_and_no_restart(tmp_path):
    prepare("digits", tmp_path / "digits.lmdb", resolution=(8, 8), max_images=100)
    flags = [f"--data={tmp_path / 'digits.lmdb'}", f"--outdir={tmp_path / 'runs'}", "--batch=16", "--kimg=1"]
    env = environment(2) | {"RANKS": "5", "PYTHON": sys.executable}
    script = ROOT / "launch" / "single_node.sh"
    done = subprocess.run([script, *flags], env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and not (tmp_path / "runs").exists()
    said = [line for line in done.stderr.splitlines() if not line.startswith("ops: ")]
    assert len(said) == 1 and said[0].startswith("saddle train: error: 5 ranks but only 4 coupling groups"), said


def launched(tmp_path: Path, code: str, *before: str) -> subprocess.CompletedProcess:
    """Two ranks that run `code`, started by the command `before`."""
    (tmp_path / "worker.py").write_text(f"import os, sys, time\nfrom launch.ranks import leave\n{code}")
    command = [*before, sys.executable, "-m", "launch.ranks", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*command, str(tmp_path / "worker.py")], env=environment(2), capture_output=True, text=True, timeout=60
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "code,exit_code",
    [
        ("leave(3)", 3),
        ("leave('begun')", 0),
        ("leave('begun'); sys.exit(5)", 1),
        ("sys.exit(2)", 2),
        ("leave(75); os.kill(os.getppid(), 15); time.sleep(30)", 75),
        ("time.sleep(1); os.kill(os.getppid(), 15); time.sleep(30)", 128 + 15),
        ("leave(75); os.kill(os.getppid(), 1); time.sleep(30)", 75),
        # Thousands that are one wish: the handler is interrupted by itself, wherever it is.
        ("leave(75); [os.kill(os.getppid(), 15) for _ in range(5000)]; time.sleep(30)", 75),
    ],
)
def test_the_launcher_exits_with_what_ranks_left(tmp_path, code, exit_code):
    done = launched(tmp_path, code)
    assert done.returncode == exit_code, done.stderr
    assert "Traceback" not in done.stderr or exit_code == 1


@pytest.mark.slow
def test_a_launcher_under_nohup_outlives_its_terminal(tmp_path):
    hang_up = "os.kill(os.getppid(), 1); os.kill(os.getpid(), 1); time.sleep(2); leave('begun')"
    done = launched(tmp_path, hang_up, "nohup")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_plain_shell(name):
    path = ROOT / "launch" / name
    assert os.access(path, os.X_OK) and path.read_text().startswith("#!/bin/sh\n")
    assert subprocess.run(["sh", "-n", path]).returncode == 0
    if shutil.which("shellcheck"):
        assert subprocess.run(["shellcheck", path]).returncode == 0
    assert "local_rank" not in path.read_text()


def test_a_script_without_its_variables_says_which(tmp_path):
    done = subprocess.run([ROOT / "launch" / "multi_node.sh"], env={"PATH": os.environ["PATH"]}, capture_output=True)
    assert done.returncode == 2 and b"MASTER: the host where all meet" in done.stderr
