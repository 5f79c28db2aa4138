"""The model of many ranks against sums played through message by message."""

import pytest

from launch.benchmark.step_model import Link, StepCost, all_reduce_seconds, line, measure_link, predict

LINK = Link(latency=1e-3, bandwidth=1e6)


def ring(size: float, ranks: int, link: Link) -> float:
    """Every rank passes a piece on to the next until all have every piece's sum: seconds, one message at a time."""
    have = [
        {piece: {rank} for piece in range(ranks)} for rank in range(ranks)
    ]  # have[rank][piece]: whose it has summed
    seconds, shift = 0.0, 0
    while any(len(whose) < ranks for pieces in have for whose in pieces.values()):
        sent = [(rank, (rank - shift) % ranks) for rank in range(ranks)]
        moved = [(rank, piece, set(have[rank][piece])) for rank, piece in sent]
        for rank, piece, whose in moved:
            have[(rank + 1) % ranks][piece] |= whose
        seconds, shift = seconds + link.latency + size / ranks / link.bandwidth, shift + 1
    return seconds


@pytest.mark.parametrize("ranks", [2, 3, 4, 7])
def test_large_sums_take_a_rings_time(ranks):
    assert all_reduce_seconds(1e9, ranks, LINK) == pytest.approx(ring(1e9, ranks, LINK))


def test_small_sums_over_many_ranks_take_a_trees_time():
    assert all_reduce_seconds(0, 512, LINK) == pytest.approx(2 * 9 * LINK.latency)
    assert all_reduce_seconds(123, 1, LINK) == 0


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_a_link_is_what_explains_the_sums_that_were_timed(ranks):
    small, large = (all_reduce_seconds(size, ranks, LINK) for size in (0, 1e8))
    link = measure_link(small, large, 1e8, ranks)
    assert link.latency == pytest.approx(LINK.latency)
    assert all_reduce_seconds(1e8, ranks, link) == pytest.approx(large, rel=0.05)


def test_a_line_goes_through_both_points_and_never_below_zero():
    assert line((8, 3.0), (16, 5.0)) == pytest.approx((1.0, 0.25))
    assert line((8, 5.0), (16, 3.0)) == (3.0, 0.0)  # slower with less: noise
    assert line((8, 1.0), (16, 5.0)) == pytest.approx((0.0, 5 / 16))  # faster than in proportion


def test_ranks_share_the_cores_and_add_their_sums():
    cost = StepCost(fixed=1.0, per_sample=0.5, messages=(4e6, 2e6))
    assert predict(cost, 1, 8, LINK).seconds == 5
    together = predict(cost, 4, 8, LINK, slots=2)
    assert together.compute == 10
    assert together.communication == pytest.approx(sum(all_reduce_seconds(size, 4, LINK) for size in cost.messages))
