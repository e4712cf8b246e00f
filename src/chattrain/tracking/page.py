"""A page of HTML that needs only a browser: style, script and charts are in the file, and nothing is loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path

from chattrain.tracking.charts import Chart

ASSETS = Path(__file__).parent / "assets"  # uPlot 1.6.32 (MIT, https://github.com/leeoniya/uPlot), and report.js on top of it
CSS = """
@media screen { :root { color-scheme: light dark; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1300px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin-top: 2rem; }
a { color: #3b82c4; }
.status { font-size: .6em; border: 1px solid; border-radius: 1em; padding: .1em .7em; vertical-align: middle; }
.completed { color: #2f9e6e; } .failed { color: #d1453b; } .interrupted, .unfinished, .pruned { color: #b7791f; }
.warnings li { margin: .3em 0; } .warnings li::marker { content: "⚠ "; color: #b7791f; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; } tr { border-bottom: 1px solid #8b949e55; }
td, th { text-align: left; padding: .2em 1.5em .2em 0; overflow-wrap: anywhere; vertical-align: top; }
th { font-weight: 400; opacity: .75; white-space: nowrap; }
.wide td { white-space: nowrap; padding-right: 1.2em; font-variant-numeric: tabular-nums; }
.wide td:first-child, .wide th:first-child { position: sticky; left: 0; background: Canvas; }
.jobs td:last-child { white-space: normal; min-width: 14em; } .best { font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); gap: 1.2rem 2rem; }
.chart { margin: 0; min-width: 0; } .chart.tall { grid-column: 1 / -1; max-width: 800px; }
figcaption { font-weight: 600; font-size: .9rem; } .chart p { font-size: .8rem; opacity: .75; margin: 0; }
.plot { width: 100%; min-width: 0; } .u-legend { font-size: 12px; text-align: left; } .u-inline tr { margin-right: 6px; }
.u-series > * { padding: 1px 3px; border: 0; } .u-legend th { white-space: normal; opacity: 1; } .u-legend tr { border: 0; }
.samples { overflow-x: auto; } .samples td { white-space: pre-wrap; min-width: 12em; font-size: 13px; }
.samples tr th:first-child { white-space: normal; min-width: 10em; } .samples small { display: block; opacity: .75; }
pre { overflow-x: auto; font-size: 13px; } summary { cursor: pointer; }
@media (max-width: 600px) { body { margin: 1rem auto; } td, th { padding-right: .8em; } .wide td { padding-right: .8em; } }
@media print { body { margin: 0; font-size: 11px; } h2 { break-after: avoid; } .chart, tr { break-inside: avoid; }
  .wide td { white-space: normal; } pre { white-space: pre-wrap; } }
"""
HINT = "<p>Click a name to hide its line; drag to zoom, double-click to see all.</p>"


def page(title: str, heading: str, parts: list[str]) -> str:
    """`heading` and `parts` are HTML; `title` is text. The script stands at the end, and only where there is a chart."""
    body = "\n".join(parts)
    has_charts = '<figure class="chart' in body
    scripts = "".join(f"<script>{_asset(name)}</script>" for name in ("uPlot.iife.min.js", "report.js")) if has_charts else ""
    style = (_asset("uPlot.min.css") if has_charts else "") + CSS
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title><style>{style}</style></head><body>\n<h1>{heading}</h1>\n{body}\n{scripts}</body></html>\n"
    )


def badge(status: str) -> str:
    return f'<span class="status {escape(status)}">{escape(status)}</span>'


def warnings(sentences: list[str]) -> str:
    """A list with a mark at each; nothing where there are none."""
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f'<ul class="warnings">{items}</ul>' if items else ""


def charts(drawn: Iterable[Chart]) -> str:
    """A grid of charts; nothing where there is none."""
    figures = [chart.html() for chart in drawn]
    noscript = "<noscript><p>The charts need JavaScript; the tables do not.</p></noscript>"
    return f'{noscript}<div class="charts">' + "\n".join(figures) + "</div>" if figures else ""


def facts(cells: dict[str, object]) -> str:
    """A table of names and values."""
    rows = (f"<tr><th>{escape(str(key))}</th><td>{escape(words(value))}</td></tr>" for key, value in cells.items())
    return "<table>" + "\n".join(rows) + "</table>"


def grid(header: list[str], rows: list[list[str]], best: str | None = None) -> str:
    """A table with a header, which scrolls sideways where it is wide. `best`: of a sweep, whose rows with this first cell stand
    out, and whose last column has sentences."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = ""
    for row in rows:
        marked = ' class="best"' if best and row[0] == best else ""
        body += f"<tr{marked}>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n"
    return f'<div class="wide{" jobs" if best else ""}"><table><tr>{head}</tr>\n{body}</table></div>'


def words(value: object) -> str:
    """A value as a cell of a table.

    >>> [words(value) for value in (1048576, 2.312345, None, "step_000200")]
    ['1,048,576', '2.3123', 'not finite', 'step_000200']
    """
    if value is None:
        return "not finite"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.5g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8").strip()
