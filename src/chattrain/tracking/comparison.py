"""Several runs as one HTML file: what differs in their configuration, what they reached, and their curves over each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chattrain.config.changes import flatten
from chattrain.storage.files import replace_text
from chattrain.tracking import page
from chattrain.tracking.charts import COLORS, Chart, Series, running_mean
from chattrain.tracking.report import half_widths, spans_much
from chattrain.tracking.run_folder import RunFolder, format_accuracy, label, over

OF_NO_EFFECT = ("run.name", "run.dir", "run.root", "runs", "sweep.")  # beginnings of keys that a run's numbers do not follow from
ORDER = (
    "train/loss",
    "val/",
    "eval/",
    "lr/",
    "lr_factor",
    "train/grad_norm",
    "train/tokens_per_second",
    "train/mfu",
    "train/peak_",
)
PERCENT = ("train/mfu",)


def write_comparison(run_dirs: list[Path], path: Path) -> Path:
    """Write the page to `path`. Run folders may have any file missing or cut off."""
    runs = [RunFolder.read(Path(run_dir)) for run_dir in run_dirs]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, _page(run_labels(runs), runs))
    return path


def run_labels(runs: list[RunFolder]) -> list[str]:
    """`<stage> <name>`, or the path where two would be the same."""
    names = [f"{run.stage} {run.name}".strip() for run in runs]
    return [name if Counter(names)[name] == 1 else str(run.path) for name, run in zip(names, runs, strict=True)]


def _page(names: list[str], runs: list[RunFolder]) -> str:
    header, rows = _differences(names, runs)
    parts = ["<h2>What differs in the configuration</h2>"]
    parts.append(page.grid(header, rows) if rows else "<p>Nothing.</p>")
    unread = [name for name, run in zip(names, runs, strict=True) if not run.settings]
    if unread:
        parts.append(page.warnings([f"config.yaml of {', '.join(unread)} could not be read."]))
    parts.append("<h2>What the runs reached</h2>")
    if _different_targets("val/loss", runs):
        kinds = ", ".join(f"{name}: {_over('val/loss', run) or 'not recorded'}" for name, run in zip(names, runs, strict=True))
        parts.append(page.warnings([f"Validation losses are over different targets, so they do not rank the runs ({kinds})."]))
    elif other_rows := _measured_on(names, runs):
        parts.append(page.warnings([f"Validation losses are over other tokens, so they do not rank the runs ({other_rows})."]))
    parts.append(page.grid(*_results(names, runs)))
    curves = page.charts(_charts(names, runs))
    parts += ["<h2>Curves, by step</h2>", page.HINT, curves] if curves else ["<p>No numbers were logged.</p>"]
    title = f"{len(runs)} runs compared"
    return page.page(f"{title}: {', '.join(names)}", title, parts)


def _differences(names: list[str], runs: list[RunFolder]) -> tuple[list[str], list[list[str]]]:
    """A row for each key of the configuration that has several values."""
    flat = [flatten(run.settings) for run in runs]
    rows = []
    for key in sorted({key for settings in flat for key in settings if not key.startswith(OF_NO_EFFECT)}):
        values = [_shown(settings[key]) if key in settings else "–" for settings in flat]
        known = [value for value, run in zip(values, runs, strict=True) if run.settings]
        if len(set(known)) > 1:
            rows.append([key, *values])
    return ["key", *names], rows


def _results(names: list[str], runs: list[RunFolder]) -> tuple[list[str], list[list[str]]]:
    """A row for each thing, a column for each run: runs are few, and names are long."""
    rows = [["status", *(run.status for run in runs)]]
    for key in ("steps", "tokens_seen", "supervised_tokens", "tokens_per_second", "init", "error"):
        if any(run.summary.get(key) is not None for run in runs):
            rows.append([key, *(page.words(run.summary[key]) if run.summary.get(key) is not None else "" for run in runs)])
    for name in sorted({name for run in runs for name in run.last if name.startswith(("train/loss", "val/"))}):
        for kind in dict.fromkeys(label(name, run.validation.get("targets")) for run in runs if name in run.last):
            same = [name in run.last and label(name, run.validation.get("targets")) == kind for run in runs]
            rows.append([kind, *(page.words(run.last[name]) if has else "" for run, has in zip(runs, same, strict=True))])
    for name in sorted({name for run in runs for name in run.accuracies()}):
        found = [run.accuracies().get(name) for run in runs]
        rows.append([name, *(format_accuracy(*accuracy) if accuracy else "" for accuracy in found)])
    return ["", *names], rows


def _charts(names: list[str], runs: list[RunFolder]) -> Iterator[Chart]:
    """A chart for each metric that a run has, a line for each run, in the same colour everywhere."""
    logged = dict.fromkeys(name for run in runs for name in run.curves)
    chosen = [name for prefix in ORDER for name in logged if name.startswith(prefix) and not name.endswith(("_stderr", "_n"))]
    for name in chosen:
        loss, validation = name == "train/loss", name.startswith("val/")
        series = []
        for i, (run_name, run) in enumerate(zip(names, runs, strict=True)):
            if name not in run.curves:
                continue
            points, color = run.curves[name], COLORS[i % len(COLORS)]
            if loss:
                series.append(Series(f"{run_name}, one step", points, color, style="dots", faint=True))
                points = running_mean(points)[0]
            half = half_widths(run, name) if name.endswith("_acc") else []
            words = f" ({_over(name, run) or 'not recorded'})" if validation and _different_targets(name, runs) else ""
            series.append(Series(run_name + words, points, color, half=half))
        differ = _different_targets(name, runs)
        targets = None if differ else runs[0].validation.get("targets")
        note = "Over different targets: the lines do not rank the runs." if validation and differ else ""
        note = "Dots: the loss of one step's rows. Lines: running means." if loss else note
        percent = name.endswith("_acc") or name in PERCENT
        log = not percent and spans_much([s.points for s in series])
        yield Chart(label(name, targets), series, note, percent=percent, y_log=log)


def _different_targets(metric: str, runs: list[RunFolder]) -> bool:
    """Does the validation metric of the runs measure different things?"""
    return len({_over(metric, run) for run in runs if metric in run.last}) > 1


def _measured_on(names: list[str], runs: list[RunFolder]) -> str | None:
    """The assistant tokens that each run's validation loss is a mean over; None where they are as many."""
    measured = {name: run.validation["tokens"] for name, run in zip(names, runs, strict=True) if "tokens" in run.validation}
    if len(set(measured.values())) < 2:
        return None
    return ", ".join(f"{name}: {tokens:,} assistant tokens" for name, tokens in measured.items())


def _over(metric: str, run: RunFolder) -> str | None:
    return over(metric, run.validation.get("targets"))


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
