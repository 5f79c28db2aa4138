"""The report on a grid: what it says, what it marks, what it refuses; and in Chromium, by playwright."""

import base64
import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_benchmark import saddle

from gan.metrics.intervals import Estimate
from launch.grid import charts, report, summary

PROVENANCE = {
    "features": {"name": "nearest cluster", "sha256": "ab" * 32, "side": 0, "resize": "none"},
    "dataset_hash": "cd" * 32,
    "size": [2],
    "reals": 0,
    "samples": 2500,
    "seed": 0,
    "snapshot_sha256": "ef" * 32,
    "versions": {"torch": "2"},
}
VALUES = {"none": [0.16, 0.15, 0.17, 0.18], "r1": [0.02, 0.03, 0.025, 0.015], "r2": [0.04, 0.05, 0.03, 0.06]}


def png() -> str:
    file = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def line(regularizer="r1", gamma=1.0, seed=0, value=0.02, **changes) -> str:
    """A line of results.jsonl."""
    figure = {"value": value, "low": value, "high": value}
    row = {
        "format": 1,
        "cell": f"{regularizer}-{gamma}-{seed}-{changes.get('dataset', 'grid')}",
        "kind": "points",
        "dataset": "grid",
        "objective": "f:gan",
        "regularizer": regularizer,
        "gamma": gamma,
        "seed": seed,
        "label": "",
        "settings": {"steps": 12},
        "diverged": "",
        "figures": {"mode-kl": figure, "mode-kl-by-chance": {"value": 0.0048, "low": 0.0048, "high": 0.0048}},
        "curve": [[1000, {"mode-kl": 2 * value}], [2000, {"mode-kl": value}]],
        "steps": 12,
        "images": 3072,
        "seconds": 1.5,
        "provenance": PROVENANCE,
        "points": [[0.0, 2.0], [2.0, -2.0]],
        "picture": "",
        "command": "saddle benchmark regularizers --plan=points --cell=abc",
    }
    return json.dumps(row | changes)


def lines() -> list[str]:
    return [
        line(name, 0.0 if name == "none" else 1.0, seed, value)
        for name, values in VALUES.items()
        for seed, value in enumerate(values)
    ]


def written(tmp_path: Path, monkeypatch, rows: list[str]) -> int:
    (tmp_path / "in.jsonl").write_text("".join(f"{row}\n" for row in rows))
    return saddle(monkeypatch, "regularizers", f"--results={tmp_path / 'in.jsonl'}", f"--outdir={tmp_path}")


def test_methods_are_ranked_with_their_intervals():
    rows, bad = summary.read_rows(lines())
    (table,) = summary.tables_of(rows)
    assert not bad and [each.method.name for each in table.lines] == ["r1 γ=1", "r2 γ=1", "none"]
    best, second, last = table.lines
    assert best.estimate and best.estimate.value == pytest.approx(0.0225)
    assert 0.015 <= best.estimate.low < 0.0225 < best.estimate.high <= 0.03
    # Holm: of both, which are below none in every seed, twice the p of 4 against 4.
    assert best.comparison.p == second.comparison.p == pytest.approx(2 * 2 / 70) and best.comparison.lower
    assert np.isnan(last.comparison.p) and best.control is last.method and not best.comparison.claim
    assert second.chance + best.chance == pytest.approx(1, abs=1e-9) and last.chance == 0
    assert not table.can_claim and table.seeds_needed == 5 and table.seeds == 4
    assert table.floor == 0.0048


def test_figures_beside_the_one_that_ranks_have_a_table_of_their_own(tmp_path, monkeypatch):
    def figures(value: float) -> dict:
        values = {"mode-kl": value, "mode-kl-by-chance": 0.0048, "confidence": 1 - value}
        return {name: {"value": x, "low": x, "high": x} for name, x in values.items()}

    rows = [line("r1", 1.0, seed, figures=figures(value)) for seed, value in enumerate([0.25, 0.5])]
    lost = line("r1", 1.0, 2, diverged="NaN", figures={}, curve=[], points=[])
    assert written(tmp_path, monkeypatch, [*rows, lost]) == 0
    (table,) = summary.tables_of(summary.read_rows([*rows, lost])[0])
    assert table.others == ["confidence"]
    assert table.lines[0].method.estimate("confidence") == Estimate(0.625, 0.5, 0.75)
    page = (tmp_path / "regularizers.html").read_text()
    assert "Other figures" in page and "<td>0.5 to 0.75</td>" in page and "mode-kl-by-chance" not in page
    read = list(csv.DictReader(io.StringIO((tmp_path / "regularizers.csv").read_text())))
    assert [(row["figure"], row["mean"], row["rank"]) for row in read] == [
        ("mode-kl", "0.375", "1"),
        ("confidence", "0.625", "1"),
    ]


