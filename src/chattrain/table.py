"""The runs of a sweep side by side, and where to look next."""

from __future__ import annotations

import json
from pathlib import Path

from chattrain.tracking import read_metrics

SHOWN = ("train/loss", "val/loss", "val/bpb")  # then every eval/..._acc


def show_runs(run_dirs: list[Path]) -> None:
    """One row a run: each metric from its first value to its last."""
    from rich.console import Console
    from rich.table import Table

    runs = [(json.loads((d / "summary.json").read_text()), _ranges(d)) for d in run_dirs]
    evals = sorted({name for _, ranges in runs for name in ranges if name.startswith("eval/")})
    table = Table(title="first value -> last value of each run")
    for column in ("stage", "run", "status", "steps", "tokens/s", *SHOWN, *evals):
        table.add_column(column, justify="left" if column in ("stage", "run", "status") else "right")
    for (summary, ranges), run_dir in zip(runs, run_dirs, strict=True):
        speed = summary["tokens_per_second"]
        table.add_row(summary["stage"], run_dir.name, summary["status"], str(summary["steps"]),
                      f"{speed:,.0f}" if speed else "n/a", *(ranges.get(name, "") for name in (*SHOWN, *evals)))
    console = Console()
    console.print(table)
    for run_dir in run_dirs:
        console.print(f"{run_dir / 'report.html'}", highlight=False, soft_wrap=True)


def _ranges(run_dir: Path) -> dict[str, str]:
    values: dict[str, list[float]] = {}
    for row in read_metrics(run_dir / "metrics.jsonl"):
        for name, value in row.items():
            if value is not None:
                values.setdefault(name, []).append(value)
    return {name: _form(name, found[0]) + (f" -> {_form(name, found[-1])}" if len(found) > 1 else "")
            for name, found in values.items()}


def _form(name: str, value: float) -> str:
    return f"{value:.1%}" if name.endswith("_acc") else f"{value:.3f}"
