"""`saddle benchmark` as its users meet it."""

import json
import sys

import pytest
from PIL import Image

from launch import cli


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


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["dira"], "No such command"),
        (["dirac", "--objective=hing"], "did you mean hinge"),
        (["dirac", "--objective=energy", "--regularizer=none"], "couples samples"),
        (["dirac", "--gamma=-1"], "--gamma must be at least 0"),
        (["dirac", "--step=0"], "0.0 is not in the range"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capsys, arguments, message):
    assert saddle(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
