"""Run directories, `OUTDIR/00000-<preset>-<dataset>-...`: found again by the trajectory's hash, and locked by the one
process that uses them."""

import json
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gan.checkpoint import initial_weights, states_of
from gan.config import flatten
from gan.errors import UserError
from gan.files import replacing, write_json
from gan.ranks.distributed import Ranks
from gan.run.plan import RunPlan, differences
from gan.run.writer import check_space
from gan.state import build_networks
from gan.tensor_files import Kinds, parse_fields

OPTIONS = "training_options.json"
EXIT = "exit.json"
LOCK = ".lock"


def open_run(plan: RunPlan, outdir: Path, resume: str = "latest") -> Path:
    """The directory of the run to resume, or of a new run in `outdir`. Nothing is created for a run that cannot start.
    Of processes that start at the same moment, one creates the run and the others find it.

    resume: latest (the newest run with the same trajectory), none (a new run), or the directory of a run.
    Raises UserError as `find_run` does, for unsuitable initial weights, and if `outdir` cannot be written.
    """
    found = find_run(plan, outdir, resume)
    if found:
        return found
    family = plan.task(Ranks()).family
    if plan.config.init_from:
        initial_weights(plan.config.init_from, build_networks(family, plan.config, plan.images))
    with writing(f"outdir={outdir}"):
        check_space(next(path for path in (outdir, *outdir.absolute().parents) if path.exists()))
        outdir.mkdir(parents=True, exist_ok=True)
    with hold(outdir, patience=60.0):
        return find_run(plan, outdir, resume) or create(outdir, plan.name, plan.options)


def find_run(plan: RunPlan, outdir: Path, resume: str = "latest") -> Path | None:
    """The directory of the run to resume, None for a new one.

    Raises UserError if `resume` is a path but not of such a run, and if a run in `outdir` differs only in its length or
    batch: the user may want to resume that run, but with these settings a new one would start.
    """
    if resume == "none":
        return None
    if resume == "latest":
        runs = list(_runs_with_options(outdir))
        for run, options in runs:
            if options["trajectory_hash"] == plan.trajectory_hash:
                return run
        for run, options in runs:
            refuse_if_nearly(plan, run, options)
        return None
    run = Path(resume)
    theirs = _read_options(run)
    if theirs is None:
        raise UserError(f"resume={resume} is not the directory of a run of Saddlepoint")
    if theirs["trajectory_hash"] != plan.trajectory_hash:
        refuse_if_nearly(plan, run, theirs)
        names = ", ".join(differences(theirs, plan.options))
        raise UserError(
            f"resume={resume} is a run with other values of {names}; give the same values, or use init_from={resume}"
        )
    return run


def refuse_if_nearly(plan: RunPlan, run: Path, options: dict[str, Any]) -> None:
    """Raises UserError if a run differs from the planned one only in its length or batch, and says how to go on.

    A run that has no training state yet is passed over: there is nothing in it to go on with.
    """
    differ = {key for key in differences(options, plan.options) if not key.startswith("schedule.")}
    if differ - {"config.batch"} or not states_of(run):
        return
    theirs = flatten(options["config"])
    new_one = "to train a new run give resume=none once, or another outdir"
    same_length = theirs.get("run.kimg") == plan.config.run.kimg
    if differ:
        given = f"batch={theirs['batch']}" + ("" if same_length else f" and run.kimg={theirs['run.kimg']:g}")
        raise UserError(f"{run} is the same run with {given}; give that to resume it; {new_one}")
    if not same_length:
        raise UserError(
            f"{run} is the same run with run.kimg={theirs['run.kimg']:g}, and its schedule depends on that length; to "
            f"train on from its weights give init_from={run} and --set growth.mode=none; {new_one}"
        )


def create(outdir: Path, name: str, options: dict[str, Any]) -> Path:
    """Make `outdir/<next number>-<name>/` with its options file, and return its path. Raises UserError, and leaves
    nothing, if that is not possible."""
    with writing(f"outdir={outdir}"):
        run = _new_directory(outdir, name)
        try:
            write_json(run / OPTIONS, options)
        except OSError:
            shutil.rmtree(run, ignore_errors=True)
            raise
    return run


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Within the block, an error of the system becomes a UserError which says that `what` cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what} cannot be written: {error.strerror or error}; choose another outdir") from error


def write_exit(run: Path, code: int, reason: str, images_seen: int) -> None:
    """Write to exit.json how a run ended. If that is not possible, as on a full disk, say so on standard error."""
    try:
        write_json(run / EXIT, {"code": code, "reason": reason, "images_seen": images_seen})
    except OSError as error:
        with suppress(OSError):  # the reader of standard error may be gone
            print(f"{run / EXIT} cannot be written: {error.strerror}", file=sys.stderr, flush=True)


def check_exists(run: Path) -> None:
    """Raises UserError if somebody has removed the directory of a run that trains."""
    try:
        run.stat()
    except FileNotFoundError:
        raise UserError(f"{run} was removed during training: nothing can be saved; choose another outdir") from None
    except OSError:
        return  # as of a distant file system that does not answer for a while


def _new_directory(outdir: Path, name: str) -> Path:
    while True:
        number = max((int(run.name[:5]) for run in _runs(outdir)), default=-1) + 1
        run = outdir / f"{number:05d}-{name}"
        try:
            run.mkdir()
            return run
        except FileExistsError:  # another run took the number meanwhile
            continue


def hold(run: Path, patience: float = 0.0) -> AbstractContextManager[Any]:
    """Lock a run until the returned context is left or dropped, or this process ends.

    Raises UserError if another process keeps the lock for `patience` seconds, or nothing can be written there.

    Processes on other hosts see the lock if the file system passes locks on, as NFS does from version 4.
    """
    with writing(str(run)):
        try:
            return FileLock(run / LOCK, thread_local=False).acquire(timeout=patience, poll_interval=0.2)
        except Timeout:
            raise UserError(f"{run} is in use by another run; wait for it, stop it, or choose another outdir") from None


def _runs_with_options(outdir: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The runs in a folder and their options, the newest first."""
    for run in sorted(_runs(outdir), reverse=True):
        options = _read_options(run)
        if options:
            yield run, options


def _read_options(run: Path) -> dict[str, Any] | None:
    """A run's options; None for a folder that is not a run of ours, or whose creation was interrupted."""
    kinds: Kinds = {"trajectory_hash": str, "config": dict, "images": dict, "schedule": dict}
    try:
        options = parse_fields((run / OPTIONS).read_bytes(), kinds, more=True)
        config = flatten(options["config"])
        numbers = type(config["batch"]) is int and type(config["run.kimg"]) in (int, float)
        return options if numbers else None
    except (OSError, ValueError, KeyError):
        return None


def drop_after(path: Path, images_seen: int) -> None:
    """Remove the lines of a .jsonl file that a resumed run is about to write again."""
    if not path.exists():
        return
    lines = [line for line in path.read_text().splitlines() if _images(line) <= images_seen]
    with replacing(path) as part:
        part.write_text("".join(line + "\n" for line in lines))


def _images(line: str) -> float:
    try:
        return json.loads(line)["images_seen"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # cut off in the middle of a write


def _runs(outdir: Path) -> list[Path]:
    return [p for p in outdir.glob("[0-9]*-*") if re.match(r"\d{5}-", p.name) and p.is_dir()] if outdir.is_dir() else []
