"""A sweep as one HTML file: the answer, the table, the objective over the learning rate, and the curves of its runs."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Iterator
from html import escape
from pathlib import Path

from chattrain.storage.files import replace_text
from chattrain.tracking import page
from chattrain.tracking.answer import Answer, find_answer
from chattrain.tracking.charts import COLORS, Band, Chart, Series, ordered_colors, running_mean
from chattrain.tracking.ranking import SEED, Group, Ranking, Row, as_number, read_runs
from chattrain.tracking.report import spans_much
from chattrain.tracking.run_folder import Points, RunFolder, label
from chattrain.tracking.sweep_record import SweepRecord
from chattrain.tracking.sweep_table import BEST, cells, short_names

MOST_SETTINGS = 12  # whose curves are drawn, from the best on
MARGIN = 3.0  # the chart of the objective is this many times as high as the part that the parabola was fitted to


def write_sweep_report(folder: Path, test: dict | None = None) -> Path:
    """Write report.html into a sweep's folder. Run folders may have any file missing; sweep.json must be readable.

    `test`: metrics of the best by name, measured on data that did not choose it.
    """
    folder = Path(folder)
    record = SweepRecord.read(folder)
    runs = read_runs(record)
    path = folder / "report.html"
    replace_text(path, _page(folder, find_answer(record, runs, test), runs))
    return path


def _page(folder: Path, answer: Answer, runs: dict[int, RunFolder]) -> str:
    ranking = answer.ranking
    command = shlex.join(["python", "-m", "chattrain", *ranking.record.command])
    parts = [*(f"<p>{escape(sentence)}</p>" for sentence in answer.sentences)]
    parts.append(page.warnings(answer.doubts))
    if answer.commands:
        parts.append("<p>The best, trained again:</p>" + "".join(f"<pre>{escape(c)}</pre>" for c in answer.commands))
    header, rows = cells(ranking)
    parts += [
        page.charts(_objective_charts(ranking)),
        "<h2>Jobs, from the best on</h2>",
        page.grid(header, rows, BEST),
    ]
    curves = page.charts(_curve_charts(ranking, runs))
    parts += ["<h2>Curves, by step</h2>", page.HINT, curves] if curves else []
    parts += [_links(folder, ranking), f"<h2>Command</h2><pre>{escape(command)}</pre>"]
    name = f"sweep {ranking.record.name}"
    return page.page(name, escape(name), parts)


def _objective_charts(ranking: Ranking) -> Iterator[Chart]:
    """The objective over the learning rate, a chart for each kind of target."""
    for targets in dict.fromkeys(group.targets for group in ranking.groups):
        groups = [group for group in ranking.groups if group.targets == targets]
        series = [s for i, group in enumerate(groups) for s in _group_series(group, ranking, COLORS[i % len(COLORS)])]
        rates = [rate for group in groups for rate, _ in group.points]
        y_range, outside = _visible(groups, ranking.maximize)
        note = f"{outside} runs lie beyond the chart." if outside > 1 else "One run lies beyond the chart." if outside else ""
        bands = [
            Band(g.fit.minimum, *(g.fit.interval or (None, None)), COLORS[i % len(COLORS)])
            for i, g in enumerate(groups)
            if g.fit and g.fit.minimum
        ]
        if any(band.low for band in bands):
            note = f"Shaded: 95 % interval of the optimum. {note}"
        yield Chart(
            f"{label(ranking.objective, targets)} over {ranking.rate_axis}",
            series,
            note.strip(),
            x_label=str(ranking.rate_axis),
            x_log=True,
            tall=True,
            x_range=(min(rates) / 1.3, max(rates) * 1.3),
            y_range=y_range,
            bands=bands,
        )


def _group_series(group: Group, ranking: Ranking, color: str) -> Iterator[Series]:
    """The runs as dots, a colour's dots for each seed, and the parabola as dashes."""
    name = f"{group.name}, " if group.name else ""
    seeds: dict[str, Points] = {}
    for row in ranking.ranked:
        rate, objective = as_number(row.job.values.get(ranking.rate_axis or "")), row.job.objective
        rest = tuple(pair for pair in row.setting if pair[0] != ranking.rate_axis)
        if (rest, row.targets) == (group.setting, group.targets) and rate and objective is not None:
            seeds.setdefault(row.job.values.get(SEED, ""), []).append((rate, objective))
    for seed, points in seeds.items():
        yield Series(f"{name}seed {seed}" if seed else f"{name}runs", sorted(points), color, style="dots", faint=len(seeds) > 1)
    if len(seeds) > 1:
        means: dict[float, list[float]] = {}
        for rate, objective in group.points:
            means.setdefault(rate, []).append(objective)
        yield Series(f"{name}mean", [(rate, sum(ys) / len(ys)) for rate, ys in sorted(means.items())], color, style="dots")
    if group.fit:
        low, high = group.fit.rates[0], group.fit.rates[-1]
        at = [low * (high / low) ** (i / 60) for i in range(61)]
        yield Series(f"{name}parabola", [(rate, group.fit(rate)) for rate in at], color, style="dashes")


