"""`saddle benchmark step` as its users meet it."""

import json
import sys

import pytest

from launch import cli
from launch.benchmark.step_benchmark import check_model, extrapolate, step_cost
from launch.benchmark.step_model import Link

TINY = ["--resolution=8", "--batch=8", "--rounds=1", "--set=network.widths=[8,8]", "--set=network.z_dim=8"]


def saddle(monkeypatch, *arguments: object) -> int:
    """The exit code of `saddle benchmark step ARGUMENTS`; the ranks are processes."""
    monkeypatch.setattr(sys, "argv", ["saddle", "benchmark", "step", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


# Parameters of networks with widths [8, 8] and z_dim 8, counted by hand: of stage 0, and what a block of stage 1 adds.
D_FIRST = (9 * 8 * 9 + 8) + (8 * 16 * 8 + 8) + (8 + 1) + (3 * 8 + 8)  # convolution, two linear layers, from_image
G_FIRST = (8 * 128 + 128) + (8 * 8 * 9 + 8) + (8 * 3 + 3)  # linear layer, convolution, to_image
BLOCK = 2 * (8 * 8 * 9 + 8)


@pytest.mark.slow
def test_it_measures_checks_and_predicts(monkeypatch, tmp_path, capsys):
    path = tmp_path / "rows.json"
    flags = [*TINY, "--also=exact,bf16", "--predict=8,64", f"--json={path}"]
    assert saddle(monkeypatch, "--gpus=1,2", *flags) == 0
    report = json.loads(path.read_text())
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    measured = report["measured"]
    assert [(row["gpus"], row["size"]) for row in measured] == [(1, "4x4"), (1, "8x8"), (2, "4x4"), (2, "8x8")]
    for row in measured:
        assert row["ms"].keys() == {"joined", "alone", "exact", "bf16"} | ({"half"} if row["gpus"] == 1 else set())
        assert row["shares"] == {name: 4 if name == "half" else 8 for name in row["ms"]}
        # One round: its time is the one that there is, and ratios are of it.
        assert row["of_alone"] == pytest.approx(row["ms"]["alone"] / row["ms"]["joined"])
        assert row["over_joined"]["bf16"] == pytest.approx(row["ms"]["bf16"] / row["ms"]["joined"])
        assert row["images_per_second"] == pytest.approx(row["gpus"] * 8 / row["ms"]["joined"] * 1e3)
        assert row["data_wait_ms"] < row["ms"]["joined"]
        later = BLOCK if row["stage"] else 0
        assert row["messages"] == [4 * (first + later + 1) for first in (D_FIRST, G_FIRST)]  # and whether all is finite
        shown = [str(row["gpus"]), row["size"], f"{round(row['ms']['joined'], 1):.6g}"]
        assert any(words[:3] == shown for words in lines)
    assert [(row["stage"], row["gpus"]) for row in report["predictions"]] == [
        ("4x4", 8), ("4x4", 64), ("8x8", 8), ("8x8", 64)
    ]  # fmt: skip
    for row, stage in zip(report["predictions"][::2], measured, strict=False):
        assert row["compute ms"] == pytest.approx(stage["ms"]["alone"], abs=0.01)  # of a whole batch, as on one rank
    for name in ("predictions", "checks"):
        shown = [[f"{v:.6g}" if isinstance(v, float) else str(v) for v in row.values()] for row in report[name]]
        assert shown and all(cells in lines for cells in shown)
    assert all(["assumed:", *assumption.split()] in lines for assumption in report["assumptions"])


def stage_times(gpus: int, **ms: float) -> dict:
    shares = {name: 4 if name == "half" else 8 for name in ms}
    link = [2e-3, 2e-3 + 4e6 / 1e6, 4e6]  # of two ranks: a latency of 1 ms, and 1 MB/s
    return {"gpus": gpus, "stage": 0, "size": "4x4", "shares": shares, "ms": ms, "messages": [6e6, 2e6], "link": link}


def test_a_step_costs_what_a_line_through_both_batches_says():
    cost = step_cost(stage_times(1, half=30.0, alone=50.0))
    assert (cost.fixed, cost.per_sample) == pytest.approx((10e-3, 5e-3))
    assert cost.messages == (6e6, 2e6)
    alone = stage_times(1, half=30.0, alone=50.0) | {"shares": {"half": 8, "alone": 8}}  # a batch that has no half
    assert step_cost(alone).per_sample == pytest.approx(50e-3 / 8)


def test_predictions_are_those_computed_by_hand():
    row = stage_times(1, half=30.0, alone=50.0)
    link = Link(latency=1e-4, bandwidth=1e9)
    flags = {"batch": 8, "global_batch": 0}
    (weak,) = extrapolate([row], [4], flags, link)
    communication = 2 * (6 * 1e-4) + 2 * 3 / 4 * 8e6 / 1e9  # two rings of 2 (4 - 1) hops, of 8 MB together
    assert (weak["samples each"], weak["compute ms"]) == (8, 50)
    assert weak["communication ms"] == pytest.approx(1e3 * communication)
    assert weak["img/s"] == round(4 * 8 / (50e-3 + communication))
    assert weak["efficiency"] == pytest.approx(50e-3 / (50e-3 + communication), abs=1e-3)
    (strong,) = extrapolate([row], [4], flags | {"global_batch": 16}, link)
    assert (strong["samples each"], strong["compute ms"]) == (4, 30)
    assert strong["efficiency"] == pytest.approx((4 / (30e-3 + communication)) / (8 / 50e-3), abs=1e-3)


def test_the_model_is_checked_against_ranks_that_share_the_cores():
    one, two = stage_times(1, half=30.0, alone=50.0), stage_times(2, joined=8e3, alone=70.0)
    (checked,) = check_model([one, two], {0: step_cost(one)}, slots=1)
    # Twice the compute, as one core serves both; and sums of 6 and 2 MB at 1 MB/s, in 2 hops of 1 ms each.
    assert checked["predicted ms"] == pytest.approx(2 * 50 + 2 * 2 + 8e3)
    assert (checked["took ms"], checked["off by"]) == (8e3, "+1%")
    assert (checked["link us"], checked["link GB/s"]) == (1000, 0.0)


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--gpus=two"], "--gpus=two: write numbers"),
        (["--gpus=0"], "--gpus=0: write numbers"),
        (["--also=fp8"], "known are exact, bf16"),
        (["--batch=6"], "--batch=6 is not a multiple of the coupling group"),
        (["--preset=33"], "did you mean"),
        (["--resolution=48"], "--resolution=48 is not 4, 8, 16"),
        (["--stages=7"], "--stages=7: the last one is 1"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capsys, flags, message):
    assert saddle(monkeypatch, *TINY, *flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
