"""A run as one HTML file: its summary, curves, metrics and config.

The file needs only a browser: the charts are SVG, and no script, font or picture is loaded. It shows whatever the run folder
holds, so that an interrupted or failed run has a report too.
"""

import json
import math
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path

import yaml

from chattrain.storage.files import replace_text
from chattrain.tracking.metrics import read_metrics

Points = list[tuple[float, float]]  # (step, value)

FACTS = ("steps", "tokens_seen", "supervised_tokens", "tokens_per_second", "init", "checkpoint", "error")
COLORS = ("#3b82c4", "#d9822b", "#2f9e6e", "#b5539c", "#8a7a2f", "#7a6ad8")  # distinct on white and on black
CHART_CSS = """
.chart text { font: 11px system-ui, sans-serif; fill: #57606a; }
.chart .title { font-size: 13px; font-weight: 600; fill: #1f2328; }
.chart .grid { stroke: #8b949e; stroke-opacity: .3; }
.chart polyline { fill: none; stroke-width: 1.5; stroke-linejoin: round; }
@media screen and (prefers-color-scheme: dark) { .chart text { fill: #9aa4ae; } .chart .title { fill: #e6edf3; } }
"""  # in each chart, so that it looks the same outside of the page
PAGE_CSS = """
@media screen { :root { color-scheme: light dark; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1300px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.status { font-size: .6em; border: 1px solid; border-radius: 1em; padding: .1em .7em; vertical-align: middle; }
.completed { color: #2f9e6e; } .failed { color: #d1453b; } .interrupted, .unfinished { color: #b7791f; }
table { border-collapse: collapse; } tr { border-bottom: 1px solid #8b949e55; }
td, th { text-align: left; padding: .2em 1.5em .2em 0; overflow-wrap: anywhere; }
th { font-weight: 400; opacity: .7; white-space: nowrap; vertical-align: top; }
.charts { display: flex; flex-wrap: wrap; gap: 1rem; } .charts svg { max-width: 100%; height: auto; }
pre { overflow-x: auto; font-size: 13px; } summary { cursor: pointer; }
@media print { body { margin: 0; font-size: 11px; } h2 { break-after: avoid; } svg, tr { break-inside: avoid; }
  .charts { display: block; } pre { white-space: pre-wrap; } }
"""


def write_report(run_dir: Path) -> Path:
    """Write run_dir/report.html from its config.yaml, metrics.jsonl and summary.json, any of which may be missing or cut off."""
    run_dir = Path(run_dir)
    config, summary = _text(run_dir / "config.yaml"), _summary(_text(run_dir / "summary.json"))
    curves, last = _curves(read_metrics(run_dir / "metrics.jsonl"))
    stage, name = _stage_and_name(config, run_dir)
    path = run_dir / "report.html"
    replace_text(path, _page(f"{stage} {name}".strip(), summary, curves, last, config))
    return path


def _page(title: str, summary: dict, curves: dict[str, Points], last: dict, config: str) -> str:
    status = escape(str(summary.get("status", "unfinished")))
    facts = {fact: summary[fact] for fact in FACTS if summary.get(fact) is not None}
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}: {status}</title><style>{PAGE_CSS}</style></head><body>",
        f'<h1>{escape(title)} <span class="status {status}">{status}</span></h1>',
        _table(facts) if facts else "<p>There is no summary.json: the run has not ended, or was killed.</p>",
        "<h2>Curves, by step</h2>",
        '<div class="charts">' + "\n".join(_charts(curves)) + "</div>" if curves else "<p>No numbers were logged.</p>",
    ]
    if last:
        parts += ["<h2>Last value of each metric</h2>", _table(dict(sorted(last.items())))]
    if config:
        parts += [
            "<h2>Config</h2><details><summary>config.yaml, resolved</summary>",
            f"<pre>{escape(config)}</pre></details>",
        ]
    return "\n".join([*parts, "</body></html>\n"])


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _summary(text: str) -> dict:
    """{} where the text is no JSON object: a run that ended badly needs its report most."""
    try:
        summary = json.loads(text)
    except ValueError:
        return {}
    return summary if isinstance(summary, dict) else {}


def _stage_and_name(config: str, run_dir: Path) -> tuple[str, str]:
    """Stage and run.name of the config; where it cannot be read, no stage and the name of the folder."""
    try:
        values = yaml.safe_load(config)  # plain values only: interpolations stay text
        return str(values["stage"]), str(values["run"]["name"])
    except Exception:  # cut off or malformed in any way; the page shows the text itself
        return "", run_dir.resolve().name


def _curves(rows: list[dict]) -> tuple[dict[str, Points], dict[str, float | None]]:
    """The points of each metric (numbers only), and its last value, None where that was not finite."""
    curves: dict[str, Points] = {}
    last: dict[str, float | None] = {}
    for row in rows:
        for name, value in row.items():
            if name in ("step", "time"):
                continue
            last[name] = value
            if isinstance(value, int | float):
                curves.setdefault(name, []).append((row["step"], value))
    return curves, last


