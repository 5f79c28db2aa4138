"""The report: results -> one HTML page that needs nothing else, and the same figures as CSV, Markdown and JSON."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from gan.errors import UserError
from gan.metrics.intervals import Estimate
from launch.grid import charts, summary
from launch.grid.kinds import KINDS
from launch.grid.summary import Line, Row, Table
from launch.outputs import output_file

NAME = "regularizers"
PAGE = Path(__file__).resolve().parent / "page.html"
CURVES = 8  # methods in a chart of curves: the best ones
GAMES = [  # of the Dirac-GAN: (objective, regularizer, gamma, caption)
    ("f:gan:saturating=1", "none", 0.0, "no regularizer: it circles"),
    ("f:gan:saturating=1", "r1", 0.3, "R1, γ = .3: it spirals in"),
    ("f:gan:saturating=1", "r1_r2", 1.0, "R1 and R2, γ = 1: it creeps in"),
    ("f:gan:saturating=1", "instance_noise", 0.5, "instance noise, variance .5"),
    ("wasserstein", "wgan_gp", 1.0, "WGAN-GP: it does not settle"),
    ("wasserstein", "clip", 1.0, "WGAN with clipping"),
]
REACH = 2.0  # of a phase portrait


def read_results(path: Path) -> list[str]:
    """The lines of a results.jsonl, or of the one in a folder. Raises UserError if it cannot be read."""
    file = path / "results.jsonl" if path.is_dir() else path
    try:
        return file.read_text(errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from error


def write_report(
    lines: Sequence[str], outdir: Path, penalties: Path | None = None, left_out: Sequence[str] = ()
) -> str:
    """Write the page and its companions. -> a line about them. left_out: a line for each method that cannot be. Raises
    UserError if no line can be read, or the files cannot be written."""
    rows, bad = summary.read_rows(lines)
    if not rows:
        reason = f"; {bad[0].where}: {bad[0].reason}" if bad else ""
        raise UserError(f"there is no result to report{reason}")
    tables = summary.tables_of(rows)
    files = {
        "jsonl": "".join(f"{line}\n" for line in lines),
        "csv": as_csv(tables),
        "md": as_markdown(tables, bad),
        "html": as_page(tables, rows, bad, prices(penalties), left_out),
    }
    for suffix, text in files.items():
        name = "results.jsonl" if suffix == "jsonl" else f"{NAME}.{suffix}"
        with output_file(outdir / name) as part:
            part.write_text(text)
    marked = f"; {len(bad)} lines cannot be read, see the page" if bad else ""
    return f"wrote {outdir / NAME}.html, .csv and .md on {len(rows)} cells{marked}"


def prices(path: Path | None) -> list[Mapping[str, Any]]:
    """The rows of `saddle benchmark penalties --json`. Raises UserError if the file has none."""
    if path is None:
        return []
    try:
        rows = json.loads(path.read_text())["rows"]
        return [{"regularizer": str(row["regularizer"]), "ms": float(row["ms"]), "x": row["x none"]} for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--penalties={path} has no rows of `saddle benchmark penalties`: {error!r:.100}") from error


COLUMNS = ("dataset", "provenance", "rank", "objective", "method", "seeds", "diverged", "figure", "mean", "low", "high")


def as_csv(tables: Sequence[Table]) -> str:
    """A line per method and figure."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*COLUMNS, "p against none", "chance of best", "steps", "images", "seconds"])
    for table in tables:
        for line in table.lines:
            m = line.method
            numbers = [line.comparison.p, line.chance, m.mean("steps"), m.mean("images"), m.mean("seconds")]
            writer.writerow([*cells_of(table, line, table.figure), *map(exact, numbers)])
            for figure in table.others:
                writer.writerow([*cells_of(table, line, figure), "", "", *map(exact, numbers[2:])])
    return file.getvalue()


def cells_of(table: Table, line: Line, figure: str) -> list[Any]:
    """Those of COLUMNS. The rank is that by the table's own figure."""
    m, e = line.method, line.method.estimate(figure)
    interval = map(exact, (e.value, e.low, e.high) if e else [math.nan] * 3)
    about = "; ".join(table.provenance)
    return [table.dataset, about, line.rank, m.objective, table.label(line), len(m.rows), m.diverged, figure, *interval]


def exact(x: float) -> str:
    """Six significant digits, nothing for what is not finite."""
    return f"{x:.6g}" if math.isfinite(x) else ""


def as_markdown(tables: Sequence[Table], bad: Sequence[summary.Unreadable]) -> str:
    """The ranked tables."""
    parts = ["# Regularizers"]
    for table in tables:
        parts += [f"\n## {plain(table.dataset)}: {plain(table.figure)}\n", f"{plain('; '.join(table.provenance))}\n"]
        parts += ["|   | method | objective | mean | 95 % interval | seeds | diverged |", "|--|--|--|--|--|--|--|"]
        for line in table.lines:
            m = line.method
            mean, interval = shown(line.estimate)
            cells = [line.rank, plain(table.label(line)), plain(m.objective), mean, interval, len(m.rows), m.diverged]
            parts.append("| " + " | ".join(map(str, cells)) + " |")
    parts += [f"\nUnreadable: {plain(each.where)}: {plain(each.reason)}" for each in bad]
    return "\n".join(parts) + "\n"


def plain(text: str) -> str:
    """Text of files that must not be taken for Markdown or HTML."""
    for sign in "\\|`*_<>[]#":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())


def shown(e: Estimate | None) -> tuple[str, str]:
    """(mean, interval) as text."""
    if e is None:
        return "-", "-"
    known = math.isfinite(e.low)
    return number(e.value), f"{number(e.low)} to {number(e.high)}" if known else "one seed"


