"""Alarms: what a table of scores shows of a collapse, or of copies of the training set, in words."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gan.metrics.diversity import LEAST_SPREAD, MOST_COHERENCE
from gan.metrics.intervals import Estimate


@dataclass(frozen=True)
class Alarm:
    """A row of ALARMS: a figure, and which values of it, beside those of real images, tell of what."""

    tells: str
    figure: str  # the beginning of its full name
    beside: str  # the figure to compare it with, of the same row or of reals; "" for the same figure
    rings: Callable[[Estimate, float], bool]  # (the figure, the value to compare it with) -> is it bad?
    limit: str


ALARMS = (
    Alarm(
        "collapse",
        "coherence",
        "",
        lambda of, real: of.value > MOST_COHERENCE * max(real, 0.01),
        f"{MOST_COHERENCE:g} times that",
    ),
    Alarm("collapse", "spread", "", lambda of, real: of.value < LEAST_SPREAD * real, f"{LEAST_SPREAD:g} times that"),
    Alarm("collapse", "recall-", "", lambda of, real: of.high < 0.75 * real, "0.75 times that"),
    Alarm("collapse", "ms-ssim", "", lambda of, real: of.low > (1 + real) / 2, "half way from that to 1"),
    Alarm("collapse", "modes", "", lambda of, real: of.high < 0.75 * real, "0.75 times that"),
    Alarm("copies", "copies-", "copies-by-chance-", lambda of, real: of.low > 10 * real, "10 times that"),
    Alarm("copies", "pixel-copies", "pixel-copies-by-chance", lambda of, real: of.low > 10 * real, "10 times that"),
)


def alarms(figures: Mapping[str, Estimate], reals: Mapping[str, Estimate]) -> list[str]:
    """What the figures of a network show, line by line; [] if all is well. reals: the same figures of real images."""
    lines = []
    for name, found in figures.items():
        for alarm in ALARMS:
            if not name.startswith(alarm.figure) or "by-chance" in name:
                continue
            other = f"{alarm.beside or alarm.figure}{name.removeprefix(alarm.figure)}"
            beside = figures.get(other) if alarm.beside else reals.get(other)
            if beside and alarm.rings(found, beside.value):
                values = f"{found.value:.4g}, of reals {beside.value:.4g}"
                lines.append(f"{alarm.tells}: {name} {values} (limit: {alarm.limit})")
    return lines
