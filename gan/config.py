"""The configuration: frozen typed dataclasses, filled by defaults < preset < flags < `--set`.

Everything outside `RunConfig` decides the trajectory and enters its hash, but for what OUTSIDE names; `RunConfig`
decides how long, how loud and how often a run writes.
"""

import difflib
import math
import tomllib
import typing
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any

from gan.errors import UserError

TRAJECTORY_FORMAT = 1
OUTSIDE = (
    "run.",
    "distributed.micro",
    "distributed.timeout",
)  # keys that change rounding at most, and no run into another


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    z_dim: int = 512  # length of a latent
    widths: tuple[int, ...] = ()  # channels per stage, coarsest first; empty: min(channel_base / side, channel_max)
    channel_base: int = 16384  # channels x side of a stage's plane, where widths are not given
    channel_max: int = 512
    filter: tuple[float, ...] = (1.0, 3.0, 3.0, 1.0)  # taps of the resampling filter; (1, 1) is nearest and mean
    minibatch_stddev: bool = True  # give D the standard deviation inside each coupling group (Karras et al. 2018, 3)


@dataclass(frozen=True, kw_only=True)
class GrowthConfig:
    mode: str = "progressive"  # progressive | none (train at the final resolution from the start)
    shares: tuple[float, ...] = ()  # share of the run per stage; empty: the last stage half, the others equal parts
    fade: float = 0.3  # share of each stage after the first in which it fades in
    kimg: tuple[float, ...] = ()  # instead of shares: length of every stage but the last, in thousands of images
    fade_kimg: float = 600.0  # with kimg: length of each fade


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    name: str = "nonsaturating"  # a row of gan.methods.objectives.OBJECTIVES, with parameters as in "f:jsw:pi=0.3"


@dataclass(frozen=True, kw_only=True)
class RegularizerConfig:
    name: str = "r1"  # a row of gan.methods.regularizers.REGULARIZERS, with parameters as in "wgan_gp:target=1"
    gamma: float | str = 1.0  # D's loss adds gamma / 2 * penalty; auto: 0.0002 * pixels / batch (Karras et al. 2020a)
    every: int = 1  # lazily: on every k-th step, times k (Karras et al. 2020, appendix B)
    decay: str = "constant"  # constant | cosine | exponential: how gamma changes ...
    decay_to: float = 0.1  # ... to this multiple of itself ...
    decay_kimg: float = 0.0  # ... over so many thousands of images, after which it stays


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    g_lr: float = 0.002
    d_lr: float = 0.002
    betas: tuple[float, float] = (0.0, 0.99)
    eps: float = 1e-8
    decay_from: float = 1.0  # share of the run after which learning rates fall linearly ...
    decay_to: float = 1.0  # ... to this multiple of themselves at its end
    n_critic: int = 1  # D updates per G update


@dataclass(frozen=True, kw_only=True)
class EMAConfig:
    kimg: float = 10.0  # half-life of the generator's average, in thousands of images
    rampup: float = 0.05  # the half-life is at most this share of the images seen since the parameter's stage began


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    resolution: int = 0  # longer side at which training ends; 0: the dataset's largest
    cond: bool = False  # condition on the class labels
    mirror: bool = False  # flip each real left-right with probability 1/2
    block: int = 1  # the shuffle moves blocks of so many neighboring records, for disks that are slow at single ones
    aug: str = (
        "none"  # diff: D sees reals and fakes changed at random, and G learns through it (gan/methods/augment.py)
    )


@dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    group: int = 4  # coupling group: a block of the global batch that stays on one rank
    deterministic: bool = False  # on CUDA: deterministic algorithms, at some cost
    micro: int = 0  # samples of a rank per backward, in whole coupling groups, to save memory; 0: its whole share
    compress: str = "none"  # none | bf16: gradients are sent in bfloat16 and summed in their own type
    timeout: float = 300.0  # seconds that a collective may take before the rank that waits gives up
    exact: bool = False  # gradients of single coupling groups, summed in a fixed tree: the same bits on any ranks


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    dtype: str = "float32"  # float32 | float64, of weights and of all arithmetic


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    kimg: float = 1000.0  # length of the run, in thousands of real images shown to D
    tick: float = 4.0  # kimg between status lines
    snap: int = 50  # ticks between snapshots, grids and training states
    keep: int = 2  # training states kept ...
    milestone: float = 0.0  # ... and the first of every so many kimg, for ever; 0: none
    threads: int = 0  # intra-op threads of a rank; 0: the cores of the host divided by its ranks
    workers: int = 1  # threads that read and decode batches ahead; 0: the step does it itself
    pages: str = "keep"  # keep | drop: of the dataset's file, in this process's resident memory
    cache: str = ""  # a folder on the node's own disk for a copy of the dataset; empty: read it where it is
    max_skipped: int = 10  # steps in a row that non-finite values may void before the run stops
    watchdog: float = 600.0  # seconds without a completed step after which a rank ends itself, saying for whom it waits
    desc: str = ""  # added to the name of the run's directory


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything a run is told. Raises UserError on values that cannot be."""

    seed: int = 0
    batch: int = 32  # global batch: reals per D update over all ranks
    init_from: str = ""  # a snapshot or training state whose weights are the starting point
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
        for holds, message in _rules(self):
            if not holds:
                raise UserError(message)


def _rules(c: TrainConfig) -> Iterable[tuple[bool, str]]:
    """(must hold, what to say if it does not) for everything that can be checked without the dataset."""
    yield c.distributed.group > 0, f"distributed.group must be positive, got {c.distributed.group}"
    group = max(c.distributed.group, 1)
    near = max(round(c.batch / group), 1) * group
    yield (
        c.batch > 0 and c.batch % group == 0,
        f"--batch={c.batch} is not a multiple of the coupling group of {group} (distributed.group); try --batch={near}",
    )
    for key, value, low, high in _ranges(c):
        yield low <= value <= high, f"{key} must be {_interval(low, high)}, got {value}"
    taps = c.network.filter
    yield all(map(math.isfinite, taps)) and sum(taps) != 0, f"network.filter {list(taps)} must be finite, with a sum"
    yield not set(c.run.desc) & set("/\\\0"), f"--desc={c.run.desc} becomes part of a folder's name: leave out slashes"
    gamma, decays = c.regularizer.gamma, c.regularizer.decay != "constant"
    yield isinstance(gamma, float) or gamma == "auto", f"--gamma={gamma}: give a number, or auto"
    yield choice("regularizer.decay", c.regularizer.decay, ("constant", "cosine", "exponential"))
    yield not decays or c.regularizer.decay_kimg > 0, f"regularizer.decay={c.regularizer.decay} needs decay_kimg"
    yield choice("--aug", c.data.aug, ("none", "diff"))
    yield choice("run.pages", c.run.pages, ("keep", "drop"))
    yield choice("distributed.compress", c.distributed.compress, ("none", "bf16"))
    alone = c.distributed.compress == "none" and c.distributed.micro == 0
    yield not c.distributed.exact or alone, "distributed.exact excludes distributed.compress and distributed.micro"
    yield choice("growth.mode", c.growth.mode, ("progressive", "none"))
    yield choice("precision.dtype", c.precision.dtype, ("float32", "float64"))
    yield not (c.growth.shares and c.growth.kimg), "growth.shares and growth.kimg exclude each other"


def _ranges(c: TrainConfig) -> Iterable[tuple[str, float, float, float]]:
    """(key, value, lowest, highest): numbers outside would crash a run or quietly spoil it."""
    tiny, huge, whole = 1e-30, 1e30, 2**31 - 1
    yield "--seed", c.seed, 0, 2**63 - 1
    yield "--kimg", c.run.kimg, tiny, 1e9
    yield "--tick", c.run.tick, tiny, 1e9
    yield "--gamma", c.regularizer.gamma if isinstance(c.regularizer.gamma, float) else 0, 0, huge
    yield "regularizer.decay_to", c.regularizer.decay_to, tiny, huge
    yield "regularizer.decay_kimg", c.regularizer.decay_kimg, 0, 1e9
    yield "--workers", c.run.workers, 0, 64
    yield "--snap", c.run.snap, 1, whole
    yield "--resolution", c.data.resolution, 0, whole
    yield "data.block", c.data.block, 1, whole
    yield "run.keep", c.run.keep, 1, whole
    yield "run.milestone", c.run.milestone, 0, 1e9
    yield "run.threads", c.run.threads, 0, 4096
    yield "run.watchdog", c.run.watchdog, 1, 1e9
    yield "distributed.timeout", c.distributed.timeout, 1, 1e9
    yield "distributed.micro", c.distributed.micro, 0, whole
    yield "run.max_skipped", c.run.max_skipped, 1, whole
    yield "regularizer.every", c.regularizer.every, 1, whole
    yield "optimizer.n_critic", c.optimizer.n_critic, 1, whole
    yield "optimizer.g_lr", c.optimizer.g_lr, tiny, huge
    yield "optimizer.d_lr", c.optimizer.d_lr, tiny, huge
    yield "optimizer.eps", c.optimizer.eps, 0, 1
    yield "optimizer.decay_from", c.optimizer.decay_from, 0, 1
    yield "optimizer.decay_to", c.optimizer.decay_to, 0, 1
    yield "ema.kimg", c.ema.kimg, 0, 1e9
    yield "ema.rampup", c.ema.rampup, 0, 1e9
    yield "network.z_dim", c.network.z_dim, 1, 65536
    yield "network.channel_base", c.network.channel_base, 1, whole
    yield "network.channel_max", c.network.channel_max, 1, 65536
    yield "growth.fade", c.growth.fade, 0, 1
    yield "growth.fade_kimg", c.growth.fade_kimg, 0, 1e9
    for beta in c.optimizer.betas:
        yield "optimizer.betas", beta, 0, 1 - 1e-9
    for share in c.growth.shares:
        yield "growth.shares", share, tiny, huge
    for kimg in c.growth.kimg:
        yield "growth.kimg", kimg, tiny, 1e9


def _interval(low: float, high: float) -> str:
    """The interval in words; bounds that nobody comes near are not said."""
    above = "positive" if 0 < low < 1e-9 else f"at least {low}"
    return above if high >= 1e9 or high == 2**31 - 1 else f"{above} and at most {high:g}"


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
    known = keys(config)
    for key, value in values.items():
        if key not in known:
            raise UserError(f"{key}: no such key; {nearest(key, known)}")
        section, _, name = key.rpartition(".")
        sections.setdefault(section, {})[name] = _coerce(key, value, known[key])
    top = sections.pop("")
    return replace(config, **top, **{name: replace(getattr(config, name), **new) for name, new in sections.items()})


def keys(config: Any, prefix: str = "") -> dict[str, Any]:
    """{dotted key: type} of every field that can be set."""
    hints = typing.get_type_hints(type(config))
    found: dict[str, Any] = {}
    for f in fields(config):
        value = getattr(config, f.name)
        found |= keys(value, f"{prefix}{f.name}.") if is_dataclass(value) else {prefix + f.name: hints[f.name]}
    return found


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
