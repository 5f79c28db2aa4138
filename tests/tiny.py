"""A training task small enough for a test: three stages, random images that are a function of their index."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch

from gan.config import TrainConfig, override
from gan.families import build_task
from gan.methods.objectives import Objective
from gan.methods.pairs import configured
from gan.methods.regularizers import Regularizer
from gan.networks import ImageFormat
from gan.ranks.distributed import Ranks
from gan.schedules import build_schedule
from gan.state import Task

BASE = {
    "batch": 32,
    "run.kimg": 32 * 30 / 1000,
    "run.tick": 32 * 10 / 1000,
    "run.snap": 1,
    "network.z_dim": 16,
    "network.widths": [12, 8, 8],
    "growth.shares": [0.2, 0.3, 0.5],
    "growth.fade": 0.4,
    "optimizer.g_lr": 0.005,
    "optimizer.d_lr": 0.005,
    "regularizer.every": 2,
}
CLASSES = ("a", "b", "c")


def tiny_config(values: dict | None = None) -> TrainConfig:
    return override(TrainConfig(), BASE | (values or {}))


def tiny_format(last: int = 2, channels: int = 2) -> ImageFormat:
    return ImageFormat(channels=channels, base=(4, 4), last=last, class_names=CLASSES, dataset_hash="tiny")


def tiny_task(config: TrainConfig, ranks: Ranks | None = None, last: int = 2, channels: int = 2) -> Task:
    return build_task(config, build_schedule(config, last), tiny_format(last, channels), ranks or Ranks())


def tiny_images(first: int, count: int, level: int, channels: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [count, 4 * 2**level, 4 * 2**level, channels] and labels, each a function of its index alone."""
    side = 4 * 2**level
    rows = [np.random.default_rng([7, i]).integers(0, 256, (side, side, channels)) for i in range(first, first + count)]
    return np.stack(rows).astype(np.uint8), np.arange(first, first + count) % len(CLASSES)


def tiny_feed(requests: Iterator[tuple[int, int, int]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for first, count, level in requests:
        yield tiny_images(first, count, level)


def broken_generator_loss() -> AbstractContextManager:
    """Inside, the loss of every G step is not finite."""

    def broken(config: TrainConfig) -> tuple[Objective, Regularizer]:
        objective, regularizer = configured(config)
        return replace(objective, generator=lambda real, fake: fake * math.nan), regularizer

    return patch("gan.trainer.configured", broken)


@pytest.fixture(autouse=True)
def one_thread():
    """For every test of a module that imports it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
