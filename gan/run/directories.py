"""Run directories: `O/00000-<preset>-<dataset>-...`, found again by their trajectory, held by one process at a time."""

import fcntl
import hashlib
import json
import re
import time
from pathlib import Path
from typing import IO, Any

from gan.errors import UserError
from gan.files import replacing, write_json

OPTIONS, EXIT, LOCK = "training_options.json", "exit.json", ".lock"


def fingerprint(values: Any) -> str:
    """A hash of plain values; tuples and lists are alike."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def find(outdir: Path, trajectory: str) -> Path | None:
    """The newest run in `outdir` with this trajectory hash."""
    for run in sorted(_runs(outdir), reverse=True):
        try:
            if json.loads((run / OPTIONS).read_text())["trajectory_hash"] == trajectory:
                return run
        except (OSError, ValueError, KeyError):
            continue  # not one of ours, or its creation was cut off: it holds nothing to go on with
    return None


def create(outdir: Path, name: str, options: dict[str, Any]) -> Path:
    """Make `outdir/<next number>-<name>/` with its options file. Raises UserError where that is not possible."""
    try:
        outdir.mkdir(parents=True, exist_ok=True)
        while True:
            number = max((int(run.name[:5]) for run in _runs(outdir)), default=-1) + 1
            run = outdir / f"{number:05d}-{name}"
            try:
                run.mkdir()
                break
            except FileExistsError:  # another run took the number meanwhile
                continue
        write_json(run / OPTIONS, options)
    except OSError as error:
        raise UserError(f"--outdir={outdir} cannot be written: {error.strerror}; choose another") from error
    return run


def hold(run: Path, patience: float = 0.0) -> IO[str]:
    """Lock a run for as long as the file that is returned stays open. Raises UserError if another process has it, and
    for `patience` seconds does not let go.

    Of another host's processes a lock knows where the file system passes it on, as NFS from version 4 does.
    """
    file, deadline = (run / LOCK).open("w"), time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except OSError:
            if time.monotonic() < deadline:
                time.sleep(0.2)
                continue
        file.close()
        raise UserError(f"{run} is in use by another run; wait for it, stop it, or choose another --outdir")


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
