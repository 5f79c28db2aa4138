"""`saddle benchmark` as its users meet it."""

import itertools
import json
import sys

import pytest
import torch
from PIL import Image

from gan.state import initial_state
from launch import cli
from launch.benchmark import penalties_benchmark


def saddle(monkeypatch, *arguments: object) -> int:
    """The exit code of `saddle benchmark ARGUMENTS`, in this process."""
    monkeypatch.setattr(sys, "argv", ["saddle", "benchmark", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def test_dirac_prints_what_it_writes(monkeypatch, tmp_path, capsys):
    flags = ["--objective=wasserstein", "--objective=hinge", "--regularizer=wgan_gp", "--regularizer=r1", "--count=20"]
    paths = [f"--json={tmp_path / 'rows.json'}", f"--portraits={tmp_path / 'new' / 'portraits.png'}"]
    assert saddle(monkeypatch, "dirac", *flags, "--gamma=2", *paths) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    text = capsys.readouterr().out
    assert [row["game"] for row in rows] == [f"{o} {r} 2" for o in ("wasserstein", "hinge") for r in ("wgan_gp", "r1")]
    assert all(row["game"] in text for row in rows)
    assert rows[0]["eigenvalue"] is None  # a kink
    assert rows[1]["bound, simultaneous"] == pytest.approx(2, rel=1e-6)  # Jacobian [[0, -1], [1, -2]]
    with Image.open(tmp_path / "new" / "portraits.png") as image:
        assert image.size == (720, 720)
        assert (204, 34, 34) in {color for _, color in image.convert("RGB").getcolors(1 << 20)}


def test_dirac_shows_what_each_regularizer_does(monkeypatch, tmp_path):
    """Eigenvalues -s^2 / 4 +- sqrt(s^4 / 16 - 1 / 4) of noise of variance s^2 = gamma, -gamma / 2 +- sqrt(gamma^2 / 4 -
    1 / 4) of R1 and its stand-ins; clipping bounds psi alone."""
    names = ["instance_noise", "r1_difference", "r1_projection", "clip"]
    flags = [*(f"--regularizer={name}" for name in names), "--gamma=.49", f"--json={tmp_path / 'rows.json'}"]
    assert saddle(monkeypatch, "dirac", "--count=100", *flags) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    first = ["-0.122500+0.484762i", "-0.245000+0.435861i", "-0.245000+0.435861i", "+0.000000+0.500000i"]
    assert [row["eigenvalue"] for row in rows] == first
    assert rows[3]["end, simultaneous"] < 1.2  # without it, 1.55


def test_regularizers_are_priced_beside_none_and_r1(monkeypatch, tmp_path, capsys):
    flags = ["--resolution=8", "--channels=4", "--batch=4", "--repeats=1", f"--json={tmp_path / 'rows.json'}"]
    assert saddle(monkeypatch, "penalties", "--regularizers=wgan_gp:target=2,clip", *flags) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["regularizer"] for row in rows] == ["none", "r1", "wgan_gp:target=2", "clip"]
    for row in rows:
        assert row["x none"] * rows[0]["ms"] == pytest.approx(row["ms"]) == row["x r1"] * rows[1]["ms"]
    assert "wgan_gp:target=2" in capsys.readouterr().out


def test_a_priced_step_takes_the_penalty_in_and_moves_nothing(monkeypatch):
    states = []
    monkeypatch.setattr("gan.state.initial_state", lambda task: states.append(initial_state(task)) or states[-1])
    for name in ("none", "r1", "wgan_gp"):
        task = penalties_benchmark.task(name, torch.device("cpu"), 8, 4, 4, "nonsaturating")
        step = penalties_benchmark.d_step(task)
        step(), step()
        D, start = states[-1].networks["D"], initial_state(task).networks["D"]
        assert all(torch.equal(a, b) for a, b in zip(D.parameters(), start.parameters(), strict=True))
    critics = [state.networks["D"] for state in states]
    gradients = [torch.cat([p.grad.flatten() for p in D.parameters() if p.grad is not None]) for D in critics]
    assert all((a - b).norm() > 1e-3 * a.norm() for a, b in itertools.combinations(gradients, 2))


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["penalties", "--resolution=24"], "resolution=24 is not 4, 8, 16"),
        (["penalties", "--regularizers=r3"], "did you mean"),
        (["penalties", "--objective=hinge"], "use an objective f:..., or roth_js"),
        (["penalties", "--objective=energy"], "no D step"),
        (["penalties", "--batch=6"], "try --batch=8"),
        (["dira"], "No such command"),
        (["dirac", "--objective=hing"], "did you mean hinge"),
        (["dirac", "--objective=energy", "--regularizer=none"], "couples samples"),
        (["dirac", "--gamma=-1"], "--gamma must be at least 0"),
        (["dirac", "--regularizer=bcr"], "--regularizer=bcr changes pictures"),
        (["dirac", "--regularizer=spectral_norm"], "--regularizer=spectral_norm changes D's layers"),
        (["dirac", "--step=0"], "0.0 is not in the range"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capsys, arguments, message):
    assert saddle(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
