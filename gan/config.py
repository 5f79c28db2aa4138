"""The configuration: frozen typed dataclasses, filled by defaults < preset < flags < `--set`.

Everything outside `RunConfig` decides the trajectory and enters its hash, but for what OUTSIDE names; `RunConfig`
decides how long, how loud and how often a run writes.
"""

import difflib
import functools
import math
import tomllib
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import cache
from typing import Any

from gan.errors import UserError

TRAJECTORY_FORMAT = 1
NO_SUCH_KEY = "no such key"
# Keys that change rounding at most, and no run into another.
OUTSIDE = ("run.", "data.check", "distributed.micro", "distributed.timeout")


TINY = 1e-30  # lower bound of what must be positive
HUGE = 1e30  # upper bound of what may be large
WHOLE = 2**31 - 1  # upper bound of what is counted


def setting(
    default: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: Sequence[str] = (),
    flag: str = "",
    help: str = "",
) -> Any:
    """A field with what is known of it, all in one place.

    low, high: bounds, included, of a number or of each number of a tuple; outside a run would crash or be quietly
    spoiled. choices: the names it may be. flag, help: the option of `saddle train` that sets it, and its help.
    """
    known = {"low": low, "high": high, "choices": tuple(choices), "flag": flag, "help": help}
    return field(default=default, metadata=known)


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    z_dim: int = setting(512, low=1, high=65536)  # length of a latent
    widths: tuple[int, ...] = ()  # channels per stage, coarsest first; empty: min(channel_base / side, channel_max)
    channel_base: int = setting(16384, low=1, high=WHOLE)  # channels x side of a stage's plane, without widths
    channel_max: int = setting(512, low=1, high=65536)
    filter: tuple[float, ...] = (1.0, 3.0, 3.0, 1.0)  # taps of the resampling filter; (1, 1) is nearest and mean
    minibatch_stddev: bool = True  # give D the standard deviation inside each coupling group (Karras et al. 2018, 3)


@dataclass(frozen=True, kw_only=True)
class GrowthConfig:
    # progressive, or none: train at the final resolution from the start
    mode: str = setting("progressive", choices=("progressive", "none"))
    # share of the run per stage; empty: the last stage half, the others equal parts
    shares: tuple[float, ...] = setting((), low=TINY, high=HUGE)
    fade: float = setting(0.3, low=0, high=1)  # share of each stage after the first in which it fades in
    # instead of shares: length of every stage but the last, in thousands of images
    kimg: tuple[float, ...] = setting((), low=TINY, high=1e9)
    fade_kimg: float = setting(600.0, low=0, high=1e9)  # with kimg: length of each fade


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    # a row of gan.methods.objectives.OBJECTIVES
    name: str = setting("nonsaturating", flag="--objective", help="A name below, with parameters as in f:jsw:pi=0.3.")


@dataclass(frozen=True, kw_only=True)
class RegularizerConfig:
    # a row of gan.methods.regularizers.REGULARIZERS
    name: str = setting("r1", flag="--regularizer", help="A name below, with parameters as in wgan_gp:target=1.")
    # auto is the weight of Karras et al. 2020a
    gamma: float | str = setting(
        1.0,
        low=0,
        high=HUGE,
        choices=("auto",),
        flag="--gamma",
        help="Weight of the penalty: D's loss adds gamma / 2 * penalty; auto: 0.0002 * pixels / batch.",
    )
    every: int = setting(1, low=1, high=WHOLE)  # lazily: on every k-th step, times k (Karras et al. 2020, appendix B)
    decay: str = setting("constant", choices=("constant", "cosine", "exponential"))  # how gamma changes ...
    decay_to: float = setting(0.1, low=TINY, high=HUGE)  # ... to this multiple of itself ...
    decay_kimg: float = setting(0.0, low=0, high=1e9)  # ... over so many thousands of images, after which it stays


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    g_lr: float = setting(0.002, low=TINY, high=HUGE)
    d_lr: float = setting(0.002, low=TINY, high=HUGE)
    betas: tuple[float, float] = setting((0.0, 0.99), low=0, high=1 - 1e-9)
    eps: float = setting(1e-8, low=0, high=1)
    decay_from: float = setting(1.0, low=0, high=1)  # share of the run after which learning rates fall linearly ...
    decay_to: float = setting(1.0, low=0, high=1)  # ... to this multiple of themselves at its end
    n_critic: int = setting(1, low=1, high=WHOLE)  # D updates per G update


