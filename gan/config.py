"""The configuration: frozen typed dataclasses, filled by defaults < preset < flags < `--set`.

A run's trajectory is the sequence of its weights. All settings decide it and enter its hash, except those that OUTSIDE
names: all of `RunConfig`, which says how long a run is and how often it logs and saves, and a few others.
"""

import difflib
import functools
import tomllib
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import cache
from typing import Any

from gan.errors import UserError

TRAJECTORY_FORMAT = 2
NO_SUCH_KEY = "no such key"
# Keys, or beginnings of keys, that are not part of the trajectory: they change the weights by rounding at most.
OUTSIDE = ("run.", "network.recompute", "data.check", "distributed.micro", "distributed.timeout")


TINY = 1e-30  # lower bound of values that must be positive
HUGE = 1e30  # upper bound of values that may be large
WHOLE = 2**31 - 1  # upper bound of integers
MOST_THREADS = 4096
MOST_DEPTH = 8  # of tables in tables


def setting(
    default: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: Sequence[str] = (),
    flag: str = "",
    help: str = "",
) -> Any:
    """A dataclass field with its bounds, its choices and its option on the command line.

    low, high: inclusive bounds of a number, or of each number of a tuple; beyond them a run would crash or train
    wrongly without a message. choices: the allowed names. flag, help: the option of `saddle train` that sets the field,
    and its help.
    """
    known = {"low": low, "high": high, "choices": tuple(choices), "flag": flag, "help": help}
    return field(default=default, metadata=known)


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    z_dim: int = setting(512, low=1, high=65536)  # length of a latent
    # of conditional runs: size of the class's part of G's input, where z's part has 1. At 1 images of a class are alike
    # for long; at .3 the class makes a twelfth of what the first layer sees
    class_gain: float = setting(1.0, low=TINY, high=HUGE)
    # channels per stage, coarsest first; empty: min(channel_base / side, channel_max)
    widths: tuple[int, ...] = setting((), low=1, high=65536)
    channel_base: int = setting(16384, low=1, high=WHOLE)  # used where widths is empty, as is channel_max
    channel_max: int = setting(512, low=1, high=65536)
    filter: tuple[float, ...] = (1.0, 3.0, 3.0, 1.0)  # taps of the resampling filter; (1, 1) is nearest and mean
    depth: int = setting(1, low=1, high=1000)  # residual blocks of each stage after the first, of two convolutions each
    # share of a block's variance that its convolutions make at first, the skip connection the rest; 1: there is none
    residual: float = setting(0.5, low=TINY, high=1)
    minibatch_stddev: bool = True  # D sees the standard deviation over each coupling group (Karras et al. 2018, 3)
    # blocks of this stage and later ones are computed again in the backward pass, to save memory; 0: none
    recompute: int = setting(0, low=0, high=WHOLE)


@dataclass(frozen=True, kw_only=True)
class GrowthConfig:
    # progressive, or none: train at the final resolution from the start
    mode: str = setting("progressive", choices=("progressive", "none"))
    # share of the run per stage; empty: half for the last stage, equal parts of the other half for the others
    shares: tuple[float, ...] = setting((), low=TINY, high=HUGE)
    fade: float = setting(0.3, low=0, high=1)  # share of each stage after the first in which it fades in
    # instead of shares: length of every stage but the last, in thousands of images
    kimg: tuple[float, ...] = setting((), low=TINY, high=1e9)
    fade_kimg: float = setting(600.0, low=0, high=1e9)  # with kimg: length of each fade


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    # a row of gan.methods.objectives.OBJECTIVES
    name: str = setting(
        "nonsaturating",
        flag="--objective",
        help="One of the objectives listed below; parameters follow a colon, as in f:jsw:pi=0.3.",
    )


