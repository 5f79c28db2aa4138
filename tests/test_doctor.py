"""saddle doctor: what is missing is named with its remedy, and nothing missing makes the doctor fall ill."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from launch import cli, doctor
from ops import toolchain
from ops.toolchain import Nvcc

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def plain(monkeypatch, tmp_path):
    monkeypatch.delenv("SADDLE_OPS", raising=False)
    monkeypatch.setenv("SADDLE_CACHE", str(tmp_path / "cache"))


def findings() -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in doctor.examine()}


def test_a_table_for_people_and_the_same_for_programs(tmp_path):
    done = CliRunner().invoke(cli.saddle, ["doctor", "--json", str(tmp_path / "doctor.json")])
    assert done.exit_code == 0 and "training can run" in done.output
    about = json.loads((tmp_path / "doctor.json").read_text())
    assert about["works"] is True
    rows = {row["name"]: row for row in about["findings"]}
    for name in (
        "python",
        "PyTorch",
        "numpy",
        "lmdb",
        "C++ compiler",
        "ninja",
        "nvcc",
        "compiled kernels",
        "SADDLE_OPS",
    ):
        assert rows[name]["state"] in done.output and name in done.output
    for name in ("kernel cache", "threads", "OpenMP", "malloc", "ffmpeg"):
        assert name in rows
    assert torch.__version__ in rows["PyTorch"]["found"]
    assert str(tmp_path / "cache") in rows["kernel cache"]["found"]
    assert not (tmp_path / "cache").exists(), "the doctor looks and touches nothing"
    assert all(row["remedy"] for row in about["findings"] if row["state"] in (doctor.MISSING, doctor.BROKEN))


def test_without_a_compiler_training_runs_and_the_remedy_is_said(monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent")
    found = findings()
    assert found["C++ compiler"].state == doctor.MISSING and "g++" in found["C++ compiler"].remedy
    assert found["SADDLE_OPS"].state == doctor.NOTE and found["SADDLE_OPS"].found == "auto: the reference kernels"
    assert CliRunner().invoke(doctor.main).exit_code == 0
    monkeypatch.setenv("SADDLE_OPS", "compiled")
    done = CliRunner().invoke(doctor.main, standalone_mode=False)
    assert done.return_value == 2 and "training cannot run: mend SADDLE_OPS" in done.output
    monkeypatch.setenv("SADDLE_OPS", "fast")
    done = CliRunner().invoke(doctor.main, standalone_mode=False)
    assert done.return_value == 2 and "one of reference, compiled, auto" in done.output


def test_a_missing_package_is_named(monkeypatch):
    real = doctor.importlib.metadata.version

    def version(name):
        if name in ("lmdb", "tensorboard"):
            raise doctor.importlib.metadata.PackageNotFoundError(name)
        return "1.0.0" if name == "numpy" else real(name)

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    found = findings()
    assert (found["lmdb"].state, found["lmdb"].needed) == (doctor.MISSING, True)
    assert found["lmdb"].remedy.startswith("pip install 'lmdb")
    assert (found["numpy"].state, found["numpy"].needed) == (doctor.BROKEN, True)
    assert (found["tensorboard [tensorboard]"].state, found["tensorboard [tensorboard]"].needed) == (doctor.NOTE, False)
    assert CliRunner().invoke(doctor.main, standalone_mode=False).return_value == 2


def test_the_doctor_works_where_torch_does_not():
    code = (
        "import sys; sys.modules.update(torch=None, numpy=None, ffmpeg=None, imageio_ffmpeg=None);"
        "from launch.cli import main; sys.argv = ['saddle', 'doctor']; main()"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "training cannot run: mend PyTorch" in done.stdout


def test_gpus_and_nvcc(monkeypatch):
    class Properties:
        name, total_memory, major, minor = "A GPU", 80 * 2**30, 13, 0

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(toolchain, "capabilities", lambda: [(13, 0)])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(toolchain, "find_nvcc", lambda: Nvcc("/cuda", "13.0", (90, 121), True))
    found = findings()
    assert found["GPU 0"].found == "A GPU, 80 GiB, capability 13.0, newer than nvcc: compiled by its driver"
    assert found["nvcc"].state == doctor.OK
    monkeypatch.setattr(toolchain, "find_nvcc", lambda: Nvcc("/cuda", "12.8", (90,), True))
    assert findings()["nvcc"].state == doctor.BROKEN
    monkeypatch.setattr(toolchain, "find_nvcc", lambda: None)
    found = findings()
    assert found["nvcc"].state == doctor.MISSING and "CUDA_HOME" in found["nvcc"].remedy
    assert found["GPU 0"].state == doctor.OK


@pytest.mark.parametrize(("version", "state"), [("2.14.1", doctor.OK), ("2.10.0", doctor.BROKEN)])
def test_the_newest_torch_is_good_and_an_old_one_is_not(monkeypatch, version, state):
    real = doctor.importlib.metadata.version
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: version if name == "torch" else real(name))
    assert findings()["torch"].state == state


@pytest.mark.parametrize(
    ("version", "bounds", "good"),
    [
        ("2.13.0+cpu", ">=2.11,<3", True),
        ("2.14.1+cu130", ">=2.11,<3", True),
        ("3.0.0", ">=2.11,<3", False),
        ("2.9.1", ">=2.11,<3", False),
        ("2.14.0", ">=2.11,<2.14", False),
        ("0.2.0", "==0.2.0", True),
        ("3", ">=3.0.0", True),
        ("2.14.0a0+git", "<2.14", False),
        ("1.0", "", True),
        ("3.0", "~=2.1", False),
        ("2.5", "[extra]>=2,!=2.5.*", False),
    ],
)
def test_an_installed_version_must_be_one_that_pyproject_allows(monkeypatch, version, bounds, good):
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: version if name == "lmdb" else None)
    assert (doctor._package(f"lmdb{bounds}", "").state == doctor.OK) is good