def _visible(groups: list[Group], maximize: bool) -> tuple[tuple[float, float], int]:
    """The range of the objective that shows where the best is, and how many runs lie outside: one that diverged would hide it."""
    sign = -1 if maximize else 1
    every = [sign * y for group in groups for _, y in group.points]
    fitted = [sign * y for g in groups for rate, y in g.points if g.fit and rate in g.fit.rates] or every
    best = min(every)
    spread = (max(fitted) - best) or abs(best) * 0.01 or 1.0
    worst = min(max(every), best + MARGIN * spread)
    ends = sorted((sign * (best - 0.15 * spread), sign * (worst + 0.15 * spread)))
    return (ends[0], ends[1]), sum(y > worst + 0.15 * spread for y in every)


def _curve_charts(ranking: Ranking, runs: dict[int, RunFolder]) -> Iterator[Chart]:
    """Losses and accuracies of each setting, the mean over its seeds; a colour for each setting, in the order of the sweep."""
    settings: dict[tuple, list[Row]] = {}
    for row in ranking.rows:
        if row.job.num in runs and row.job.stage == ranking.last_stage:
            settings.setdefault((row.targets, row.setting), []).append(row)
    shown = dict(list(settings.items())[:MOST_SETTINGS])
    order = sorted(shown, key=lambda key: [(as_number(value) or math.inf, value) for _, value in key[1]])
    colors = dict(zip(order, ordered_colors(len(order)), strict=True))
    names = dict.fromkeys(name for rows in shown.values() for row in rows for name in runs[row.job.num].curves)
    few = "" if len(shown) == len(settings) else f" Of {len(settings)} settings the first {len(shown)} of the table."
    for name in names:
        accuracy = name.startswith("eval/") and name.endswith("_acc")
        if name != "train/loss" and not name.startswith("val/") and not accuracy:
            continue
        series = []
        for key in order:
            points = _mean_curve([runs[row.job.num].curves.get(name, []) for row in shown[key]])
            points = running_mean(points)[0] if name == "train/loss" else points
            seeds = f" (mean of {len(shown[key])})" if len(shown[key]) > 1 else ""
            series += [Series(_short(shown[key][0]) + seeds, points, colors[key])] if points else []
        note = ("Running means, as the rows of a step differ." if name == "train/loss" else "") + few
        targets = shown[order[0]][0].targets if len(ranking.winners) == 1 else None
        log = not accuracy and spans_much([s.points for s in series])
        yield Chart(label(name, targets), series, note.strip(), percent=accuracy, y_log=log, tall=len(series) > 6)


def _short(row: Row) -> str:
    keys = [key for key, _ in row.setting]
    pairs = zip(short_names(keys), row.setting, strict=True)
    return " ".join(f"{name}={value}" for name, (_, value) in pairs) or row.describe()


def _mean_curve(curves: list[Points]) -> Points:
    """The mean at each step that every curve has."""
    values: dict[float, list[float]] = {}
    for points in curves:
        for step, y in dict(points).items():
            values.setdefault(step, []).append(y)
    return [(step, sum(ys) / len(ys)) for step, ys in sorted(values.items()) if len(ys) == len(curves)]


def _links(folder: Path, ranking: Ranking) -> str:
    """The report of each run, by a path relative to the sweep's folder, so that runs/ can be moved."""
    items = ""
    for row in ranking.rows:
        if row.job.run_dir and (Path(row.job.run_dir) / "report.html").is_file():
            path = Path(os.path.relpath(row.job.run_dir, folder.resolve())) / "report.html"
            seed = f" {SEED}={row.job.values[SEED]}" if SEED in row.job.values else ""
            items += f'<li><a href="{escape(_address(path))}">{escape(row.job.stage)} {escape(row.describe() + seed)}</a></li>'
    return f"<details><summary>Reports of the runs</summary><ul>{items}</ul></details>" if items else ""


def _address(path: Path) -> str:
    from urllib.parse import quote

    return quote(path.as_posix())
