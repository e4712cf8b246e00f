"""Charts as data: what report.js draws with uPlot. Nothing is drawn here."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise

from chattrain.tracking.run_folder import Points

COLORS = ("#3b82c4", "#d9822b", "#2f9e6e", "#b5539c", "#8a7a2f", "#7a6ad8", "#d1453b", "#2a9d9d")  # on white and on black
MOST_POINTS = 2000  # of a line; more are thinned out evenly


@dataclass(frozen=True)
class Series:
    """One line, or the dots of one kind. `half`: half a 95 % interval at some of the x, drawn as a bar."""

    label: str
    points: Points
    color: str = COLORS[0]
    style: str = "line"  # line, dots or dashes
    faint: bool = False
    half: Points = field(default_factory=list)


@dataclass(frozen=True)
class Band:
    """An interval on the x axis, and a line at the value that it belongs to."""

    at: float
    low: float | None = None
    high: float | None = None
    color: str = COLORS[0]


@dataclass(frozen=True)
class Chart:
    title: str
    series: list[Series]
    note: str = ""  # a sentence below the title: how to read it
    x_label: str = "step"
    x_log: bool = False
    y_log: bool = False
    percent: bool = False
    tall: bool = False
    x_range: tuple[float, float] | None = None  # None: that of the data
    y_range: tuple[float, float] | None = None
    bands: list[Band] = field(default_factory=list)

    def html(self) -> str:
        """A figure that report.js fills."""
        note = f"<p>{escape(self.note)}</p>" if self.note else ""
        return (
            f'<figure class="chart{" tall" if self.tall else ""}"><figcaption>{escape(self.title)}</figcaption>{note}'
            f'<div class="plot"></div><script type="application/json">{_safe_json(self._data())}</script></figure>'
        )

    def _data(self) -> dict:
        """All series over one list of x, as uPlot wants them; null where a series has no value."""
        series = [(s, dict(thin(s.points)), dict(s.half)) for s in self.series]
        x = sorted({at for _, values, _ in series for at in values})
        return {
            "x": x,
            "series": [
                {"label": s.label, "color": s.color, "style": s.style, "faint": s.faint}
                | {"values": [_number(values.get(at)) for at in x]}
                | ({"half": [_number(half.get(at)) for at in x]} if half else {})
                for s, values, half in series
            ],
            "bands": [{"at": band.at, "low": band.low, "high": band.high, "color": band.color} for band in self.bands],
            **{name: getattr(self, name) for name in ("x_label", "x_log", "y_log", "percent", "tall", "x_range", "y_range")},
        }


def running_mean(points: Points) -> tuple[Points, int]:
    """The running mean of a loss that varies from step to step with the rows of the step, and how many points each mean is over.

    Where neighbours differ as much as any two points do, there is no trend to show, and the mean is over all of them: five losses
    of five batches, one above the other by chance, are no divergence. The test is von Neumann's: the mean squared difference of
    neighbours over the variance is 2 n / (n - 1) for noise, and less with a trend; noise is below the mean by more than 1.645
    standard deviations in 5 % of cases. Otherwise the mean is over a twentieth of the points, 5 at least, about each.
    Source: J. von Neumann, "Distribution of the ratio of the mean square successive difference to the variance", Ann. Math.
    Statist. 12 (1941) 367-395.

    >>> running_mean([(10, 1.0), (20, 3.0), (30, 2.0)])
    ([(10, 2.0), (20, 2.0), (30, 2.0)], 3)
    """
    n = len(points)
    half = max(2, n // 40)
    if n > 2 and not _has_trend([y for _, y in points]):
        half = n
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    smooth = []
    for i, (x, _) in enumerate(points):
        low, high = max(0, i - half), min(n, i + half + 1)
        smooth.append((x, (sums[high] - sums[low]) / (high - low)))
    return smooth, min(n, 2 * half + 1)


def _has_trend(values: list[float]) -> bool:
    n = len(values)
    mean = sum(values) / n
    squares = sum((y - mean) ** 2 for y in values)
    if not squares:
        return False
    ratio = sum((b - a) ** 2 for a, b in pairwise(values)) / squares * n / (n - 1)
    sd = 2 * n * math.sqrt((n - 2) / ((n + 1) * (n - 1) ** 3))
    return ratio < 2 * n / (n - 1) - 1.645 * sd


def thin(points: Points) -> Points:
    """At most MOST_POINTS of the points, evenly, with the last one."""
    every = math.ceil(len(points) / MOST_POINTS)
    return points if every <= 1 else [p for i, p in enumerate(points) if i % every == 0 or i == len(points) - 1]


def ordered_colors(number: int) -> list[str]:
    """Colors of settings in order, from blue over green to red; distinct ones for a few."""
    if number <= 3:
        return list(COLORS[:number])
    return [_hsl(220 - 220 * i / (number - 1)) for i in range(number)]


def _hsl(hue: float, saturation: float = 0.6, lightness: float = 0.52) -> str:
    import colorsys

    return "#" + "".join(f"{round(255 * v):02x}" for v in colorsys.hls_to_rgb(hue / 360, lightness, saturation))


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _safe_json(data: dict) -> str:
    """JSON that cannot end the script element that it stands in."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