@dataclass(frozen=True, kw_only=True)
class RegularizerConfig:
    # a row of gan.methods.regularizers.REGULARIZERS
    name: str = setting(
        "r1",
        flag="--regularizer",
        help="One of the regularizers listed below, or several, as in r1+spectral_norm; parameters follow a colon, as "
        "in wgan_gp:target=1.",
    )
    # auto: a weight for these networks at any resolution (gan/schedules.py)
    gamma: float | str = setting(
        1.0,
        low=0,
        high=HUGE,
        choices=("auto",),
        flag="--gamma",
        help="Weight of the penalty: D's loss adds gamma / 2 * penalty; auto: 0.04 * pixels, stage by stage.",
    )
    # lazy regularization: the penalty is added on every k-th step, times k (Karras et al. 2020, appendix B)
    every: int = setting(1, low=1, high=WHOLE)
    # the penalty is computed on this share of the batch, in whole blocks, in turns, and weighs 1 / share times as much
    share: float = setting(1.0, low=TINY, high=1)
    decay: str = setting("constant", choices=("constant", "cosine", "exponential"))  # how gamma changes ...
    decay_to: float = setting(0.1, low=TINY, high=HUGE)  # ... to this multiple of its initial value ...
    # ... over the first decay_kimg thousand images, 0: over the whole run; then it stays
    decay_kimg: float = setting(0.0, low=0, high=1e9)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    # learning rates at the beginning; auto: 0.08 / sqrt(channels of the widest stage) (gan/schedules.py)
    g_lr: float | str = setting(0.002, low=TINY, high=HUGE, choices=("auto",))
    d_lr: float | str = setting(0.002, low=TINY, high=HUGE, choices=("auto",))
    betas: tuple[float, float] = setting((0.0, 0.99), low=0, high=1 - 1e-9)
    eps: float = setting(1e-8, low=0, high=1)
    decay_from: float = setting(1.0, low=0, high=1)  # share of the run after which learning rates fall linearly ...
    decay_to: float = setting(1.0, low=0, high=1)  # ... to this multiple of their initial value at its end
    n_critic: int = setting(1, low=1, high=WHOLE)  # D updates per G update


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    # a row of gan.vae.likelihoods.LIKELIHOODS; of pixels, given a latent
    likelihood: str = setting("gaussian", choices=("gaussian", "bernoulli", "logistic"))
    # standard deviation of a gaussian likelihood, pixels being in [-1, 1]: a number; learned: by gradients; auto: the
    # root mean square error of recent batches, which is the best one for them (Rybkin et al. 2021)
    scale: float | str = setting("auto", low=TINY, high=HUGE, choices=("auto", "learned"))
    posterior: str = "diagonal"  # a row of gan.vae.posteriors.POSTERIORS; parameters follow a colon
    bound: str = setting("elbo", choices=("elbo", "iwae"))  # what is maximized
    samples: int = setting(1, low=1, high=4096)  # latents per image
    # of iwae: reparameterized, or doubly: less noise where the posterior's density is known everywhere; auto: doubly
    # where that is so
    gradient: str = setting("auto", choices=("auto", "reparameterized", "doubly"))
    warmup_kimg: float = setting(0.0, low=0, high=1e9)  # the divergence's weight rises from 0 to 1 in so many kimg
    free_bits: float = setting(0.0, low=0, high=HUGE)  # of an image's divergence, that cost nothing
    # units per layer of fully connected networks, in place of convolutions; empty: convolutions
    hidden: tuple[int, ...] = setting((), low=1, high=65536)
    binarize: bool = False  # pixels become black or white at random, anew each time, white as often as they are bright


