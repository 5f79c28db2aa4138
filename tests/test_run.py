"""The script `run`: what it says when it cannot go on, and what it leaves alone."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

RUN = Path(__file__).resolve().parent.parent / "run"


def run(*arguments: str, at: Path = RUN, **environment: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k != "VIRTUAL_ENV"} | environment
    return subprocess.run(["sh", str(at), *arguments], env=env, capture_output=True, text=True, timeout=60)


def test_help_and_unknown_commands():
    assert run().returncode == 0 and "./run demo" in run().stdout
    assert run("deom").returncode == 2


@pytest.mark.parametrize("python", ["/nowhere/python3", "false"])
def test_without_a_python_it_says_the_next_step_and_makes_nothing(python, tmp_path):
    at = Path(shutil.copy(RUN, tmp_path))
    result = run("test", at=at, PYTHON=python)
    assert result.returncode == 1
    assert "Python 3.11 or newer is needed" in result.stderr and "next step: PYTHON=" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def fake_environment(tmp_path: Path, pip_succeeds: bool, torch: str = "2.13.0+cpu") -> Path:
    """An active environment that has this version of torch, if any, and whose pip only notes that it was called."""
    (tmp_path / "modules").mkdir()
    version = f"__version__ = {torch!r}" if torch else "raise ImportError"
    (tmp_path / "modules" / "torch.py").write_text(version)
    bin_dir = tmp_path / "env" / "bin"
    bin_dir.mkdir(parents=True)
    (bin_dir / "python").write_text(
        '#!/bin/sh\ncase "$*" in\n'
        f'  *"-m pip"*) echo "$@" >> "{tmp_path}/pip.log"; exit {0 if pip_succeeds else 1} ;;\n'
        f'  *"import sys, torch"*) PYTHONPATH="{tmp_path}/modules" exec "{sys.executable}" "$@" ;;\n'
        '  *hashlib*) echo stamp ;;\n  *) echo "ran $*" ;;\nesac\n'
    )
    (bin_dir / "python").chmod(0o755)
    return bin_dir.parent


def test_an_active_environment_is_used_and_installed_into_once(tmp_path):
    at, environment = Path(shutil.copy(RUN, tmp_path)), fake_environment(tmp_path, pip_succeeds=True)
    for _ in range(2):
        result = run("test", "-x", at=at, VIRTUAL_ENV=str(environment))
        assert result.returncode == 0 and "ran -m pytest -x" in result.stdout
    assert len((tmp_path / "pip.log").read_text().splitlines()) == 1
    assert not (tmp_path / ".venv").exists()


def test_when_pip_fails_it_says_so_and_tries_again_next_time(tmp_path):
    at, environment = Path(shutil.copy(RUN, tmp_path)), fake_environment(tmp_path, pip_succeeds=False)
    for _ in range(2):
        result = run("demo", at=at, VIRTUAL_ENV=str(environment))
        assert result.returncode == 1 and "next step: read pip's message above; then ./run demo again" in result.stderr
    assert len((tmp_path / "pip.log").read_text().splitlines()) == 2


@pytest.mark.parametrize("torch", ["2.11.0", "2.13.0+cpu", "2.14.1+cu130", "2.15.0"])
def test_a_torch_that_is_there_is_used_as_it_is(tmp_path, torch):
    at, environment = Path(shutil.copy(RUN, tmp_path)), fake_environment(tmp_path, pip_succeeds=True, torch=torch)
    assert run("setup", at=at, VIRTUAL_ENV=str(environment)).returncode == 0
    assert "torch" not in (tmp_path / "pip.log").read_text()
    dependencies = tomllib.loads((RUN.parent / "pyproject.toml").read_text())["project"]["dependencies"]
    (needed,) = [Requirement(line) for line in dependencies if line.startswith("torch")]
    assert needed.specifier.contains(torch), "pip would replace it"


@pytest.mark.parametrize("torch", ["2.10.0", ""])
def test_without_a_torch_one_that_was_tested_is_installed(tmp_path, torch):
    at, environment = Path(shutil.copy(RUN, tmp_path)), fake_environment(tmp_path, pip_succeeds=True, torch=torch)
    assert run("setup", at=at, VIRTUAL_ENV=str(environment)).returncode == 0
    (asked,) = [word for word in (tmp_path / "pip.log").read_text().split() if word.startswith("torch")]
    assert [v for v in ("2.10.0", "2.11.0", "2.13.0", "2.14.0") if v in Requirement(asked).specifier] == [
        "2.11.0",
        "2.13.0",
    ]
