"""launch/gpu_resume.py, which also runs where there is no GPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gan.errors import UserError
from launch.gpu_resume import check_logs, compare

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_runs_end_bit_equal(tmp_path):
    command = [sys.executable, "-m", "launch.gpu_resume", tmp_path / "runs", "--set=network.widths=[8,8,8]"]
    done = subprocess.run([*command, "--set=network.z_dim=8"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("bit-equal: killed after training-state-")
    assert "going on from" in (tmp_path / "runs" / "killed.txt").read_text()


def test_other_bits_are_named():
    ends = {"undisturbed": {"G/a": torch.zeros(2), "G/b": torch.ones(2)}, "killed": {"G/a": torch.zeros(2)}}
    with pytest.raises(UserError, match="killed: 1 of 2 tensors are not as undisturbed, G/b first"):
        compare(ends | {"killed": ends["killed"] | {"G/b": torch.tensor([1, 1 + 1e-6])}})
    compare(ends | {"killed": ends["undisturbed"]})


def test_a_run_that_began_anew_or_was_not_captured_is_named(tmp_path):
    for name in ("undisturbed", "without graphs", "under torchrun"):
        (tmp_path / f"{name}.txt").write_text("tick 1\n")
    (tmp_path / "killed.txt").write_text("tick 1\n")
    with pytest.raises(UserError, match="killed: it began anew"):
        check_logs(tmp_path)
    (tmp_path / "killed.txt").write_text("going on from training-state-0000000640\n")
    check_logs(tmp_path)
    (tmp_path / "undisturbed.txt").write_text("note: a step could not be captured as a CUDA graph (why)\n")
    with pytest.raises(UserError, match=r"undisturbed: note: a step could not be captured .* \(why\)"):
        check_logs(tmp_path)
