"""The kinds of models that can be trained, one row each. No other code asks which kind a model is."""

from gan.config import TrainConfig, check_name
from gan.networks import ImageFormat
from gan.ranks.distributed import Ranks
from gan.schedules import Schedule
from gan.state import Family, Task
from gan.trainer import GAN
from gan.vae.trainer import VAE_FAMILY

FAMILIES: dict[str, Family] = {"gan": GAN, "vae": VAE_FAMILY}


def find_family(config: TrainConfig) -> Family:
    """The row that a configuration names. Raises UserError for a name that does not exist."""
    check_name("model", config.model, FAMILIES)
    return FAMILIES[config.model]


def build_task(config: TrainConfig, schedule: Schedule, images: ImageFormat, ranks: Ranks) -> Task:
    """Everything a step needs. Raises UserError for unknown names and for settings that do not go together."""
    family = find_family(config)
    family.check(config)
    return Task(family, config, schedule, images, ranks)
