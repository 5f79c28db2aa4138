"""`saddle benchmark step` as its users meet it."""

import json
import sys
from pathlib import Path

import pytest

from launch import cli
from launch.benchmark.step_tables import busy_in_short, in_short, parts_of, ranks_row, speed_row

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--resolution=8", "--batch=8", "--rounds=1", "--set=network.widths=[8,8]", "--set=network.z_dim=8"]
H200 = [
    f"--steps={ROOT / 'launch/benchmark/h200_steps.toml'}",
    "--set=network.widths=[]",
    "--set=network.channel_base=64",
]


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


def shown(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_one_rank_beside_the_plain_loop_and_the_limit(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("launch.benchmark.step_contest.SECONDS", 0.01)
    path = tmp_path / "rows.json"
    arguments = ["--gpus=1", "--stages=1", *TINY, "--preset=32,default", f"--profile={tmp_path}", "--predict=8"]
    assert saddle(monkeypatch, *arguments, f"--json={path}") == 0
    report = json.loads(path.read_text())
    lines = shown(capsys.readouterr().out)
    rows = report["measured"]
    assert [(row["preset"], row["size"]) for row in rows] == [("32", "8x8"), ("default", "8x8")]
    for row in rows:
        ms, ratios = row["ms"], row["times_as_fast_as"]
        assert ms.keys() == ratios.keys() == {"ours", "plain", "no penalty", "products alone"}
        # One round: its time is the one that there is, and ratios are of it.
        assert all(ratios[name] == pytest.approx(ms[name] / ms["ours"]) for name in ms)
        assert row["images_per_second"] == pytest.approx(8 / ms["ours"] * 1e3)
        assert row["messages"] == [4 * (first + BLOCK + 1) for first in (D_FIRST, G_FIRST)]  # and whether to stop
        assert row["flops"] > 0 and min(row["peak_bytes"].values()) > 0
        head = [row["preset"], row["size"]]
        assert [*head, "8", f"{round(ms['ours'], 1):.6g}"] in [words[:4] for words in lines]
        assert [*head, f"{round(ms['ours'], 1):.6g}"] in [words[:3] for words in lines]
        trace = tmp_path / f"{row['preset']}-{row['size']}-gpus1-rank0.json"
        assert json.loads(trace.read_text())["traceEvents"]
    assert rows[0]["flops"] < rows[1]["flops"]  # R1 at every fourth step, and not at each
    assert [(row["stage"], row["gpus"]) for row in report["predictions"]] == [("8x8", 8)] * 2
    for row, measured in zip(report["predictions"], rows, strict=True):
        assert row["compute ms"] == pytest.approx(measured["ms"]["ours"], abs=0.01)


def test_last_stages_with_their_batches_beside_the_plain_loop_alone(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("launch.benchmark.step_contest.SECONDS", 0.01)
    path = tmp_path / "rows.json"
    arguments = ["--gpus=1", "--at=8/8,4/12,8/12", "--against=plain", "--preset=default", "--rounds=1"]
    arguments += ["--set=network.channel_max=8", "--set=network.z_dim=8", f"--json={path}"]
    assert saddle(monkeypatch, *arguments) == 0
    report = json.loads(path.read_text())
    rows = report["measured"]
    assert [(row["size"], row["share"]) for row in rows] == [("8x8", 8), ("4x4", 12), ("8x8", 12)]
    assert all(row["ms"].keys() == row["peak_bytes"].keys() == {"ours", "plain"} for row in rows)
    assert [config["batch"] for config in report["configs"].values()] == [8, 12]
    said = capsys.readouterr().out
    assert said.splitlines()[1:4] == list(in_short(rows)) and "milliseconds" not in said


@pytest.mark.slow
def test_several_ranks(monkeypatch, tmp_path, capsys):
    path = tmp_path / "rows.json"
    flags = ["--stages=1", "--also=exact,bf16 sums", f"--json={path}", f"--profile={tmp_path}"]
    assert saddle(monkeypatch, "--gpus=2", *TINY, *flags) == 0
    (row,) = json.loads(path.read_text())["measured"]
    assert row["ms"].keys() == {"ours", "alone", "exact", "bf16 sums"}
    assert (row["gpus"], row["size"], row["share"], len(row["sums"])) == (2, "8x8", 8, 2)
    assert row["images_per_second"] == pytest.approx(2 * 8 / row["ms"]["ours"] * 1e3)
    assert row["messages"] == [4 * (first + BLOCK + 1) for first in (D_FIRST, G_FIRST)]
    assert ["2", "32", "8x8", f"{round(row['ms']['ours'], 1):.6g}"] in [w[:4] for w in shown(capsys.readouterr().out)]
    assert all((tmp_path / f"32-8x8-gpus2-rank{rank}.json").exists() for rank in (0, 1))


def test_predictions_from_given_steps_measure_nothing(monkeypatch, tmp_path, capsys):
    steps = tmp_path / "steps.toml"
    steps.write_text("[[step]]\nresolution = 8\nbatch = 8\nms = 1\n")
    path = tmp_path / "rows.json"
    flags = [f"--steps={steps}", "--predict=4,32", "--inside=100,1", "--between=1000,0.5", "--per-host=4"]
    assert saddle(monkeypatch, *TINY, *flags, f"--json={path}") == 0
    few, many = json.loads(path.read_text())["predictions"]
    size = 4 * (D_FIRST + G_FIRST + 2 * BLOCK)  # bytes; of two sums, each of 2 (4 - 1) hops inside the host
    sums = 2 * 6 * 0.1 + 2 * 3 / 4 * size / 1e6
    assert (few["stage"], few["gpus"], few["batch each"], few["compute ms"]) == ("8x8", 4, 8, 1)
    assert few["sums ms"] == pytest.approx(sums, abs=0.01)
    assert few["img/s"] == pytest.approx(4 * 8 / (1 + sums) * 1e3, rel=1e-3)
    assert few["efficiency"] == f"{1 / (1 + sums):.3f}"
    # Eight hosts: a quarter of each message, up a tree of three levels and down.
    assert many["sums ms"] == pytest.approx(sums + 2 * 6 * 1.0 + 2 * size / 4 / 0.5e6, abs=0.01)
    lines = shown(capsys.readouterr().out)
    for row in (few, many):
        assert [f"{v:.6g}" if isinstance(v, float) else str(v) for v in row.values()] in lines
    assert any(words[:1] == ["assumed:"] for words in lines)


def test_the_steps_of_the_h200_can_be_read(monkeypatch, capsys):
    assert saddle(monkeypatch, *H200, "--predict=8") == 0
    assert [words[0] for words in shown(capsys.readouterr().out)[3:10]] == [
        "4x4", "8x8", "16x16", "32x32", "64x64", "256x256", "1024x1024"
    ]  # fmt: skip


def one_rank(**changed: object) -> dict:
    row = {
        "preset": "32",
        "size": "4x4",
        "gpus": 1,
        "share": 8,
        "ms": {"ours": 50.0},
        "images_per_second": 160.0,
        "times_as_fast_as": {"plain": 1.5, "no penalty": 0.6, "products alone": 0.4},
        "flops": 2e9,
        "part_shares": {"forward": 0.3, "optimizer": 0.06},
        "data_wait_ms": 1.0,
        "peak_bytes": {"ours": 200_000_000, "plain": 300_000_000},
        "gpu_busy": None,
    }
    return row | changed


def test_speeds_by_hand():
    cells = speed_row(one_rank())
    assert (cells["x plain"], cells["GFLOP"], cells["GFLOP/s"]) == (1.5, 2.0, 40.0)
    assert (cells["products alone"], cells["of them"]) == (100.0, "0.40")  # they take 20 of the 50 ms
    assert (cells["peak MB"], cells["plain MB"]) == (200, 300)
    assert speed_row(one_rank(gpu_busy=0.98))["GPU busy"] == "0.98"
    lacking = speed_row(one_rank(times_as_fast_as={"products alone": 0.4}, peak_bytes={}))
    assert (lacking["x plain"], lacking["peak MB"]) == (None, None)


def test_in_short():
    row = one_rank(images_per_second=321.0)
    ratios = row["times_as_fast_as"]
    (line,) = in_short([row, one_rank(times_as_fast_as={"products alone": 0.4}), one_rank(gpus=2)])
    share = row["peak_bytes"]["ours"] / row["peak_bytes"]["plain"]
    assert line == (
        f"in short, {row['size']}, batch {row['share']}: {ratios['plain']:.2f} x plain, 321.0 img/s, "
        f"memory {share:.2f} of plain's"
    )
    assert not list(busy_in_short(row)) and not list(busy_in_short(one_rank(gpu_busy=0.98, gpus=2)))
    (line,) = busy_in_short(one_rank(gpu_busy=0.98))
    assert line == f"in short, {row['size']}, batch {row['share']}, GPU busy: 0.98 of the time"


def test_the_parts_of_a_step_make_up_the_whole():
    parts = parts_of(one_rank())
    assert parts == pytest.approx(
        {"forward": 15.0, "penalties": 20.0, "backward, rest": 11.0, "optimizer": 3.0, "data": 1.0}
    )
    assert parts_of(one_rank(times_as_fast_as={}))["penalties"] is None


def test_several_ranks_by_hand():
    row = {
        "preset": "32",
        "size": "4x4",
        "gpus": 2,
        "ms": {"ours": 100.0, "alone": 1e9},
        "images_per_second": 160.0,
        "times_as_fast_as": {"alone": 0.9, "exact": 0.5},
        "data_wait_ms": 0.0,
        "messages": [4e6, 2e6],
        "sums": [4e-3, 3e-3],
    }
    cells = ranks_row(row, ["exact"])
    assert (cells["alone ms"], cells["communication"], cells["MB summed"], cells["sums alone"]) == (90, 10, 6, 7)
    assert (cells["predicted"], cells["off by"], cells["exact / ours"]) == (97, "-3%", "0.50")


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--gpus=two"], "--gpus=two: write numbers"),
        (["--gpus=0"], "--gpus=0: write numbers"),
        (["--also=fp8"], "known: bf16 sums, exact"),
        (["--batch=6"], "--batch=6 is not a multiple of the coupling group"),
        (["--preset=33"], "did you mean"),
        (["--preset=32,33"], "did you mean"),
        (["--at=32/8,16"], "--at=32/8,16: write resolutions with batches"),
        (["--at=32/0"], "--at=32/0: write resolutions with batches"),
        (["--at=48/8"], "resolution=48 is not 4, 8, 16"),
        (["--resolution=48"], "resolution=48 is not 4, 8, 16"),
        (["--resolution=16"], "network.widths [8, 8] must be 3 positive numbers"),
        (["--stages=7"], "--stages=7: the last one is 1"),
        (["--steps=nowhere.toml"], "--steps=nowhere.toml: "),
        (
            ["--steps=launch/benchmark/h200_steps.toml", "--set=network.widths=[]", "--inside=fast"],
            "--inside=fast: write",
        ),
        (
            ["--steps=launch/benchmark/h200_steps.toml", "--set=network.widths=[]", "--between=1,0"],
            "--between=1,0: write",
        ),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capsys, flags, message):
    assert saddle(monkeypatch, *TINY, *flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