def number(value: float) -> str:
    """Three significant digits or whole numbers."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def as_page(
    tables: Sequence[Table],
    rows: Sequence[Row],
    bad: Sequence[summary.Unreadable],
    cost: Sequence[Mapping[str, Any]],
    left_out: Sequence[str] = (),
) -> str:
    """The HTML page. Whatever comes from files is escaped."""
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError:
        raise UserError("the page needs jinja2: pip install 'saddlepoint[report]'") from None
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = number
    environment.globals.update(shown=shown, isfinite=math.isfinite)
    return environment.from_string(PAGE.read_text()).render(
        sections=[section(table, index) for index, table in enumerate(tables)],
        wins=summary.mean_ranks(tables),
        left_out=left_out,
        rows=rows,
        bad=bad,
        cost=cost,
        portraits=portraits(),
        finding=findings(tables),
    )


def section(table: Table, index: int) -> dict[str, Any]:
    """What the page says of one table."""
    chart_rows = [
        (
            table.label(line),
            line.estimate.value,
            line.estimate.low,
            line.estimate.high,
            line.method.values(table.figure),
        )
        for line in table.lines
        if line.estimate
    ]
    gammas = summary.sensitivities(table)
    several = len({line.method.objective for line in table.lines}) > 1
    figures = curves(table)
    return {
        "id": f"table-{index}",
        "table": table,
        "several_objectives": several,
        "forest": charts.intervals(f"{table.figure} of each method on {table.dataset}", chart_rows, table.figure),
        "curves": charts.lines(f"{table.figure} during training on {table.dataset}", figures, "images", table.figure),
        "names": list(figures),
        "floor": KINDS[table.kind].floor.format(number(table.floor)) if table.floor else "",
        "gammas": gammas,
        "gamma_chart": gamma_chart(table, gammas),
        "samples": samples(table),
    }


def curves(table: Table) -> dict[str, list[tuple[float, float]]]:
    """The mean of the seeds over the training, of the best methods that have one."""
    series: dict[str, list[tuple[float, float]]] = {}
    for line in table.lines[:CURVES]:
        by_images: dict[float, list[float]] = {}
        for row in line.method.rows:
            for images, values in row.curve:
                if table.figure in values:
                    by_images.setdefault(images, []).append(values[table.figure])
        if by_images:
            series[table.label(line)] = [(x, sum(y) / len(y)) for x, y in sorted(by_images.items())]
    return series


def gamma_chart(table: Table, gammas: Sequence[summary.Sensitivity]) -> Any:
    """The figure against gamma, a line per regularizer."""
    series = {each.name: [(g, e.value) for g, e in each.points] for each in gammas}
    bars = {each.name: [(g, e.low, e.high) for g, e in each.points if math.isfinite(e.low)] for each in gammas}
    return charts.lines(f"{table.figure} by gamma on {table.dataset}", series, "γ", table.figure, bars, log_x=True)


def samples(table: Table) -> list[dict[str, Any]]:
    """A picture of the first seed of each method that has one."""
    from gan.theory.clusters import POINTS

    found = []
    for line in table.lines:
        name = table.label(line)
        row = next((row for row in line.method.rows if row.points or row.picture), None)
        if row is None:
            continue
        centers = POINTS[table.dataset].tolist() if table.dataset in POINTS else []
        reach = max((abs(x) for center in centers for x in center), default=2.0) * 1.25
        drawn = charts.scatter(f"samples of {name}", row.points, centers, reach) if row.points else None
        found.append({"name": name, "seed": row.seed, "svg": drawn, "png": picture(row.picture)})
    return found


def picture(text: str) -> str:
    """Base64 of a PNG, "" for anything else: it becomes part of a URL."""
    known = text.startswith("iVBORw0KGgo") and all(c.isascii() and (c.isalnum() or c in "+/=") for c in text)
    return text if known else ""


def findings(tables: Sequence[Table]) -> list[str]:
    """A sentence or two per table."""
    found = []
    for table in tables:
        best = table.lines[0]
        if best.estimate is None:
            found.append(f"{table.dataset}: every method diverged.")
            continue
        mean, interval = shown(best.estimate)
        text = f"{table.dataset}: {table.label(best)} is first of {len(table.lines)} with a {table.figure} of {mean}"
        text += f" ({interval}), and has the least mean in {best.chance:.0%} of resamples of the seeds."
        better = [line for line in table.tested if line.comparison.claim and line.comparison.lower]
        worse = [line for line in table.tested if line.comparison.claim and not line.comparison.lower]
        tests = f"{len(table.tested)} test{'s' * (len(table.tested) != 1)}"
        if table.can_claim:
            text += f" {len(better)} of {len(table.tested)} are better than the same without a regularizer at 5 %, and "
            text += f"{len(worse)} are worse, after correction for {tests}."
        elif table.tested:
            seeds = f"{table.seeds} seed{'s' * (table.seeds != 1)}"
            text += f" {seeds} of each cannot show a difference to none at 5 % after correction for {tests}."
        found.append(text)
    return found


@cache
def portraits() -> list[dict[str, Any]]:
    """Phase portraits of the Dirac-GAN, where an equilibrium is all there is to find."""
    from gan.theory.dirac import Game, arrows, trajectory

    found = []
    for objective, regularizer, gamma, caption in GAMES:
        game = Game(objective, regularizer, gamma)
        walk = [(1.0, 1.0), *trajectory(game, 0.1, 250, True)]
        drawn = charts.portrait(f"Dirac-GAN, {caption}", arrows(game, REACH, 5, 0.22), walk, REACH)
        found.append({"caption": caption, "svg": drawn})
    return found