def test_scores_that_differ_in_provenance_are_never_in_one_table(tmp_path, monkeypatch):
    other = PROVENANCE | {"samples": 10_000}
    mixed = [*lines(), line("dragan", 1.0, 0, 0.001, provenance=other)]
    tables = summary.tables_of(summary.read_rows(mixed)[0])
    assert sorted(len(table.lines) for table in tables) == [1, 3]
    assert written(tmp_path, monkeypatch, mixed) == 0
    assert (tmp_path / "regularizers.html").read_text().count('<table class="sortable">') >= 2


def test_a_diverged_seed_puts_a_method_last_and_is_counted():
    known = {"dataset_hash": PROVENANCE["dataset_hash"]}
    lost = line("wgan_gp", 1.0, 0, diverged="NaN", figures={}, provenance=known, curve=[], points=[])
    rows, bad = summary.read_rows([*lines(), lost, line("wgan_gp", 1.0, 1, 0.001)])
    (table,) = summary.tables_of(rows)
    assert not bad and table.lines[-1].method.name == "wgan_gp γ=1" and table.lines[-1].method.diverged == 1
    assert table.lines[-1].chance == 0
    assert len(table.tested) == 2 and table.seeds == 4  # it is not tested, so it takes no test's place


def test_a_diverged_seed_stands_with_the_dataset_of_its_hash_alone():
    other = PROVENANCE | {"dataset_hash": "12" * 32}
    lost = line("r2", 1.0, 9, diverged="NaN", figures={}, provenance={"dataset_hash": "12" * 32}, curve=[])
    renamed = line("none", 0.0, 7, 0.5, provenance=other)
    first, second = summary.tables_of(summary.read_rows([*lines(), lost, renamed])[0])
    assert [line.method.diverged for line in first.lines] == [0, 0, 0]
    assert [(line.method.name, line.method.diverged) for line in second.lines] == [("none", 0), ("r2 γ=1", 1)]


def test_what_is_the_same_is_one_method_and_what_differs_has_its_own_name():
    same = [line("r1", 1.0, 0), line("r1", 1, 1)]
    (table,) = summary.tables_of(summary.read_rows(same)[0])
    assert [len(each.method.rows) for each in table.lines] == [2]
    wide = line("r1", 1.0, 2, 0.5, settings={"steps": 12, "batch": 8}, cell="wide")
    (table,) = summary.tables_of(summary.read_rows([*same, wide])[0])
    assert [table.label(each) for each in table.lines] == ["r1 γ=1, batch=default", "r1 γ=1, batch=8"]
    labels = [line("r1", gamma, 0, gamma, label="mine", cell=f"{gamma}") for gamma in (1.0, 2.0)]
    (table,) = summary.tables_of(summary.read_rows(labels)[0])
    assert [table.label(each) for each in table.lines] == ["mine, γ=1.0", "mine, γ=2.0"]
    assert list(report.curves(table)) == ["mine, γ=1.0", "mine, γ=2.0"]


def test_without_a_counterpart_nothing_is_tested_and_nothing_claimed():
    (table,) = summary.tables_of(summary.read_rows([line("r1", 1.0, seed) for seed in range(9)])[0])
    assert not table.tested and not table.can_claim
    (finding,) = report.findings([table])
    assert "5 %" not in finding


def test_a_legend_has_what_its_chart_has():
    without = line("r2", 1.0, 0, 0.001, curve=[])
    (table,) = summary.tables_of(summary.read_rows([without, line("r1", 1.0, 0)])[0])
    assert report.section(table, 0)["names"] == ["r1 γ=1"]


