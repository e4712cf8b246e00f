"""A run as one HTML file: its summary, curves, metrics and config.

It shows whatever the run folder holds, so that an interrupted or failed run has a report too.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path

from chattrain.storage.files import replace_text
from chattrain.tracking import page
from chattrain.tracking.charts import COLORS, Chart, Series, running_mean
from chattrain.tracking.run_folder import Z95, Points, RunFolder, format_accuracy, label
from chattrain.tracking.samples_table import html_table

FACTS = ("steps", "tokens_seen", "supervised_tokens", "tokens_per_second", "init", "changes", "checkpoint", "error")
NOTE_LOSS = "Each dot is the loss of one step's rows, which differ from step to step; the line is the mean of {} logged steps{}."
NOTE_FLAT = ", all of them, as they show no trend beyond the chance of their rows"


def write_report(run_dir: Path) -> Path:
    """Write run_dir/report.html from its config.yaml, metrics.jsonl and summary.json, any of which may be missing or cut off."""
    run = RunFolder.read(Path(run_dir))
    path = run.path / "report.html"
    replace_text(path, _page(run))
    return path


def _page(run: RunFolder) -> str:
    title = f"{run.stage} {run.name}".strip()
    known = {fact: run.summary[fact] for fact in FACTS if run.summary.get(fact) is not None}
    validation = ", ".join(f"{key} {page.words(value)}" for key, value in run.validation.items())
    known |= {"validation": validation} if validation else {}
    parts = [
        page.facts(known) if known else "<p>There is no summary.json: the run has not ended, or was killed.</p>",
        "<h2>Curves, by step</h2>",
        page.charts(run_charts(run)) or "<p>No numbers were logged.</p>",
    ]
    if run.samples:
        parts += ["<h2>Replies to eval.prompts, by step</h2>", html_table(run.samples)]
    if run.last:
        parts += ["<h2>Last value of each metric</h2>", page.facts(last_values(run))]
    if run.audit:
        parts += ["<h2>Audit of the data</h2>", page.warnings(run.audit)]
    if run.config_text:
        parts += [
            "<h2>Config</h2><details><summary>config.yaml, resolved</summary>",
            f"<pre>{escape(run.config_text)}</pre></details>",
        ]
    return page.page(f"{title}: {run.status}", f"{escape(title)} {page.badge(run.status)}", parts)


def last_values(run: RunFolder) -> dict[str, object]:
    """The last value of each metric: accuracies with their interval, validation losses with what they are over."""
    accuracies = run.accuracies()
    return {
        label(name, run.validation.get("targets")): format_accuracy(*accuracies[name]) if name in accuracies else value
        for name, value in sorted(run.last.items())
    }


def run_charts(run: RunFolder) -> Iterator[Chart]:
    """The charts of one run. Metrics with a scale of their own have a chart of their own."""
    curves, targets = run.curves, run.validation.get("targets")
    if "train/loss" in curves:
        yield _training_loss(curves["train/loss"])
    for name in ("val/loss", "val/loss_all", "val/bpb"):
        if name in curves:
            by_source = _named(curves, f"{name}/")
            series = [Series(n, points, COLORS[i % len(COLORS)]) for i, (n, points) in enumerate(by_source.items(), start=1)]
            lines = [Series(name, curves[name]), *series]
            yield Chart(label(name, targets), lines, y_log=spans_much([line.points for line in lines]))
    accuracies = _named(curves, "eval/", "_acc")
    if accuracies:
        series = [
            Series(name.removeprefix("eval/"), points, COLORS[i % len(COLORS)], half=half_widths(run, name))
            for i, (name, points) in enumerate(accuracies.items())
        ]
        note = "Bars: 95 % intervals (1.96 standard errors)." if any(s.half for s in series) else ""
        yield Chart("accuracy", series, note, percent=True)
    samples = _named(curves, "samples/")
    if samples:
        series = [
            Series(name.removeprefix("samples/"), p, COLORS[i % len(COLORS)]) for i, (name, p) in enumerate(samples.items())
        ]
        yield Chart("replies to eval.prompts", series, "Fractions of the replies.", percent=True)
    rates = _named(curves, "lr/") or _named(curves, "lr_factor")
    if rates:
        yield _lines("learning rate by group" if "lr_factor" not in rates else "lr_factor", rates)
    norms = _named(curves, "train/grad_norm")
    if norms:
        yield _lines("gradient norm", norms)
    for name, title in (
        ("train/tokens_per_second", "throughput, tokens/s"),
        ("train/mfu", "model FLOPs utilisation"),
        ("train/data_wait", "share of the time that waits for data"),
        ("train/peak_memory_gib", "peak memory, GiB"),
    ):
        if name in curves:
            yield Chart(title, [Series(name, curves[name])], percent=name in ("train/mfu", "train/data_wait"))


def half_widths(run: RunFolder, accuracy: str) -> Points:
    """Half the 95 % interval of an accuracy at each step with a standard error."""
    return [(step, Z95 * error) for step, error in run.curves.get(accuracy.removesuffix("_acc") + "_stderr", [])]


def _training_loss(points: Points) -> Chart:
    smooth, number = running_mean(points)
    note = NOTE_LOSS.format(number, NOTE_FLAT if number == len(points) > 2 else "")
    return Chart("train/loss", [Series("one step", points, style="dots", faint=True), Series("running mean", smooth)], note)


def _lines(title: str, curves: dict[str, Points]) -> Chart:
    """Several metrics with one scale."""
    series = [Series(name, points, COLORS[i % len(COLORS)]) for i, (name, points) in enumerate(curves.items())]
    return Chart(title, series, y_log=spans_much(list(curves.values())))


def spans_much(curves: list[Points]) -> bool:
    """Should the scale be logarithmic? Where all values are above 0, and the largest is more than three times the smallest."""
    values = [y for points in curves for _, y in points]
    return bool(values) and 0 < 3 * min(values) < max(values)


def _named(curves: dict[str, Points], prefix: str, suffix: str = "") -> dict[str, Points]:
    return {name: points for name, points in sorted(curves.items()) if name.startswith(prefix) and name.endswith(suffix)}