def _charts(curves: dict[str, Points]) -> Iterator[str]:
    """One chart a metric, as scales differ; accuracies have the same scale and share one chart."""
    for name in ("train/loss", "val/bpb", "val/loss", "lr_factor"):
        if name in curves:
            yield curve_svg({name: curves[name]}, name)
    accuracies = {name: points for name, points in curves.items() if name.startswith("eval/") and name.endswith("_acc")}
    if accuracies:
        yield curve_svg(accuracies, "accuracy" if len(accuracies) > 1 else next(iter(accuracies)))


def _table(cells: dict) -> str:
    rows = (f"<tr><th>{escape(str(key))}</th><td>{escape(_words(value))}</td></tr>" for key, value in cells.items())
    return "<table>" + "\n".join(rows) + "</table>"


def _words(value: object) -> str:
    """A value as a cell of a table.

    >>> [_words(value) for value in (1048576, 2.312345, None, "step_000200")]
    ['1,048,576', '2.3123', 'not finite', 'step_000200']
    """
    if value is None:
        return "not finite"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.5g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def curve_svg(series: dict[str, Points], title: str, width: int = 640, height: int = 240) -> str:
    """One chart as a standalone `<svg>`: a line a series, axes with round ticks, a legend for several series.

    Points that are not finite are left out. The background is transparent, and the chart is legible on light and on dark.
    """
    series = {name: [p for p in points if all(map(math.isfinite, p))] for name, points in series.items()}
    legend, legend_height = _legend(list(series), width) if len(series) > 1 else ("", 0)
    left, right, top, bottom = 56, width - 20, 32 + legend_height, height - 28
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" role="img" aria-label="{escape(title)}" '
        f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"><style>{CHART_CSS}</style>'
        f'<text class="title" x="8" y="18">{escape(title)}</text>{legend}'
    )
    if not any(series.values()):
        return head + f'<text x="{width / 2:g}" y="{height / 2:g}" text-anchor="middle">no data</text></svg>'
    steps, values = zip(*(point for points in series.values() for point in points), strict=True)
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.1 * abs(high) or 1
    x_range = (min(steps), max(steps)) if min(steps) < max(steps) else (steps[0] - 1, steps[0] + 1)
    y_range = low - margin, high + margin
    x, y = _scale(x_range, left, right), _scale(y_range, bottom, top)
    grid = [_x_tick(f"{t:,g}", x(t), bottom) for t in _ticks(*x_range, least=1)]
    grid += [_y_tick(f"{t:,g}", y(t), left, right) for t in _ticks(*y_range)]
    lines = [_line(points, COLORS[i % len(COLORS)], x, y) for i, points in enumerate(series.values())]
    return head + "".join(grid + lines) + "</svg>"


def _ticks(low: float, high: float, most: int = 6, least: float = 0) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten within [low, high], at most `most` intervals of at least `least`.

    >>> _ticks(0, 200), _ticks(0.13, 0.87), _ticks(1, 3, least=1)
    ([0, 50, 100, 150, 200], [0.2, 0.4, 0.6, 0.8], [1, 2, 3])
    """
    smallest = max((high - low) / most, least)
    power = 10.0 ** math.floor(math.log10(smallest))
    step = next(power * times for times in (1, 2, 5, 10) if power * times >= smallest * (1 - 1e-9))
    ticks = [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return [int(tick) if tick == int(tick) else tick for tick in ticks]


def _scale(values: tuple[float, float], start: float, end: float) -> Callable[[float], float]:
    """The map from a range of values to pixels."""
    low, high = values
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _x_tick(label: str, x: float, bottom: float) -> str:
    return (
        f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>'
        f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{label}</text>'
    )


def _y_tick(label: str, y: float, left: float, right: float) -> str:
    return (
        f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
    )


def _line(points: Points, color: str, x: Callable[[float], float], y: Callable[[float], float]) -> str:
    """The line, and dots where there are few points: a single point makes no line."""
    pixels = [(f"{x(step):.1f}", f"{y(value):.1f}") for step, value in points]
    dots = [f'<circle cx="{a}" cy="{b}" r="2.5" fill="{color}"/>' for a, b in pixels] if len(points) <= 20 else []
    path = " ".join(f"{a},{b}" for a, b in pixels)
    return f'<polyline stroke="{color}" points="{path}"/>' + "".join(dots)


def _legend(names: list[str], width: int) -> tuple[str, int]:
    """Rows of colour and name below the title, and their height in pixels."""
    parts, x, y = [], 8.0, 36
    for i, name in enumerate(names):
        need = 24 + 6.5 * len(name)  # pixels, from the mean width of a letter
        if x > 8 and x + need > width:
            x, y = 8.0, y + 16
        parts.append(f'<rect x="{x:g}" y="{y - 8}" width="10" height="8" rx="2" fill="{COLORS[i % len(COLORS)]}"/>')
        parts.append(f'<text x="{x + 14:g}" y="{y}">{escape(name)}</text>')
        x += need
    return "".join(parts), y - 20
