"""Metrics of a run go to metrics.jsonl first, then to the console, then to MLflow.

metrics.jsonl is the record. The other two are views of it: they may fail or be turned off, and no number is lost.
rich and mlflow are imported where they are used, so that `tracking=none` never loads MLflow.
"""

import json
import logging
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

from chattrain.tracking.console import is_quiet
from chattrain.tracking.metrics import is_detail, now_row, read_metrics, write_metrics
from chattrain.tracking.mlflow_sink import MLflowSink
from chattrain.tracking.mlflow_state import RUN_STATUS, result_of
from chattrain.tracking.mlflow_store import Param

logger = logging.getLogger("chattrain")

PROGRESS = (  # columns of the progress line: key of `Tracker.update`, label, format
    ("loss", "train/loss", "{:.5g}"),
    ("lr", "lr", "{:.3g}"),  # of the matrices, else of the first group
    ("tokens_per_second", "tokens/s", "{:,.0f}"),
    ("mfu", "mfu", "{:.1%}"),  # fraction of the device's peak
)
REDRAW_SECONDS = 0.1  # the bar is drawn at most this often


class Tracker:
    """Writes metrics to metrics.jsonl, then to the console, then to MLflow.

    Rank 0 has a Tracker, other ranks a `NullTracker`, so that the loop needs no `if rank == 0`. `last`: the last value of each
    metric by its name, None where it was not finite; it goes into summary.json.
    """

    def __init__(
        self,
        run_dir: Path,
        num_steps: int,  # optimizer steps of the whole run
        start_step: int = 0,  # the step of the checkpoint that the run resumes from; 0 starts a new file
        mlflow: MLflowSink | None = None,
        console: bool = True,
    ):
        self._run_dir, self._num_steps, self._mlflow, self._console = Path(run_dir), num_steps, mlflow, console
        self._run_dir.mkdir(parents=True, exist_ok=True)
        path = self._run_dir / "metrics.jsonl"
        kept = [row for row in read_metrics(path) if row["step"] <= start_step] if start_step else []
        write_metrics(path, kept)
        self._file = path.open("a", encoding="utf-8")
        if mlflow:
            mlflow.start()
        self.last: dict[str, float | None] = {}
        for row in kept:
            self.last |= {name: value for name, value in row.items() if name not in ("step", "time")}
        self._shown: dict[str, float | None] = {}
        self._timed_from: tuple[int, float] | None = None  # (step, seconds): the time left is estimated from here on
        terminal = console and not is_quiet() and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._bar, self._drawn = _progress_bar(num_steps, start_step) if terminal else None, 0.0

    @property
    def mlflow_run_id(self) -> str | None:
        """None as long as MLflow has not answered."""
        return self._mlflow.run_id if self._mlflow else None

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append one line to metrics.jsonl and flush it, then show and send it. nan and inf become null: JSON has neither."""
        row = now_row(step, metrics)
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        self.last |= {name: value for name, value in row.items() if name not in ("step", "time")}
        self._show_line(step, metrics)
        if self._mlflow:
            self._mlflow.send()

    def update(self, step: int, **shown: float | None) -> None:
        """Move the bar, after each step; `shown`: new values of loss, lr, tokens_per_second, mfu (None: n/a)."""
        self._shown |= shown
        if self._timed_from is None:  # from the first step on: it compiles, and its own time would make the rest look slow
            self._timed_from = step, time.monotonic()
        if self._bar:
            redraw = time.monotonic() - self._drawn > REDRAW_SECONDS
            *cells, left = self._progress(step)
            text = "  ".join(
                [f"{step}/{self._num_steps}", left, *cells]
            )  # the most important first: a narrow terminal cuts the end off
            self._bar.update(self._bar.task_ids[0], completed=step, shown=text, refresh=redraw)
            self._drawn = time.monotonic() if redraw else self._drawn

    def describe(self, params: dict[str, Param]) -> None:
        """Tell MLflow parameters that are known only once the model is built."""
        if self._mlflow:
            self._mlflow.describe(params)

    def checkpoint(self, step: int, folder: Path) -> None:
        """Tell MLflow of a checkpoint that was written."""
        if self._mlflow:
            self._mlflow.send()

    def finish(self, summary: dict) -> None:
        """Stop the bar, and end the run in MLflow with summary["status"]. Call it once, last, with summary.json written.

        Adds the run's id in MLflow to the summary, in the file too, where MLflow answered only now.
        """
        if self._bar:
            self._bar.stop()
        self._file.close()
        if self._mlflow:
            self._mlflow.close(RUN_STATUS[summary["status"]], result_of(summary))
            summary["mlflow_run_id"] = self._mlflow.run_id

    def _show_line(self, step: int, metrics: dict[str, float]) -> None:
        """Log one line: always to train.log, and to stderr where no bar shows the same."""
        training = "train/loss" in metrics
        if training:
            known: dict[str, float | None] = {name.removeprefix("train/"): value for name, value in metrics.items()}
            known["lr"] = next(
                (metrics[name] for name in sorted(metrics, key="lr/matrix".__ne__) if name.startswith("lr/")), None
            )
            self.update(step, **{key: known.get(key) for key, _, _ in PROGRESS})
        in_progress = ("train/", "lr") if training else ()  # prefixes of metrics that the progress columns show
        rest = [
            f"{name} {value:.5g}" for name, value in metrics.items() if not name.startswith(in_progress) and not is_detail(name)
        ]
        cells = [*self._progress(step), *rest] if training else rest
        file_only = not self._console or (training and self._bar is not None)
        logger.info("step %d/%d  %s", step, self._num_steps, "  ".join(cells), extra={"file_only": file_only})

    def _progress(self, step: int) -> list[str]:
        """The columns of the progress line, and the time left by the mean time of a step so far."""
        values = [(label, form, self._shown.get(key)) for key, label, form in PROGRESS]
        cells = [f"{label} {'n/a' if value is None else form.format(value)}" for label, form, value in values]
        if self._timed_from is None or step == self._timed_from[0]:
            return [*cells, "left n/a"]
        first, since = self._timed_from
        seconds = (time.monotonic() - since) / (step - first) * (self._num_steps - step)
        return [*cells, f"left {timedelta(seconds=round(seconds))}"]


class NullTracker:
    """A `Tracker` that does nothing, for ranks other than 0."""

    def __init__(self):
        self.last: dict[str, float | None] = {}
        self.mlflow_run_id: str | None = None

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def update(self, step: int, **shown: float | None) -> None: ...

    def describe(self, params: dict[str, Param]) -> None: ...

    def checkpoint(self, step: int, folder: Path) -> None: ...

    def finish(self, summary: dict) -> None: ...


def _progress_bar(num_steps: int, start_step: int):
    """A rich progress bar on stderr with one task. It runs no thread, and other output appears above it."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = BarColumn(12), TextColumn("{task.fields[shown]}", markup=False)
    terminal = sys.stdout.isatty()  # if stdout is a pipe, what is printed must go there, not above the bar
    bar = Progress(*columns, console=Console(stderr=True), auto_refresh=False, redirect_stdout=terminal)
    bar.add_task("", total=num_steps, completed=start_step, shown="")
    bar.start()
    return bar