@dataclass(frozen=True, kw_only=True)
class EMAConfig:
    kimg: float = setting(10.0, low=0, high=1e9)  # half-life of the generator's average, in thousands of images
    # bounds the half-life by this share of the images seen since the parameter's stage began; 0: no such bound
    rampup: float = setting(0.05, low=0, high=1e9)
    # more averages, each kept at every snapshot, from which `saddle average` makes those of other lengths after
    # training (gan/posthoc.py): their standard deviations as shares of the training time, as 0.05,0.1; empty: none
    posthoc: tuple[float, ...] = setting((), low=0.01, high=0.28)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    resolution: int = setting(
        0,
        low=0,
        high=WHOLE,
        flag="--resolution",
        help="Final resolution: the longer side, in pixels; 0: the dataset's largest.",
    )
    cond: bool = setting(False, flag="--cond", help="Condition on the class labels.")
    mirror: bool = setting(False, flag="--mirror", help="Flip images left-right at random.")
    # records per block: the shuffle moves blocks of neighboring records, for disks that are slow at random reads
    block: int = setting(1, low=1, high=WHOLE)
    # every coupling group (distributed.group) has images of one class, which is what vae.posterior=grouped needs
    grouped: bool = False
    aug: str = setting(
        "none",
        choices=("none", "diff", "ada"),  # rows of gan.methods.augment.AUGMENTATIONS
        flag="--aug",
        help="none | diff: differentiable augmentation; D sees reals and fakes randomly moved, zoomed, recolored, "
        "partly covered and, with --mirror, flipped | ada: adaptive, for small datasets: only as many of these changes "
        "as keep D from learning the dataset by heart.",
    )
    # with ada: the share of reals that D calls real less the share that it calls fake, above which there are more
    # changes, and below which fewer (Karras et al. 2020a, section 3.1)
    aug_target: float = setting(0.6, low=-1, high=1)
    # with ada: thousands of images in which the probability of a change rises from 0 to 1, if it only rises
    aug_kimg: float = setting(500.0, low=TINY, high=1e9)
    # when training verifies the checksums of the records that it reads: never, in each stage's first epoch, or always
    check: str = setting("first", choices=("never", "first", "always"))


@dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    # coupling group: samples that stay together on one rank; minibatch statistics are computed inside a group
    group: int = setting(4, low=1, high=WHOLE)
    deterministic: bool = False  # on CUDA: use deterministic algorithms, which are somewhat slower
    # samples of a rank per backward pass, in whole coupling groups, to save memory; 0: its whole share of the batch;
    # auto: as many as the device has memory for
    micro: int | str = setting(0, low=0, high=WHOLE, choices=("auto",))
    # bf16: ranks send gradients in bfloat16 and sum them in the gradients' own type
    compress: str = setting("none", choices=("none", "bf16"))
    # seconds after which a rank that waits in a collective gives up
    timeout: float = setting(300.0, low=1, high=1e9)
    # sum the gradients of single blocks of groups in a fixed tree: bit-equal results for any number of ranks
    exact: bool = False


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    dtype: str = setting("float32", choices=("float32", "float64"))  # of weights, optimizer, losses and sums
    # of convolutions and activations: fp32 is the weights' dtype; auto is bf16 on a GPU that has it and a CPU with AMX
    compute: str = setting("auto", choices=("auto", "fp32", "bf16"))
    # of passes through D that a gradient penalty differentiates: as the others, or fp32
    penalty: str = setting("compute", choices=("compute", "fp32"))


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    kimg: float = setting(
        1000.0, low=TINY, high=1e9, flag="--kimg", help="Length of the run in thousands of real images shown to D."
    )
    tick: float = setting(4.0, low=TINY, high=1e9, flag="--tick", help="kimg between status lines.")
    snap: int = setting(
        50, low=1, high=WHOLE, flag="--snap", help="Ticks between snapshots, grids and training states."
    )
    keep: int = setting(2, low=1, high=WHOLE)  # how many of the newest training states are kept
    # the first training state at or past each multiple of this many kimg is never removed; 0: no such states
    milestone: float = setting(0.0, low=0, high=1e9)
    # capture steps as CUDA graphs, which changes no bit: auto and 1 where they can be had, 0 never
    graphs: str = setting("auto", choices=("auto", "0", "1"))
    threads: int = setting(0, low=0, high=MOST_THREADS)  # intra-op threads of a rank; 0: the host's cores / its ranks
    workers: int = setting(
        1,
        low=0,
        high=64,
        flag="--workers",
        help="Threads per rank that read and decode images ahead; 0: the training thread does it.",
    )
    # keep or drop the pages of the dataset's file that were read, in this process's resident memory
    pages: str = setting("keep", choices=("keep", "drop"))
    cache: str = setting(
        "", flag="--cache", help="Copy the dataset into this folder, on this node's own disk, and read it from there."
    )
    max_skipped: int = setting(10, low=1, high=WHOLE)  # the run stops after so many non-finite steps in a row
    metrics: str = setting(
        "none",
        flag="--metrics",
        help="Score snapshots by these metrics, in a process beside the training: fd,kid,... as `saddle evaluate "
        "--help` lists them; the first one chooses the best snapshot.",
    )
    features: str = setting(
        "classifier", flag="--features", help="With --metrics: what compares images, as for `saddle evaluate`."
    )
    metric_samples: int = setting(10_000, low=1, high=WHOLE)  # of each snapshot
    # where that process works: cuda is rank 0's GPU, in memory that the training leaves
    metric_device: str = setting("cpu", choices=("cpu", "cuda"))
    # seconds without a completed step after which a rank ends itself and says which rank it waited for
    watchdog: float = setting(600.0, low=1, high=1e9)
    desc: str = setting("", flag="--desc", help="Added to the name of the run's directory.")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All settings of a run. Raises UserError for values that are not allowed."""

    model: str = setting("gan", flag="--model", help="What kind of model to train.")  # a row of gan.families.FAMILIES
    seed: int = setting(
        0, low=0, high=2**63 - 1, flag="--seed", help="Seed of the weights, the data order and all random draws."
    )
    batch: int = setting(
        32, low=1, high=WHOLE, flag="--batch", help="Global batch: reals per D update, over all processes."
    )
    init_from: str = setting("", flag="--init-from", help="Start from weights of a snapshot, training state or run.")
    network: NetworkConfig = field(default_factory=NetworkConfig)
    growth: GrowthConfig = field(default_factory=GrowthConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    regularizer: RegularizerConfig = field(default_factory=RegularizerConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
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
    """A key's type, bounds, choices, option and default."""

    kind: Any  # the type
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


