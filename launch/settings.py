"""Reading a configuration from presets and flags, and replacing its keys by flags in messages to the user."""

import json
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from data.names import printable
from gan.config import NO_SUCH_KEY, Setting, TrainConfig, check_name, flatten, override, parse_assignment, settings
from gan.errors import UserError

if TYPE_CHECKING:
    from data.dataset import Dataset
    from gan.networks import ImageFormat

PRESETS = Path(__file__).resolve().parent / "presets"
PRESET_OF = {"vae": "vae"}  # the preset of a model for which none is given; of all others: default
PATHS = ("init_from", "run.cache")  # keys whose values are made absolute: ranks may run elsewhere
# Arguments of functions in gan that are not keys of the configuration, and their flags.
ARGUMENTS = {"resume": "--resume", "outdir": "--outdir"}


def setting_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator that adds an option for every setting with a flag, and `--set` for all settings."""
    command = click.option(
        "--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Set a key of gan/config.py; repeatable."
    )(command)
    for key, setting in reversed(flagged().items()):
        command = click.option(setting.flag, parameter(key), type=_click_type(setting), help=_help(setting))(command)
    return command


def flagged() -> dict[str, Setting]:
    """The settings that have a flag, by key."""
    return {key: setting for key, setting in settings().items() if setting.flag}


def parameter(key: str) -> str:
    """The name of the argument in which click passes a setting's flag: "init_from" for --init-from."""
    return settings()[key].flag.removeprefix("--").replace("-", "_")


def _click_type(setting: Setting) -> Any:
    return setting.kind if setting.kind in (int, float, bool) else str


def _help(setting: Setting) -> str:
    default = setting.default
    return f"{setting.help} [default: {default}]" if default not in ("", 0, False) else setting.help


def chosen_preset(flags: Mapping[str, Any]) -> str:
    """The preset that was given, or that of the model."""
    return flags["preset"] or PRESET_OF.get(flags["model"], "default")


def read_config(flags: Mapping[str, Any]) -> TrainConfig:
    """The configuration: defaults < preset < flags < --set. Raises UserError for unknown keys and wrong values."""
    values = {key: flags[parameter(key)] for key in flagged() if flags.get(parameter(key)) is not None}
    assigned: dict[str, Any] = {}
    for text in flags["assignments"]:
        key, value = parse_assignment(text)
        if key in assigned:
            raise UserError(f"--set {key} was given twice, as {assigned[key]!s:.60} and {value!s:.60}; give it once")
        assigned[key] = value
    values |= assigned
    for key in PATHS:
        if values.get(key):
            values[key] = str(Path(str(values[key])).absolute())
    preset = read_preset(flags["preset"])
    try:
        config = override(TrainConfig(), preset)
    except UserError as error:
        raise UserError(f"preset {flags['preset']}: {error}") from error
    return override(config, values)


def read_preset(name: str) -> dict[str, Any]:
    """The values of a preset by dotted key. name: a preset's name, or the path of a .toml file."""
    return flatten(read_toml("--preset", name, PRESETS))


def read_toml(flag: str, name: str, folder: Path) -> dict[str, Any]:
    """The tables of a file that a flag gives: a name in our own folder, or the path of a .toml file. Raises UserError
    if there is none, or it cannot be read."""
    path = Path(name)
    if path.suffix != ".toml":
        check_name(flag, name, [p.stem for p in folder.glob("*.toml")])
        path = folder / f"{name}.toml"
    try:
        return tomllib.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{flag}={name} cannot be read: {error}") from error


def set_flags(values: Mapping[str, Any]) -> list[str]:
    """`--set` for each key of plain values: what `parse_assignment` reads back."""
    return [f"--set={key}={json.dumps(value)}" for key, value in values.items()]


def as_flags(message: str) -> str:
    """A message of gan, with the keys of settings replaced by their flags: "batch=3" becomes "--batch=3". Of files that
    strangers made it may quote anything: what a terminal would obey is escaped."""
    message = printable(message)
    if NO_SUCH_KEY in message:  # a key in a preset or in --set, where the user wrote the key and not a flag
        return message
    names = {key: setting.flag for key, setting in flagged().items()} | ARGUMENTS
    for key, flag in names.items():
        # A key without a dot may be an ordinary word: it is a key only if "=" follows. A "/" shows a path instead.
        value = "(?==)" if key in (*PATHS, *ARGUMENTS) else r"(?==[^\s/]*(?:[\s;,)]|$))"
        ending = r"(?![\w/]|\.\w)" if "." in key else value
        message = re.sub(rf"(?<![\w.\-/]){re.escape(key)}{ending}", flag, message)
    return message


def noise_format(resolution: int) -> "ImageFormat":
    """Color images from 4x4 to a resolution. Raises UserError where that is not 4, 8, 16, ..."""
    from gan.networks import ImageFormat

    last = resolution.bit_length() - 3
    if last < 0 or 4 << last != resolution:
        raise UserError(f"resolution={resolution} is not 4, 8, 16, ...")
    return ImageFormat(channels=3, base=(4, 4), last=last, class_names=(), dataset_hash="noise")


def image_format(dataset: "Dataset", config: TrainConfig) -> "ImageFormat":
    """What the networks must know about the dataset. Raises UserError for a resolution or labels that it lacks."""
    from gan.networks import ImageFormat

    manifest = dataset.manifest
    sides = {max(manifest.size(level)): level for level in manifest.levels}
    wanted = config.data.resolution or max(sides)
    stored = ", ".join(str(side) for side in sorted(sides))
    if wanted not in sides:
        raise UserError(
            f"data.resolution={wanted}: {dataset.path} has sizes {stored}; choose one of them, or prepare it again"
        )
    last = sides[wanted]
    if config.growth.mode == "progressive" and set(range(last)) - set(manifest.levels):
        raise UserError(
            f"{dataset.path} has only sizes {stored}, and growing starts at {max(manifest.base)}; "
            "prepare it with all levels, or --set growth.mode=none"
        )
    classes = tuple(manifest.classes or ())
    if config.data.cond and not classes:
        vectors = manifest.label_dim and "vectors for labels, which cannot be trained on yet"
        raise UserError(
            f"data.cond=1 needs class labels and {dataset.path} has {vectors or 'none'}; "
            "put each class in a folder of its own"
        )
    return ImageFormat(manifest.channels, manifest.base, last, classes, manifest.content_hash)
