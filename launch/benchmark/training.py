"""Training the networks that a benchmark compares, and keeping what it found, so that it can be stopped at any time."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from launch.ranks import call
from launch.samples import find_snapshot, last_run
from launch.settings import set_flags
from launch.tables import write_json


def trained(data: Path, outdir: Path, flags: Mapping[str, Any], settings: Mapping[str, Any]) -> Path:
    """Run `saddle train` until it is done, or go on with it. -> its newest snapshot.

    The process ends with the training's exit code if that is not 0, as when a signal stopped it.
    """
    given = [f"--data={data}", f"--outdir={outdir}", *(f"--{name}={value}" for name, value in flags.items())]
    given += set_flags(settings)
    code = call([sys.executable, "-m", "launch.train", *given], 1)
    if code:
        raise SystemExit(code)
    return find_snapshot(last_run(outdir))


def kept(path: Path, find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What the file holds, or else what `find` returns, which is then written there as JSON."""
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    found = find()
    write_json(path, found)
    return found
