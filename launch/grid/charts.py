"""Charts as inline SVG. Colors are CSS classes of page.html, so that charts follow light and dark."""

import math
from collections.abc import Callable, Mapping, Sequence

from markupsafe import Markup

Points = Sequence[tuple[float, float]]
COLORS = 8  # classes c0 ... c7
WIDTH, HEIGHT = 480, 260
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 10, 42
LABEL = 25  # letters of a method's name beside a chart


def tag(name: str, text: str = "", **attributes: object) -> Markup:
    """An SVG element, everything escaped; underscores at the end and within names become nothing and dashes."""
    given = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _short(value)) for key, value in attributes.items()
    )
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), given, text)


def _short(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def svg(label: str, width: float, height: float, parts: Sequence[Markup]) -> Markup:
    """A picture that fills its column. label: what a screen reader says."""
    box = f"0 0 {width:g} {height:g}"
    return tag("svg", Markup("").join(parts), viewBox=box, role="img", aria_label=label, class_="chart")


def ticks(low: float, high: float, logarithmic: bool) -> list[float]:
    """Round numbers within an interval, at most about six."""
    if logarithmic:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        marks = (1, 2, 5) if last - first <= 2 else (1,)
        found = [m * 10.0**e for e in range(first, last + 1) for m in marks if low <= m * 10.0**e <= high]
        if len(found) < 2:
            return ticks(low, high, False)
        return found[:: max(math.ceil(len(found) / 7), 1)]
    span = high - low or 1.0
    step = 10 ** math.floor(math.log10(span / 4))
    step = next(step * m for m in (1, 2, 5, 10) if span / (step * m) <= 5)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def scale(low: float, high: float, start: float, end: float, logarithmic: bool) -> Callable[[float], float]:
    """Values in [low, high] -> coordinates in [start, end]."""
    bend = math.log if logarithmic else float
    a, b = bend(low), bend(high)
    return lambda value: start + (end - start) * (bend(min(max(value, low), high)) - a) / ((b - a) or 1.0)


def brief(value: float) -> str:
    """A number on an axis."""
    if value >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if value >= 1e4 else f"{value:g}"


def lines(
    label: str,
    series: Mapping[str, Points],
    x_name: str,
    y_name: str,
    bands: Mapping[str, Sequence[tuple[float, float, float]]] | None = None,
    log_x: bool = False,
) -> Markup:
    """A chart of lines, y logarithmic where all values are positive. bands: (x, low, high) by name, drawn as bars."""
    bands = bands or {}
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    ys += [y for marks in bands.values() for _, low, high in marks for y in (low, high) if math.isfinite(y)]
    if not xs:
        return Markup("")
    log_y = min(ys) > 0
    margin = 1.15
    bottom = min(ys) / margin if log_y else min(ys)
    top = max(ys) * margin if log_y else max(ys)
    left = min(xs) / 1.3 if log_x else min(xs)
    right = max(xs) * 1.3 if log_x else max(xs)
    x_at = scale(left, right, LEFT, WIDTH - RIGHT, log_x)
    y_at = scale(bottom, top, HEIGHT - BOTTOM, TOP, log_y)
    parts = _axes(x_at, y_at, ticks(left, right, log_x), ticks(bottom, top, log_y), x_name, y_name)
    for index, (name, points) in enumerate(series.items()):
        color = f"c{index % COLORS} d{index // COLORS % 3}"
        path = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in points)
        title = tag("title", name)
        parts.append(tag("polyline", title, points=path, class_=f"line {color}"))
        if len(points) <= 8:
            parts += [tag("circle", cx=x_at(x), cy=y_at(y), r=3.5, class_=f"dot {color}") for x, y in points]
        for x, low, high in bands.get(name, ()):
            parts.append(tag("line", x1=x_at(x), x2=x_at(x), y1=y_at(low), y2=y_at(high), class_=f"line {color}"))
    return svg(label, WIDTH, HEIGHT, parts)


