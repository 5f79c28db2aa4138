"""The house: imports point one way and in no circle, our packages are ours wherever we stand, functions stay short."""

import ast
import os
import statistics
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("gan", "ops", "data", "launch")
ALLOWED = {"ops": {"ops"}, "data": {"data"}, "gan": {"gan", "ops"}, "launch": set(PACKAGES)}
MOST_PACKED = 0.04  # of the assignments in gan/


def module_name(path: Path) -> str:
    """ops/build.py -> ops.build, ops/__init__.py -> ops."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
MODULES = {module_name(path): path for path in SOURCES}


def imported_modules(source: str, package: str, known: Collection[str] = MODULES) -> set[str]:
    """Absolute names of all modules that the source of a module in `package` imports, inside functions too.

    `from a import b` is the module a.b where that is `known`, else a name in the module a.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            start = parents[: len(parents) + 1 - node.level] if node.level else []
            base = ".".join([*start, *filter(None, [node.module])])
            inside = {alias.name: f"{base}.{alias.name}" for alias in node.names}
            found |= {inside[name] if inside[name] in known else base for name in inside}
    return found


def imports_of(path: Path) -> set[str]:
    """What a file of ours imports, from wherever it comes."""
    module = module_name(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    return imported_modules(path.read_text(), package)


def circle(imports: Mapping[str, set[str]]) -> list[str]:
    """The modules of one circle of imports, the first one last again; [] if there is none."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def is_command(source: str) -> bool:
    """Has it a click command or group `main`?"""
    makers = ("click.command", "click.group")
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == "main":
            return any(ast.unparse(decorator).startswith(makers) for decorator in node.decorator_list)
    return False


def sideways(imports: Mapping[str, set[str]], commands: set[str]) -> list[str]:
    """Where one of these modules imports a command, as 'one -> command'."""
    return [f"{one} -> {other}" for one in sorted(imports) for other in sorted(imports[one] & commands - {one})]


def test_imports_are_found_in_functions_and_relative_ones_by_where_they_lead():
    known = {"launch", "launch.tables", "launch.benchmark", "launch.benchmark.timing", "gan.trainer"}
    for line, found in (
        ("import gan.trainer, numpy", {"gan.trainer", "numpy"}),
        ("from gan.trainer import Task", {"gan.trainer"}),
        ("from gan import trainer", {"gan.trainer"}),
        ("from gan import trainer, something", {"gan.trainer", "gan"}),
        ("def f():\n    from launch import tables", {"launch.tables"}),
        ("from . import timing", {"launch.benchmark.timing"}),
        ("from .timing import clock", {"launch.benchmark.timing"}),
        ("from .. import tables", {"launch.tables"}),
        ("from ..tables import table", {"launch.tables"}),
        ("from ...gan import trainer", {"gan.trainer"}),
    ):
        assert imported_modules(line, "launch.benchmark", known) == found, line


def test_circles_of_imports_are_found():
    chain = {"a": {"b", "c"}, "b": {"c"}, "c": {"os"}}
    assert circle(chain) == []
    found = circle(chain | {"c": {"d"}, "d": {"b"}})
    assert found[0] == found[-1] and set(found) == {"b", "c", "d"}


def test_commands_that_import_commands_are_found():
    assert is_command("@click.command()\n@click.option('--x')\ndef main(x): ...")
    assert is_command("@click.option('--x')\n@click.group(cls=Group)\ndef main(x): ...")
    assert not is_command("def main(): ...") and not is_command("@click.command()\ndef other(): ...")
    assert sideways({"a": {"b", "helper"}, "b": {"b", "helper"}}, {"a", "b"}) == ["a -> b"]


def test_no_circle_of_imports():
    assert circle({module: imports_of(path) & MODULES.keys() for module, path in MODULES.items()}) == []


def test_no_command_imports_another():
    """What two commands need is a module of its own. The demo, which is made of commands, may call them."""
    commands = {module for module, path in MODULES.items() if is_command(path.read_text())}
    assert {"launch.train", "launch.generate", "launch.benchmark.ops_benchmark"} <= commands
    imports = {module: imports_of(MODULES[module]) for module in commands}
    assert sideways(imports, commands) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    roots = {name.partition(".")[0] for name in imports_of(path)}
    assert roots & set(PACKAGES) <= ALLOWED[path.relative_to(ROOT).parts[0]]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_fit_a_screen_and_public_ones_say_what_they_do(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 80, f"{node.name} is too long"
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            is_plain_fields = isinstance(node, ast.ClassDef) and all(isinstance(n, ast.AnnAssign) for n in node.body)
            assert ast.get_docstring(node) or is_plain_fields, f"{node.name} has no docstring"


def assignments(source: str) -> Iterator[tuple[ast.Assign, bool]]:
    """Every assignment, and whether it packs several values into one line: `a, b = f(x), g(y)`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign):
            yield node, isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)


def test_packed_assignments_are_told_from_others():
    packed = [is_packed for _, is_packed in assignments("a = 1, 2\na, b = f()\na, b = f(x), g(y)\na = b\n")]
    assert packed == [False, False, True, False]


def test_most_assignments_in_gan_are_one_thought_a_line():
    found = {path: list(assignments(path.read_text())) for path in SOURCES if module_name(path).startswith("gan.")}
    packed = [f"{module_name(path)}:{node.lineno}" for path in found for node, is_packed in found[path] if is_packed]
    share = len(packed) / sum(map(len, found.values()))
    assert share <= MOST_PACKED, f"{share:.1%} pack several values into one line, at {', '.join(packed)}"


def test_functions_in_gan_are_short():
    """Half of them have ten lines at most."""
    trees = [ast.parse(path.read_text()) for path in SOURCES if module_name(path).startswith("gan.")]
    functions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert statistics.median(node.end_lineno - node.lineno + 1 for node in functions) <= 10


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
