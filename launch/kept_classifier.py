"""A trained classifier in a file: hosts of different kinds would train different ones, and their scores not compare."""

import fcntl
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from gan.errors import UserError
from launch.outputs import output_file

if TYPE_CHECKING:
    from torch import nn

    from gan.metrics.classifier import Classifier


def keep(path: Path, network: "nn.Sequential", train: "Callable[[], Classifier]") -> "Classifier":
    """The classifier of a file, or a new one, which is trained and written there while other processes wait.

    network: gets its weights if it is read. Raises UserError for a file that holds no such network.
    """
    from gan.tensor_files import save_tensors

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return read(path, network)
        trained = train()
        about = {"classes": trained.classes, "accuracy": trained.accuracy, "held_out": trained.held_out}
        with output_file(path) as part:
            save_tensors(part, trained.network.state_dict(), {name: repr(value) for name, value in about.items()})
        return trained


def read(path: Path, network: "nn.Sequential") -> "Classifier":
    """The classifier of a file. Raises UserError for a file that holds no such network."""
    from safetensors import SafetensorError, safe_open

    from gan.metrics.classifier import Classifier

    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            network.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - no dict
        values = (int(about["classes"]), float(about["accuracy"]), int(about["held_out"]))
    except (SafetensorError, OSError, RuntimeError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
        raise UserError(
            f"{path} holds no classifier of this dataset ({reason}); remove it, and it is trained again"
        ) from error
    return Classifier(network.eval().requires_grad_(False), *values)