@pytest.mark.parametrize(
    "text,reason",
    [
        ("not json", "Expecting value"),
        ("[1]", "it is no object"),
        (line(regularizer="r9"), "did you mean"),
        (line(kind="dance"), "kind 'dance' is unknown"),
        (line(figures={"mode-kl": 3}), "cannot be read"),
        (line(figures={}), "no figure to compare"),
        (line(provenance={}), "without its provenance"),
        (line(seed="x"), "seed is 'x'"),
        (line(curve=[1]), ""),
        (line(points=[[1]]), "not enough values"),
        (line(points=[["a", "b"]]), "not finite"),
        (line(curve=[[1, {"mode-kl": "high"}]]), "not finite"),
        (line(curve=[[float("inf"), {"mode-kl": 1.0}]]), "not finite"),
        (line(value=float("nan")), "not finite"),
        (line(value=1e300), "too large"),
        (line(gamma=10**400), "too large"),
        (line(steps=10**400), "too large"),
        (line(dataset="\ud800"), "surrogates not allowed"),
        (line(format=7), "of another version"),
        ('{"cell": "a"}', "format is missing"),
        ("[" * 5000, "recursion"),
    ],
)
def test_a_line_that_cannot_be_read_is_marked_and_the_rest_intact(tmp_path, monkeypatch, capsys, text, reason):
    assert written(tmp_path, monkeypatch, [text, *lines()]) == 0
    assert "1 lines cannot be read" in capsys.readouterr().out
    page = (tmp_path / "regularizers.html").read_text()
    assert page.count('<tr class="unreadable">') == 1 and "r1 γ=1" in page and "line 1" in page
    (bad,) = summary.read_rows([text])[1]
    assert reason in bad.reason


def test_without_any_result_it_is_refused(tmp_path, monkeypatch, capsys):
    assert written(tmp_path, monkeypatch, ["nonsense"]) == 2
    assert "there is no result to report; line 1" in capsys.readouterr().err
    assert not (tmp_path / "regularizers.html").exists()


def test_whatever_comes_from_files_is_escaped(tmp_path, monkeypatch):
    evil = "<script>alert(1)</script>"
    rows = [line(label=evil, dataset=evil, command=evil, settings={evil: evil}, picture=evil), evil]
    rows.append(line("r2", picture=png() + '" onerror="alert(1)', cell=evil, diverged=evil))
    assert written(tmp_path, monkeypatch, rows) == 0
    for suffix in ("html", "md"):
        assert "<script>alert" not in (tmp_path / f"regularizers.{suffix}").read_text()
    assert "onerror" not in (tmp_path / "regularizers.html").read_text()


def test_csv_has_what_the_page_has(tmp_path, monkeypatch):
    assert written(tmp_path, monkeypatch, lines()) == 0
    rows = list(csv.DictReader(io.StringIO((tmp_path / "regularizers.csv").read_text())))
    assert [row["method"] for row in rows] == ["r1 γ=1", "r2 γ=1", "none"]
    assert float(rows[0]["mean"]) == pytest.approx(0.0225) and float(rows[0]["p against none"]) == pytest.approx(4 / 70)
    assert rows[2]["p against none"] == ""
    assert (tmp_path / "regularizers.md").read_text().count("\n| ") == 4


def test_a_gamma_is_recommended():
    points = [(0.1, Estimate(0.05, 0.04, 0.06)), (1.0, Estimate(0.02, 0.01, 0.03)), (10.0, Estimate(0.03, 0.025, 0.04))]
    assert summary.advice(points, [0.1, 1.0, 10.0]) == "γ = 1; the intervals of γ = 10 overlap its own."
    assert summary.advice(points, [0.1, 10.0]).startswith("γ = 10; no") or "edge" in summary.advice(points, [0.1, 10.0])
    assert "diverged at every" in summary.advice(points, [])
    rows = [line("r1", g, s, v * (1 + s / 9)) for g, v in ((0.1, 0.05), (1.0, 0.02)) for s in range(3)]
    (found,) = summary.sensitivities(summary.tables_of(summary.read_rows(rows)[0])[0])
    assert found.name == "r1, f:gan" and found.advice.startswith("γ = 1: no other interval reaches it.")


