"""launch/slurm.sbatch on a real Slurm of two nodes: it trains over both, and after a signal, a lost node and the time
limit the job goes on by itself from what was saved. And launch/benchmark.sbatch, whose tasks share a grid.

They take minutes, as Slurm lets a requeued job wait for two: before that the nodes would refuse it, as its number is
that of the job that just ended there."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from hosts import ROOT, wait_until
from slurm_cluster import Cluster, why_no_slurm

from data.prepare import prepare

WHY_NOT = why_no_slurm()
pytestmark = [pytest.mark.multihost, pytest.mark.slow, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)]
FLAGS = [
    *("--preset=digits", "--batch=16", "--tick=0.16", "--snap=1", "--set=growth.mode=none", "--set=growth.shares=[]"),
    *("--set=run.threads=1", "--set=network.widths=[8,8]", "--set=network.z_dim=8", "--set=distributed.timeout=20"),
]
PATIENCE = 600  # seconds for a start on a machine that has other work too


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "digits.lmdb"
    prepare("digits", path, resolution=(8, 8), max_images=200)
    return path


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="saddle-slurm-"))  # the path of a socket must be short
    made = Cluster(folder)
    try:
        made.build()
        yield made
    finally:
        made.end()
        shutil.rmtree(folder, ignore_errors=True)


def until(cluster: Cluster, number: int, log: Callable[[], str], condition: Callable[[], object], what: str) -> None:
    """Wait for something of a job, and show the job if it does not come."""
    try:
        wait_until(condition, PATIENCE, what)
    except AssertionError as error:
        raise AssertionError(f"{error}: {cluster.job(number)}\n{log()[-3000:]}") from None


class Job:
    """A submitted launch/slurm.sbatch."""

    def __init__(self, cluster: Cluster, digits: Path, folder: Path, kimg: float, *options: str):
        self.cluster, self.out, self.log_file = cluster, folder / "runs", folder / "job.log"
        script = str(ROOT / "launch" / "slurm.sbatch")
        train = [f"--data={digits}", f"--outdir={self.out}", *FLAGS, f"--kimg={kimg}"]
        options = ("--nodes=2", f"--output={self.log_file}", *options)
        self.number = cluster.submit(*options, script, *train, folder=ROOT)

    def log(self) -> str:
        return self.log_file.read_text() if self.log_file.exists() else ""

    def seen(self) -> int:
        """Images seen by the newest training state."""
        return max((int(p.name[-10:]) for p in self.out.glob("*/training-state-*")), default=0)

    def ended(self) -> dict:
        (path,) = self.out.glob("*/exit.json")
        return json.loads(path.read_text())

    def until(self, condition, what: str) -> None:
        until(self.cluster, self.number, self.log, condition, what)

    def until_begun(self, times: int) -> None:
        """Until ranks on both nodes have met so many times, and trained since."""
        said = "self-test: 2 ranks on n1, n2 agree"
        self.until(lambda: self.log().count(said) == times and "\ntick " in self.log().rpartition(said)[2], "training")

    def until_requeued(self, times: int) -> None:
        """Until Slurm has requeued it so many times."""
        self.until(lambda: self.cluster.job(self.number).get("Restarts") == str(times), "requeueing")


def test_a_job_goes_on_by_itself_after_a_signal_and_a_lost_node(cluster, digits, tmp_path):
    job = Job(cluster, digits, tmp_path, 6.4)
    job.until_begun(1)
    cluster.ask("scancel", "--signal=USR1", str(job.number))
    job.until_requeued(1)
    saved = job.ended()
    assert saved["code"] == 75 and 0 < saved["images_seen"] == job.seen() < 6400
    job.until_begun(2)
    assert f"going on from training-state-{saved['images_seen']:010d}" in job.log()
    before = job.seen()
    cluster.lose("n2")
    job.until_requeued(2)
    assert before <= job.seen() < 6400
    cluster.start_node("n2")
    job.until_begun(3)
    job.until(lambda: cluster.job(job.number)["JobState"] == "COMPLETED", "the end")
    assert job.ended() == {"code": 0, "reason": "finished", "images_seen": 6400}


def test_a_job_that_reaches_its_time_limit_saves_before_it_and_goes_on(cluster, digits, tmp_path):
    job = Job(cluster, digits, tmp_path, 100, "--time=60", "--signal=USR1@60")
    job.until_begun(1)
    hours, minutes, _ = cluster.job(job.number)["RunTime"].split(":")
    cluster.ask("scontrol", "update", f"JobId={job.number}", f"TimeLimit={60 * int(hours) + int(minutes) + 2}")
    job.until_requeued(1)
    saved = job.ended()
    assert saved["code"] == 75 and saved["images_seen"] == job.seen() > 0
    job.until(lambda: f"going on from training-state-{saved['images_seen']:010d}" in job.log(), "going on")
    cluster.ask("scancel", str(job.number))


def test_tasks_of_an_array_share_a_grid_and_one_that_is_preempted_comes_back(cluster, tmp_path):
    out = tmp_path / "grid"
    script = str(ROOT / "launch" / "benchmark.sbatch")
    grid = ["--regularizers=none,r1,r2,r1_r2", "--seeds=0,1", "--set=steps=1500", f"--outdir={out}"]
    number = cluster.submit("--array=0-1", f"--output={tmp_path}/%a.log", script, *grid, folder=ROOT)

    def logs() -> str:
        return "".join(path.read_text() for path in sorted(tmp_path.glob("*.log")))

    wait = partial(until, cluster, number, logs)
    wait(lambda: len(list(out.glob("claims/*.lock"))) > 1, "both tasks at work")
    cluster.ask("scancel", "--signal=USR1", "--batch", f"{number}_0")
    wait(lambda: cluster.job(f"{number}_0").get("Restarts") == "1", "requeueing")
    wait((out / "regularizers.html").exists, "the page, by the task that is left")
    wait(lambda: cluster.job(f"{number}_0").get("JobState") == "COMPLETED", "the end of the task that came back")
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 8 and all(row["figures"] for row in rows)
    finished = [line for line in logs().splitlines() if line.startswith("grid f:gan ")]
    assert len(finished) == len(set(finished)) == 8