def _axes(
    x_at: Callable[[float], float],
    y_at: Callable[[float], float],
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    x_name: str,
    y_name: str,
) -> list[Markup]:
    low = HEIGHT - BOTTOM
    parts = []
    for value in y_ticks:
        y = y_at(value)
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="rule"))
        parts.append(tag("text", brief(value), x=LEFT - 6, y=y + 4, text_anchor="end"))
    for value in x_ticks:
        parts.append(tag("text", brief(value), x=x_at(value), y=low + 18, text_anchor="middle"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=low, y2=low, class_="axis"))
    parts.append(tag("text", x_name, x=middle, y=HEIGHT - 6, text_anchor="middle"))
    turn = f"rotate(-90 14 {low / 2:g})"
    parts.append(tag("text", y_name, x=14, y=low / 2, text_anchor="middle", transform=turn))
    return parts


def intervals(label: str, rows: Sequence[tuple[str, float, float, float, Sequence[float]]], x_name: str) -> Markup:
    """A row per method: (name, value, low, high, values of the seeds). The axis is logarithmic where it can be."""
    step, left = 22, 176
    values = [x for _, value, low, high, seeds in rows for x in (value, low, high, *seeds) if math.isfinite(x)]
    if not values:
        return Markup("")
    logarithmic = min(values) > 0
    low_end = min(values) / 1.2 if logarithmic else min(values)
    high_end = max(values) * 1.2 if logarithmic else max(values)
    x_at = scale(low_end, high_end, left, WIDTH - 16, logarithmic)
    height = step * len(rows) + 44
    bottom = height - 40
    parts = []
    for value in ticks(low_end, high_end, logarithmic):
        x = x_at(value)
        parts.append(tag("line", x1=x, x2=x, y1=4, y2=bottom, class_="rule"))
        parts.append(tag("text", brief(value), x=x, y=bottom + 16, text_anchor="middle"))
    for place, (name, value, low, high, seeds) in enumerate(rows):
        y = step * place + 16
        short = tag("tspan", name if len(name) <= LABEL else f"{name[: LABEL - 1]}…") + tag("title", name)
        parts.append(tag("text", short, x=left - 10, y=y + 4, text_anchor="end"))
        ends = [x_at(x) for x in (low, high) if math.isfinite(x)]
        if len(ends) == 2:
            parts.append(tag("line", x1=ends[0], x2=ends[1], y1=y, y2=y, class_="line c0 wide"))
        parts += [tag("circle", cx=x_at(x), cy=y, r=2.5, class_="seed") for x in seeds if math.isfinite(x)]
        parts.append(tag("circle", cx=x_at(value), cy=y, r=4.5, class_="dot c0"))
    parts.append(tag("text", x_name, x=(left + WIDTH) / 2, y=height - 4, text_anchor="middle"))
    return svg(label, WIDTH, height, parts)


def scatter(label: str, points: Points, centers: Points, reach: float) -> Markup:
    """Samples in the plane, over the centers of the data's clusters."""
    side = 200
    at = scale(-reach, reach, 4, side - 4, False)
    inside = [(x, y) for x, y in points if max(abs(x), abs(y)) <= reach]
    parts = [tag("rect", x=0.5, y=0.5, width=side - 1, height=side - 1, class_="frame")]
    parts += [tag("circle", cx=at(x), cy=at(-y), r=6.0, class_="center") for x, y in centers]
    dots = "".join(f"M{at(x):.1f} {at(-y):.1f}h0" for x, y in inside)
    parts.append(tag("path", d=dots, class_="samples"))
    return svg(label, side, side, parts)


def portrait(label: str, arrows: Sequence[tuple[float, float, float, float]], walk: Points, reach: float) -> Markup:
    """A phase portrait: short lines that begin with a dot along the field, and a walk."""
    side = 200
    at = scale(-reach, reach, 2, side - 2, False)
    field = "".join(f"M{at(x):.1f} {at(-y):.1f}L{at(x + u):.1f} {at(-y - v):.1f}" for x, y, u, v in arrows)
    begins = "".join(f"M{at(x):.1f} {at(-y):.1f}h0" for x, y, _, _ in arrows)
    path = " ".join(f"{at(x):.1f},{at(-y):.1f}" for x, y in walk)
    parts = [tag("rect", x=0.5, y=0.5, width=side - 1, height=side - 1, class_="frame")]
    parts += [tag("path", d=field, class_="field"), tag("path", d=begins, class_="begin")]
    parts += [tag("polyline", points=path, class_="line walk")]
    return svg(label, side, side, parts)
