"""The house: imports point one way, our packages are ours wherever we stand, functions stay short."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("gan", "ops", "data", "launch")
ALLOWED = {"ops": {"ops"}, "data": {"data"}, "gan": {"gan", "ops"}, "launch": set(PACKAGES)}
SOURCES = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]


def first_party_imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found |= {name.split(".")[0] for name in names}
    return found & set(PACKAGES)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    assert first_party_imports(path) <= ALLOWED[path.relative_to(ROOT).parts[0]]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_fit_a_screen_and_public_ones_say_what_they_do(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 80, f"{node.name} is too long"
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            is_plain_fields = isinstance(node, ast.ClassDef) and all(isinstance(n, ast.AnnAssign) for n in node.body)
            assert ast.get_docstring(node) or is_plain_fields, f"{node.name} has no docstring"


def test_the_tests_are_flat():
    """A package tests/ops would shadow ours."""
    assert not list((ROOT / "tests").glob("*/")) or {p.name for p in (ROOT / "tests").glob("*/")} <= {"__pycache__"}
    assert not (ROOT / "tests" / "__init__.py").exists()


def test_no_path_of_one_machine_and_no_unfinished_mark():
    for path in [*SOURCES, ROOT / "README.md", ROOT / "run", *(ROOT / "docs").rglob("*.md")]:
        text = path.read_text()
        assert "/tmp/" not in text and "/root/" not in text and "TODO" not in text, path


def test_a_users_own_data_folder_does_not_shadow_ours(tmp_path):
    """`saddle` is started where people keep a folder data/ or a file ops.py."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "__init__.py").write_text("raise RuntimeError('the wrong data')")
    (tmp_path / "ops.py").write_text("raise RuntimeError('the wrong ops')")
    saddle = Path(sys.executable).with_name("saddle")
    command = [str(saddle)] if saddle.exists() else [sys.executable, "-P", "-m", "launch.cli"]
    env = os.environ | {"PYTHONSAFEPATH": "1", "PYTHONPATH": str(ROOT)} if not saddle.exists() else dict(os.environ)
    help_text = subprocess.run([*command, "train", "--help"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert help_text.returncode == 0, help_text.stderr
    assert "--outdir" in help_text.stdout


def test_importing_ops_and_gan_needs_neither_lmdb_nor_ffmpeg():
    code = (
        "import sys; sys.modules.update(lmdb=None, ffmpeg=None, sklearn=None);"
        "import ops, gan.trainer, gan.run.loop, gan.metrics.frechet, data, launch.cli"
    )
    assert subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT).returncode == 0