def refuse_others(config: TrainConfig, foreign: tuple[str, ...], because: str = "") -> None:
    """Raises UserError if a setting that does nothing for this kind of model has been changed. foreign: the beginnings
    of their keys. because: what makes them do nothing, if it is not the model."""
    because = because or f"model={config.model}"
    for key, known in settings().items():
        if key.startswith(foreign) and value_of(config, key) != known.default:
            raise UserError(
                f"{key}={value_of(config, key)} does nothing with {because}; leave it out, here or with the preset"
            )


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
    if isinstance(value, str) and known.choices:
        check_name(key, value, known.choices, "; or give a number" if known.low is not None else "")
    if known.low is None or known.high is None or isinstance(value, str):
        return
    for number in value if isinstance(value, tuple) else (value,):
        if not known.low <= number <= known.high:
            raise UserError(f"{key}={number} must be {_interval(known.low, known.high, number)}")


def _rules(c: TrainConfig) -> Iterable[tuple[bool, str]]:
    """Rules that concern several settings, or more than bounds: (does it hold, the message if it does not)."""
    group = c.distributed.group
    near = max(round(c.batch / group), 1) * group
    yield (
        c.batch % group == 0,
        f"batch={c.batch} is not a multiple of the coupling group of {group} (distributed.group); try batch={near}",
    )
    taps = c.network.filter
    yield (
        all(abs(tap) <= HUGE for tap in taps) and sum(taps) != 0,
        f"network.filter {list(taps)} must be of numbers of at most {HUGE:g}, and its sum must not be 0",
    )
    slashes = set(c.run.desc) & set("/\\\0")
    yield not slashes, f"run.desc={c.run.desc} becomes part of a folder's name: leave out slashes"
    alone = c.distributed.compress == "none" and c.distributed.micro == 0
    yield (
        not c.distributed.exact or alone,
        "distributed.exact works neither with distributed.compress nor with distributed.micro; leave them out",
    )
    yield (
        not c.data.grouped or c.data.block == 1,
        "data.grouped orders the data by classes and data.block by place; leave one out",
    )
    yield not (c.growth.shares and c.growth.kimg), "growth.shares and growth.kimg were both given; leave one out"


