"""The runs of a sweep as a table, and the paths of their reports."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from chattrain.tracking.metrics import DETAILS, read_metrics


def show_runs(run_dirs: list[Path]) -> None:
    """Print one row a run: each evaluation metric (train/loss where nothing was evaluated), its first and last value."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    runs = [(json.loads((d / "summary.json").read_text()), _ranges(d)) for d in run_dirs]
    names = sorted({name for _, ranges in runs for name in ranges}, key=lambda n: (not n.startswith("val/"), n))
    if any(not name.startswith("train/") for name in names):
        names = [name for name in names if not name.startswith("train/")]
    table = Table(title="first value -> last value", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("run", "steps", "tokens/s", *(name.removeprefix("eval/") for name in names)):
        table.add_column(column, no_wrap=True, justify="left" if column == "run" else "right")
    one_stage = len({summary["stage"] for summary, _ in runs}) == 1
    for (summary, ranges), run_dir in zip(runs, run_dirs, strict=True):
        speed = summary["tokens_per_second"]
        failed = "" if summary["status"] == "completed" else f" ({summary['status']})"
        table.add_row(
            _label(summary, run_dir, one_stage) + failed,
            str(summary["steps"]),
            f"{speed:,.0f}" if speed else "n/a",
            *(ranges.get(name, "") for name in names),
        )
    console = Console(width=None if sys.stdout.isatty() else 160)  # wide enough that a file or pipe has whole columns
    console.print(table)
    for run_dir in run_dirs:
        console.print(f"{run_dir / 'report.html'}", highlight=False, soft_wrap=True)


def _label(summary: dict, run_dir: Path, one_stage: bool) -> str:
    """The stage, if runs differ in it, and the swept keys, which stand in the run's name as `-<key>=<value>`."""
    swept = [part for part in run_dir.name.split("-") if "=" in part]
    return " ".join(swept if swept and one_stage else [summary["stage"], *swept])


def _ranges(run_dir: Path) -> dict[str, str]:
    """`first value -> last value` of each evaluation metric and of train/loss."""
    values: dict[str, list[float]] = {}
    for row in read_metrics(run_dir / "metrics.jsonl"):
        for name, value in row.items():
            if value is not None and name.startswith(("val/", "eval/", "train/loss")) and not name.endswith(DETAILS):
                values.setdefault(name, []).append(value)
    return {
        name: _format(name, series[0]) + (f" -> {_format(name, series[-1])}" if len(series) > 1 else "")
        for name, series in values.items()
    }


def _format(name: str, value: float) -> str:
    return f"{value:.1%}" if name.endswith("_acc") else f"{value:.3f}"