@dataclass(frozen=True, kw_only=True)
class EMAConfig:
    kimg: float = setting(10.0, low=0, high=1e9)  # half-life of the generator's average, in thousands of images
    # the half-life is at most this share of the images seen since the parameter's stage began
    rampup: float = setting(0.05, low=0, high=1e9)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    resolution: int = setting(
        0,
        low=0,
        high=WHOLE,
        flag="--resolution",
        help="Longer side at which training ends; 0: the dataset's largest.",
    )
    cond: bool = setting(False, flag="--cond", help="Condition on the class labels.")
    mirror: bool = setting(False, flag="--mirror", help="Flip images left-right at random.")
    # the shuffle moves blocks of so many neighboring records, for disks that are slow at single ones
    block: int = setting(1, low=1, high=WHOLE)
    aug: str = setting(
        "none",
        choices=("none", "diff"),
        flag="--aug",
        help="none | diff: D sees reals and fakes moved, zoomed, recolored and partly covered at random.",
    )
    # verify the checksums of records while training: never, in the first epoch of each stage, or always
    check: str = setting("first", choices=("never", "first", "always"))


@dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    group: int = setting(4, low=1, high=WHOLE)  # coupling group: a block of the global batch that stays on one rank
    deterministic: bool = False  # on CUDA: deterministic algorithms, at some cost
    # samples of a rank per backward, in whole coupling groups, to save memory; 0: its whole share
    micro: int = setting(0, low=0, high=WHOLE)
    # bf16: gradients are sent in bfloat16 and summed in their own type
    compress: str = setting("none", choices=("none", "bf16"))
    # seconds that a collective may take before the rank that waits gives up
    timeout: float = setting(300.0, low=1, high=1e9)
    exact: bool = False  # gradients of single coupling groups, summed in a fixed tree: the same bits on any ranks


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    dtype: str = setting("float32", choices=("float32", "float64"))  # of weights and of all arithmetic


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    kimg: float = setting(
        1000.0, low=TINY, high=1e9, flag="--kimg", help="Length of the run in thousands of real images shown to D."
    )
    tick: float = setting(4.0, low=TINY, high=1e9, flag="--tick", help="kimg between status lines.")
    snap: int = setting(
        50, low=1, high=WHOLE, flag="--snap", help="Ticks between snapshots, grids and training states."
    )
    keep: int = setting(2, low=1, high=WHOLE)  # training states kept ...
    milestone: float = setting(0.0, low=0, high=1e9)  # ... and the first of every so many kimg, for ever; 0: none
    threads: int = setting(0, low=0, high=4096)  # intra-op threads of a rank; 0: the host's cores / its ranks
    workers: int = setting(
        1, low=0, high=64, flag="--workers", help="Threads per rank that read and decode ahead; 0: the step does."
    )
    # of the dataset's file, in this process's resident memory
    pages: str = setting("keep", choices=("keep", "drop"))
    cache: str = setting(
        "", flag="--cache", help="Folder on this node's disk for a copy of the dataset, to read from there."
    )
    max_skipped: int = setting(10, low=1, high=WHOLE)  # steps in a row that non-finite values may void
    # seconds without a completed step after which a rank ends itself, saying for whom it waits
    watchdog: float = setting(600.0, low=1, high=1e9)
    desc: str = setting("", flag="--desc", help="Added to the name of the run's directory.")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything a run is told. Raises UserError on values that cannot be."""

    model: str = setting("gan", flag="--model", help="What kind of model to train.")  # a row of gan.families.FAMILIES
    seed: int = setting(0, low=0, high=2**63 - 1, flag="--seed", help="Of the weights, the data order and every draw.")
    batch: int = setting(32, low=1, high=WHOLE, flag="--batch", help="Global batch over all ranks: reals per D update.")
    init_from: str = setting("", flag="--init-from", help="Start from the weights of a snapshot or a training state.")
    network: NetworkConfig = field(default_factory=NetworkConfig)
    growth: GrowthConfig = field(default_factory=GrowthConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    regularizer: RegularizerConfig = field(default_factory=RegularizerConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    data: DataConfig = field(default_factory=DataConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        for key, known in settings().items():
            _check_setting(key, value_of(self, key), known)
        for holds, message in _rules(self):
            if not holds:
                raise UserError(message)


@dataclass(frozen=True)
class Setting:
    """What is known of a key, beside its value."""

    kind: Any  # its type
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    flag: str = ""
    help: str = ""
    default: Any = None


@cache
def settings() -> dict[str, Setting]:
    """Every key that can be set, by its dotted name."""
    return dict(_settings(TrainConfig, ""))


def _settings(section: Any, prefix: str) -> Iterator[tuple[str, Setting]]:
    kinds = typing.get_type_hints(section)
    for f in fields(section):
        kind = kinds[f.name]
        if is_dataclass(kind):
            yield from _settings(kind, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, Setting(kind, default=f.default, **f.metadata)


def value_of(config: TrainConfig, key: str) -> Any:
    """The value of a dotted key."""
    return functools.reduce(getattr, key.split("."), config)


def _check_setting(key: str, value: Any, known: Setting) -> None:
    """Raises UserError for a name that is not among the choices, and a number that is out of bounds."""
    if isinstance(value, str) and known.choices and value not in known.choices:
        other = "; or give a number" if known.low is not None else ""
        raise UserError(choice(key, value, known.choices)[1] + other)
    if known.low is None or known.high is None or isinstance(value, str):
        return
    for number in value if isinstance(value, tuple) else (value,):
        if not known.low <= number <= known.high:
            raise UserError(f"{key}={number} must be {_interval(known.low, known.high, number)}")


def _rules(c: TrainConfig) -> Iterable[tuple[bool, str]]:
    """(must hold, what to say if it does not) for what one setting alone does not show."""
    group = c.distributed.group
    near = max(round(c.batch / group), 1) * group
    yield (
        c.batch % group == 0,
        f"batch={c.batch} is not a multiple of the coupling group of {group} (distributed.group); try batch={near}",
    )
    taps = c.network.filter
    yield all(map(math.isfinite, taps)) and sum(taps) != 0, f"network.filter {list(taps)} must be finite, with a sum"
    slashes = set(c.run.desc) & set("/\\\0")
    yield not slashes, f"run.desc={c.run.desc} becomes part of a folder's name: leave out slashes"
    decays = c.regularizer.decay != "constant"
    yield not decays or c.regularizer.decay_kimg > 0, f"regularizer.decay={c.regularizer.decay} needs decay_kimg"
    alone = c.distributed.compress == "none" and c.distributed.micro == 0
    yield not c.distributed.exact or alone, "distributed.exact excludes distributed.compress and distributed.micro"
    yield not (c.growth.shares and c.growth.kimg), "growth.shares and growth.kimg exclude each other"


def _interval(low: float, high: float, number: float) -> str:
    """The interval in words; an upper bound that nobody comes near is said only to who is beyond it."""
    above = "positive" if 0 < low < 1e-9 else f"at least {low}"
    far = high >= 1e9 or high == WHOLE
    return above if far and not number > high else f"{above} and at most {high:g}"


def choice(what: str, name: str, known: Iterable[str]) -> tuple[bool, str]:
    """(is it known, the message that names the nearest ones if it is not)."""
    return name in known, f"{what}={name} is unknown; {nearest(name, known)}"


def nearest(name: str, known: Iterable[str]) -> str:
    """'did you mean a or b?' or, where nothing is near, the list of names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"


