"""The tables that a launch prints at its end: the stages of a chain, or a sweep with its answer."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from chattrain.storage.files import replace_text
from chattrain.tracking.answer import Answer, find_answer
from chattrain.tracking.metrics import is_detail, read_metrics
from chattrain.tracking.ranking import read_runs
from chattrain.tracking.sweep_record import SweepRecord
from chattrain.tracking.sweep_table import cells, markdown

if TYPE_CHECKING:
    from rich.console import Console

log = logging.getLogger("chattrain")

RANGES = "first value -> last value"


def show_sweep(folder: Path, test: dict | None = None) -> None:
    """Print the table and the answer of the sweep in `folder`, and write them there: table.md, answer.json and report.html.

    `test`: metrics of the best by name, measured on data that did not choose it. Raises OSError or ValueError where sweep.json
    is missing or damaged. A report that cannot be drawn is one warning.
    """
    folder = Path(folder)
    record = SweepRecord.read(folder)
    runs = read_runs(record)
    answer = find_answer(record, runs, test)
    header, rows = cells(answer.ranking)
    replace_text(folder / "table.md", _as_markdown(answer, header, rows))
    replace_text(folder / "answer.json", json.dumps(as_json(answer, test), indent=1) + "\n")
    console = _console()
    console.print(_rich_table(f"sweep {record.name}", header, [[*row[:-1], _cut(row[-1])] for row in rows]))
    for line in [*answer.sentences, *(f"Warning: {doubt}" for doubt in answer.doubts)]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)  # a command in it can be pasted
    for command in answer.commands:
        console.print(f"Run it again:  {command}", highlight=False, markup=False, soft_wrap=True)
    try:
        from chattrain.tracking.sweep_report import write_sweep_report

        console.print(str(write_sweep_report(folder, test)), highlight=False, markup=False, soft_wrap=True)
    except Exception as error:  # the table stands without its picture
        log.warning("%s/report.html was not written: %s", folder, error)


def as_json(answer: Answer, test: dict | None = None) -> dict:
    """The answer for programs: rows as in the table, the best marked, the fits and the command."""
    ranking = answer.ranking
    return {
        "sweep": ranking.record.name,
        "objective": ranking.objective,
        "direction": ranking.record.direction,
        "rows": [
            {**asdict(row.job), "best": row.best, "targets": row.targets, "mean": row.mean, "num_seeds": row.num_seeds}
            | {"peak_learning_rates": row.rates, "accuracies": row.accuracies}
            for row in ranking.rows
        ],
        "rate_axis": ranking.rate_axis,
        "fits": [
            {"setting": dict(group.setting), "targets": group.targets, **(asdict(group.fit) if group.fit else {})}
            for group in ranking.groups
        ],
        "answer": answer.sentences,
        "warnings": answer.doubts,
        "commands": answer.commands,
        "test": test,
    }


def show_runs(run_dirs: list[Path], failed: Sequence[tuple[str, str]] = (), folder: Path | None = None) -> None:
    """Print a row for each run, a stage of a chain: the first and last value of each evaluation metric, or of train/loss
    where nothing was evaluated.

    `failed`: the label and the error of each stage without a result; their rows come last. `folder`: where table.md keeps what is
    shown.
    """
    runs = [(json.loads((d / "summary.json").read_text()), _ranges(d)) for d in run_dirs]
    names = sorted({name for _, ranges in runs for name in ranges}, key=lambda n: (not n.startswith("val/"), n))
    if any(not name.startswith("train/") for name in names):
        names = [name for name in names if not name.startswith("train/")]
    rows = []
    for summary, ranges in runs:
        speed = summary["tokens_per_second"]
        row = [summary["stage"], str(summary["steps"]), f"{speed:,.0f}" if speed else "n/a", *(ranges.get(n, "") for n in names)]
        rows.append([*row, summary["status"]])
    rows += [[label, *[""] * (len(names) + 2), error] for label, error in failed]
    header = ["run", "steps", "tokens/s", *(name.removeprefix("eval/") for name in names), "status"]
    if all(row[-1] == "completed" for row in rows):
        header, rows = header[:-1], [row[:-1] for row in rows]
    reports = [str(run_dir / "report.html") for run_dir in run_dirs]
    console = _console()
    console.print(_rich_table(RANGES, header, [[_cut(cell) for cell in row] for row in rows], num_failed=len(failed)))
    for report in reports:
        console.print(report, highlight=False, soft_wrap=True)
    if folder:
        replace_text(folder / "table.md", "\n".join([f"# {RANGES}\n", markdown(header, rows), *(f"- {r}" for r in reports), ""]))


def _cut(cell: str, most: int = 100) -> str:
    """For a terminal; table.md has the whole error."""
    return cell if len(cell) <= most else cell[: most - 1] + "…"


def _as_markdown(answer: Answer, header: list[str], rows: list[list[str]]) -> str:
    parts = [f"# Sweep {answer.ranking.record.name}\n", markdown(header, rows), *(s + "\n" for s in answer.sentences)]
    if answer.doubts:
        parts.append("".join(f"- Warning: {doubt}\n" for doubt in answer.doubts))
    parts += [f"    {command}\n" for command in answer.commands]
    return "\n".join(parts)


def _console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160)  # wide enough that a file or pipe has whole columns


def _rich_table(title: str, header: list[str], rows: list[list[str]], num_failed: int = 0):
    """The last `num_failed` rows are red."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    for column in header:
        table.add_column(column, no_wrap=column != "status", justify="left" if column in ("", "run", "status") else "right")
    for i, row in enumerate(rows):
        table.add_row(*map(Text, row), style="red" if i >= len(rows) - num_failed else None)
    return table


def _ranges(run_dir: Path) -> dict[str, str]:
    """`first value -> last value` of each evaluation metric and of train/loss."""
    values: dict[str, list[float]] = {}
    for row in read_metrics(run_dir / "metrics.jsonl"):
        for name, value in row.items():
            if value is not None and name.startswith(("val/", "eval/", "train/loss")) and not is_detail(name):
                values.setdefault(name, []).append(value)
    return {
        name: _format(name, series[0]) + (f" -> {_format(name, series[-1])}" if len(series) > 1 else "")
        for name, series in values.items()
    }


def _format(name: str, value: float) -> str:
    return f"{value:.1%}" if name.endswith("_acc") else f"{value:.3f}"
