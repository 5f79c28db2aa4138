"""`saddle benchmark step` as its users meet it."""

import json
import sys

import pytest

from launch import cli

TINY = ["--resolution=8", "--batch=8", "--rounds=1", "--set=network.widths=[8,8]", "--set=network.z_dim=8"]


def saddle(monkeypatch, *arguments: object) -> int:
    """The exit code of `saddle benchmark step ARGUMENTS`; the ranks are processes."""
    monkeypatch.setattr(sys, "argv", ["saddle", "benchmark", "step", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


@pytest.mark.slow
def test_it_measures_checks_and_predicts(monkeypatch, tmp_path, capsys):
    path = tmp_path / "rows.json"
    flags = [*TINY, "--also=exact,bf16", "--predict=8,64", f"--json={path}"]
    assert saddle(monkeypatch, "--gpus=1,2", *flags) == 0
    report, text = json.loads(path.read_text()), capsys.readouterr().out
    assert [(row["gpus"], row["size"]) for row in report["measured"]] == [
        (g, s) for g in (1, 2) for s in ("4x4", "8x8")
    ]
    for row in report["measured"]:
        assert {"joined", "alone", "exact", "bf16"} <= row["ms"].keys()
        assert all(0 < ms < 60_000 for ms in row["ms"].values())
        assert row["shares"]["joined"] == row["shares"]["alone"] == 8
        assert row["of_alone"] > 0.01 and row["messages"][0] > row["messages"][1] / 100 > 0
    for name in ("predictions", "checks"):
        assert report[name] and all(str(row["gpus"]) in text for row in report[name])
    early, late = (row for row in report["predictions"] if row["gpus"] == 64)
    assert early["efficiency"] <= 1 and late["efficiency"] <= 1
    assert all(assumption in text for assumption in report["assumptions"])


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