def override(config: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
    """Replace fields by dotted key ("regularizer.gamma"). Raises UserError for unknown keys and wrong types."""
    sections: dict[str, dict[str, Any]] = {"": {}}
    known = settings()
    for key, value in values.items():
        if key not in known:
            raise UserError(f"{key}: {NO_SUCH_KEY}; {nearest(key, known)}")
        section, _, name = key.rpartition(".")
        sections.setdefault(section, {})[name] = _coerce(key, value, known[key].kind)
    top = sections.pop("")
    return replace(config, **top, **{name: replace(getattr(config, name), **new) for name, new in sections.items()})


def parse_assignment(text: str) -> tuple[str, Any]:
    """ "key=value" -> (key, value), the value as TOML reads it, or the bare text."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"--set {text}: write KEY=VALUE, as in --set regularizer.every=4")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables of a preset -> dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in table.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def trajectory(config: TrainConfig) -> dict[str, Any]:
    """What decides the weights: the keys but OUTSIDE that differ from their defaults, so that a key added later
    leaves the runs of today what they are. Whoever changes a default raises TRAJECTORY_FORMAT."""
    default = flatten(asdict(TrainConfig()))
    changed = {k: v for k, v in flatten(asdict(config)).items() if v != default[k] and not k.startswith(OUTSIDE)}
    return {"format": TRAJECTORY_FORMAT, **changed}


def from_dict(values: Mapping[str, Any]) -> TrainConfig:
    """The inverse of `dataclasses.asdict`."""
    return override(TrainConfig(), flatten(values))


def _coerce(key: str, value: Any, kind: Any) -> Any:
    """Accept int for float, 0/1 for bool, a list or "1,2" for a tuple; anything else of another type is an error.
    Where a number or a word may stand, whatever reads as a number is one."""
    origin = typing.get_origin(kind)
    if kind == float | str:
        value = parse_assignment(f"value={value}")[1] if isinstance(value, str) else value
        kind = str if isinstance(value, str) else float
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else _split(value)
        item_kind, *rest = typing.get_args(kind)
        if rest != [Ellipsis] and len(items) != 1 + len(rest):
            raise UserError(f"{key}: wants {1 + len(rest)} values, got {value!r}")
        return tuple(_coerce(key, item, item_kind) for item in items)
    if kind is str:
        return str(value)
    if kind is bool and value in (0, 1):
        return bool(value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise UserError(f"{key}: wants {kind.__name__}, got {value!r}")
    return value


def _split(value: Any) -> list[Any]:
    return [parse_assignment(f"item={part}")[1] for part in str(value).split(",")]