def _interval(low: float, high: float, number: float) -> str:
    """The interval in words. A very high upper bound is named only if the number is above it."""
    above = "positive" if 0 < low < 1e-9 else f"at least {low}"
    far = high >= 1e9 or high == WHOLE
    return above if far and not number > high else f"{above} and at most {high:g}"


def check_name(what: str, name: str, known: Collection[str], ending: str = "") -> None:
    """Raises UserError for a name that is not among the known ones. The message names the nearest."""
    if name not in known:
        raise UserError(f"{what}={name:.100} is unknown; {nearest(name, known)}{ending}")


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
            raise UserError(f"{key:.100}: {NO_SUCH_KEY}; {nearest(key, known)}")
        section, _, name = key.rpartition(".")
        sections.setdefault(section, {})[name] = _coerce(key, value, known[key].kind)
    top = sections.pop("")
    return replace(config, **top, **{name: replace(getattr(config, name), **new) for name, new in sections.items()})


def parse_assignment(text: str) -> tuple[str, Any]:
    """ "key=value" -> (key, value), the value as TOML reads it, or the bare text, as always where a word is wanted."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"--set {text:.100}: write KEY=VALUE, as in --set regularizer.every=4")
    key = key.strip()
    try:
        read = tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError):  # of what is no TOML, or a number of thousands of digits
        if value.lstrip().startswith("[") and key in settings() and settings()[key].kind is not str:
            raise UserError(f"{text:.100} is no list; write it like [0.5, 1]") from None
        return key, value.strip()
    is_text = (key in settings() and settings()[key].kind is str) or set(value) & set("#\n")
    return key, value.strip() if is_text and not isinstance(read, str) else read


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables of a preset -> dotted keys. Raises UserError for tables in tables in tables without end."""
    if prefix.count(".") > MOST_DEPTH:
        raise UserError(f"{prefix[:40]}: tables are nested too deeply")
    flat: dict[str, Any] = {}
    for name, value in table.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def trajectory(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide the weights: all keys outside of OUTSIDE that differ from their defaults.

    Defaults are left out so that a key that is added later does not change the hash of older runs. Whoever changes a
    default must raise TRAJECTORY_FORMAT.
    """
    default = flatten(asdict(TrainConfig()))
    changed = {k: v for k, v in flatten(asdict(config)).items() if v != default[k] and not k.startswith(OUTSIDE)}
    return {"format": TRAJECTORY_FORMAT, **changed}


def from_dict(values: Mapping[str, Any]) -> TrainConfig:
    """The inverse of `dataclasses.asdict`."""
    return override(TrainConfig(), flatten(values))


def _coerce(key: str, value: Any, kind: Any) -> Any:
    """Convert a value to a key's type: int to float, 0/1 to bool, a list or "1,2" to a tuple. For a number or a word,
    text that reads as a number becomes one. Raises UserError for any other type."""
    origin = typing.get_origin(kind)
    if kind in (float | str, int | str):
        value = parse_assignment(f"value={value}")[1] if isinstance(value, str) else value
        kind = str if isinstance(value, str) else typing.get_args(kind)[0]
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else _split(value)
        item_kind, *rest = typing.get_args(kind)
        if rest != [Ellipsis] and len(items) != 1 + len(rest):
            raise UserError(f"{key}: wants {1 + len(rest)} values, got {value!r:.100}")
        return tuple(_coerce(key, item, item_kind) for item in items)
    if kind is str and type(value) is int:
        return str(value)
    if kind is bool and value in (0, 1):
        return bool(value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise UserError(f"{key}: wants {kind.__name__}, got {value!r:.100}")
    return value


def _split(value: Any) -> list[Any]:
    return [parse_assignment(f"item={part}")[1] for part in str(value).split(",")]
