"""The model of many ranks against sums played through message by message, and against figures computed by hand."""

import pytest
import torch

from gan.config import TrainConfig, override
from gan.errors import UserError
from launch.benchmark.step_contest import Case, Ours, build, line_up
from launch.benchmark.step_contest import Ranks as Alone
from launch.benchmark.step_model import (
    WANTED,
    Fabric,
    Link,
    Step,
    batch_for,
    communication,
    efficiency,
    message_sizes,
    read_steps,
    ring_seconds,
    sum_seconds,
    tree_seconds,
)
from launch.settings import noise_format

LINK = Link(latency=1e-3, bandwidth=1e6)
FABRIC = Fabric(inside=Link(1e-5, 2e11), between=Link(2e-5, 2.5e10), per_host=8)


def play_ring(size: float, ranks: int, link: Link) -> float:
    """Every rank passes a piece on to the next until all have every piece's sum: seconds, one message at a time."""
    have = [{piece: {rank} for piece in range(ranks)} for rank in range(ranks)]  # [rank][piece]: whose it has summed
    seconds, shift = 0.0, 0
    while any(len(whose) < ranks for pieces in have for whose in pieces.values()):
        sent = [(rank, (rank - shift) % ranks) for rank in range(ranks)]
        moved = [(rank, piece, set(have[rank][piece])) for rank, piece in sent]
        for rank, piece, whose in moved:
            have[(rank + 1) % ranks][piece] |= whose
        seconds, shift = seconds + link.latency + size / ranks / link.bandwidth, shift + 1
    return seconds


@pytest.mark.parametrize("ranks", [2, 3, 4, 7])
def test_a_ring_takes_as_long_as_one_played_through(ranks):
    assert ring_seconds(1e9, ranks, LINK) == pytest.approx(play_ring(1e9, ranks, LINK))


def test_small_sums_between_many_hosts_take_a_trees_time():
    few = sum_seconds(0, 8, FABRIC)
    assert sum_seconds(0, 512, FABRIC) - few == pytest.approx(tree_seconds(0, 64, FABRIC.between)) == 2 * 6 * 2e-5


def test_a_sum_goes_through_the_host_and_an_eighth_of_it_between_hosts():
    inside = 14 * 1e-5 + 2 * 7 / 8 * 80e6 / 2e11
    assert sum_seconds(80e6, 8, FABRIC) == pytest.approx(inside)
    assert sum_seconds(80e6, 16, FABRIC) == pytest.approx(inside + 2 * 2e-5 + 2 * 1 / 2 * 10e6 / 2.5e10)
    assert sum_seconds(80e6, 2, FABRIC) == pytest.approx(2e-5 + 80e6 / 2e11)
    assert sum_seconds(80e6, 1, FABRIC) == 0


def test_efficiency_and_the_batch_that_reaches_it():
    step = Step("4x4", 16, seconds=2e-3, messages=(40e6, 40e6))
    sums = communication(step, 8, FABRIC)
    assert sums == pytest.approx(2 * (14 * 1e-5 + 2 * 7 / 8 * 40e6 / 2e11))
    assert efficiency(step, 8, FABRIC) == pytest.approx(2e-3 / (2e-3 + sums))
    batch = batch_for(WANTED, step, 8, FABRIC)
    larger = Step("4x4", batch, step.seconds * batch / 16, step.messages)
    smaller = Step("4x4", batch - 1, step.seconds * (batch - 1) / 16, step.messages)
    assert efficiency(smaller, 8, FABRIC) < WANTED <= efficiency(larger, 8, FABRIC)


def test_messages_are_the_gradients_that_a_step_leaves():
    config = override(TrainConfig(), {"batch": 4, "growth.mode": "none", "network.widths": [8, 6, 4]})
    case = Case("default", config, noise_format(16), (2,))
    ours = build(line_up(case, Alone(), ())["ours"], case, 2)
    assert isinstance(ours, Ours)
    torch.set_num_threads(1)
    ours.step()
    one = 4  # the number that travels along
    assert [size - one for size in ours.messages()] == list(message_sizes(config, case.images))


def test_steps_are_read_from_a_file(tmp_path):
    path = tmp_path / "steps.toml"
    path.write_text(
        "[[step]]\nresolution = 8\nbatch = 32\nms = 5\n[[step]]\nresolution=4\nbatch=8\nms=1\nmeasured=false"
    )
    config = override(TrainConfig(), {"network.channel_max": 8})
    eight, four = read_steps(path, config)
    assert (eight.size, eight.batch, eight.seconds, eight.measured) == ("8x8", 32, 5e-3, True)
    assert (four.size, four.measured) == ("4x4", False)
    assert sum(eight.messages) > sum(four.messages) > 0


BAD_STEPS = {
    "empty": "",
    "no time": "[[step]]\nresolution = 8\nbatch = 4",
    "no number": "[[step]]\nresolution = 'a'",
    "no power of two": "[[step]]\nresolution = 48\nbatch = 4\nms = 1",
    "no TOML": "[[step",
}


@pytest.mark.parametrize("text", BAD_STEPS.values(), ids=BAD_STEPS)
def test_bad_files_of_steps_are_refused(tmp_path, text):
    path = tmp_path / "steps.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"--steps=.*steps.toml"):
        read_steps(path, TrainConfig())
