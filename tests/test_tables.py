"""`--json`, the option of every command that measures: refused early, written whole, and said."""

import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from gan.errors import UserError
from launch.tables import json_option, save_rows, text_table


def run(*arguments: object, rows: object = None):
    """A command that measures `rows`, and says so before it writes."""

    @click.command()
    @json_option
    def command(json_path: Path | None) -> None:
        click.echo("measured")
        save_rows(json_path, rows)

    return CliRunner().invoke(command, [*map(str, arguments)])


def test_the_rows_are_in_the_file_and_nowhere_without_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"name": "a", "ms": 1.5}, {"name": "b", "ms": None}]
    assert run(rows=rows).output == "measured\n" and not list(tmp_path.iterdir())
    path = tmp_path / "new" / "folder" / "rows.json"
    assert run(f"--json={path}", rows=rows).output == f"measured\nwrote {path}\n"
    assert json.loads(path.read_text()) == rows
    assert [found for found in tmp_path.rglob("*") if found.is_file()] == [path]


@pytest.mark.parametrize("place", ["/proc/none/rows.json", "file/rows.json", "file/new/rows.json"])
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    done = run(f"--json={place}")
    assert isinstance(done.exception, UserError) and str(done.exception).startswith(f"cannot write {place}: ")
    assert done.output == "" and [found.name for found in tmp_path.rglob("*")] == ["file"]


def test_the_check_leaves_no_folder_behind(tmp_path):
    assert run(f"--json={tmp_path}/new/rows.json", "--no-such-option").exit_code == 2
    assert not list(tmp_path.iterdir())


def test_a_table_lines_its_columns_up():
    rows = [{"name": "a", "ms": 1 / 3, "of": None}, {"name": "longer", "ms": 12.0, "of": 3}]
    assert text_table(rows).splitlines() == ["name          ms  of", "a       0.333333   -", "longer        12   3"]