def test_ranks_over_datasets():
    other = PROVENANCE | {"dataset_hash": "12" * 32}
    ring = [line(n, g, 0, v, dataset="ring", provenance=other) for n, g, v in (("none", 0.0, 0.01), ("r1", 1.0, 0.02))]
    tables = summary.tables_of(summary.read_rows([*lines(), *ring])[0])
    assert sorted(summary.mean_ranks(tables)) == [("f:gan, none", 1.5, 1), ("f:gan, r1 γ=1", 1.5, 1)]
    assert summary.mean_ranks(tables[:1]) == []


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report, in a headless Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
    if browser is None:
        pytest.skip("there is no Chromium")
    folder = tmp_path_factory.mktemp("page")
    report.write_report([*lines(), line("dragan", picture=png()), "not json"], folder)
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        context = chromium.new_context(offline=True)
        opened = context.new_page()
        opened.problems = []
        opened.on("pageerror", lambda error: opened.problems.append(str(error)))
        opened.on("console", lambda message: opened.problems.append(message.text))
        opened.on("request", lambda request: opened.problems.append(request.url))
        opened.goto(f"file://{folder / 'regularizers.html'}")
        yield opened
        chromium.close()


def first_column(page) -> list[str]:
    return page.locator("table.sortable").first.locator("tbody th").all_inner_texts()


def test_the_page_asks_for_nothing_and_has_no_errors(page):
    asked = [problem for problem in page.problems if not problem.startswith(("file://", "data:"))]
    assert asked == [] and page.problems[0].endswith("regularizers.html")


@pytest.mark.parametrize("width,scheme", [(1280, "light"), (390, "light"), (390, "dark")])
def test_it_fits_laptop_and_phone_in_light_and_dark(page, width, scheme):
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ink, paper = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    light = [np.mean([int(n) for n in color.strip("rgb()").split(",")]) for color in (ink, paper)]
    assert (light[0] < 60 and light[1] > 240) if scheme == "light" else (light[0] > 200 and light[1] < 40)


def test_tables_are_sorted_by_keyboard(page):
    before = first_column(page)
    page.get_by_role("button", name="Method").first.focus()
    page.keyboard.press("Enter")
    assert first_column(page) == sorted(before) != before
    page.keyboard.press("Space")
    assert first_column(page) == sorted(before, reverse=True)
    sorted_by = page.locator("table.sortable").first.locator("th[aria-sort]").all_inner_texts()
    assert len(sorted_by) == 1 and "Method" in sorted_by[0]
    page.get_by_role("button", name="Rank").first.press("Enter")
    assert first_column(page) == before


def test_the_first_key_leads_to_the_results(page):
    page.reload()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the results"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"


def test_everything_has_a_name(page):
    assert page.locator("table:not(:has(caption))").count() == 0
    assert page.locator("svg:not([aria-label])").count() == 0 and page.locator("img:not([alt])").count() == 0
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    links = page.evaluate("[...document.querySelectorAll('a')].map(a => a.getAttribute('href').slice(1))")
    assert len(ids) == len(set(ids)) and set(links) <= set(ids)


def test_it_prints_to_pdf(page):
    assert page.pdf().startswith(b"%PDF")


def test_printed_commands_are_seen(page):
    seen = "document.querySelector('details > pre').checkVisibility({contentVisibilityAuto: true})"
    page.emulate_media(media="screen")
    assert not page.evaluate(seen)
    page.emulate_media(media="print")
    page.wait_for_function(seen)  # what becomes visible does so with the next frame
    page.emulate_media(media="screen")


def test_an_axis_has_two_numbers_at_least():
    for low, high in [(2.17, 4.68), (0.9, 1.1), (3.0, 900.0), (0.001, 0.0012)]:
        found = charts.ticks(low, high, True)
        assert len(found) >= 2 and all(low <= each <= high for each in found)


def test_methods_that_were_left_out_are_on_the_page(tmp_path):
    report.write_report(lines(), tmp_path, left_out=["hinge with roth: it weighs <by> f"])
    assert "hinge with roth: it weighs &lt;by&gt; f" in (tmp_path / "regularizers.html").read_text()
