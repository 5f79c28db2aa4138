"""Which dtype the convolutions compute in: `precision.compute`. Weights, optimizer, losses and sums stay in
`precision.dtype`."""

from dataclasses import replace

import torch

from gan.config import TrainConfig
from gan.errors import UserError

COMPUTE = {"fp32": None, "bf16": torch.bfloat16}  # None: the weights' own dtype


def resolve(config: TrainConfig) -> TrainConfig:
    """The same settings with bf16 or fp32 in place of auto, which is bf16 where products in it are faster: on a GPU
    that has it, and on a CPU with AMX.

    Raises UserError where bf16 is asked for and this machine has none, or the weights are float64.
    """
    asked = config.precision.compute
    missing = missing_bf16(config.precision.dtype)
    if asked == "bf16" and missing:
        raise UserError(f"precision.compute=bf16: {missing}; give precision.compute=fp32")
    found = "bf16" if not missing and (torch.cuda.is_available() or has_amx()) else "fp32"
    return replace(config, precision=replace(config.precision, compute=found if asked == "auto" else asked))


def has_amx() -> bool:
    """Does this CPU multiply bfloat16 matrices in hardware (AMX)? A step is then two to four times as fast."""
    return torch.cpu._is_amx_tile_supported()


def missing_bf16(dtype: str) -> str:
    """Why this machine cannot compute in bfloat16 with weights of `dtype`, or an empty string."""
    if dtype != "float32":
        return f"weights are {dtype} (precision.dtype)"
    if torch.cuda.is_available():
        has_it = torch.cuda.is_bf16_supported(including_emulation=False)
        return "" if has_it else f"{torch.cuda.get_device_name()} has no bfloat16 arithmetic"
    return "" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "this CPU has no bfloat16 arithmetic"


def compute_dtype(config: TrainConfig) -> torch.dtype | None:
    """What networks get as `compute`. auto is fp32 here: `resolve` has replaced it in a run's configuration."""
    return COMPUTE.get(config.precision.compute)


def penalty_dtype(config: TrainConfig, precise: bool = False) -> torch.dtype | None:
    """The dtype of passes through D that a gradient penalty differentiates; None: D's own. precise: the penalty cannot
    be computed in bf16."""
    return getattr(torch, config.precision.dtype) if precise or config.precision.penalty == "fp32" else None
