"""Where numbers go: metrics.jsonl first, then the console, then MLflow.

metrics.jsonl is the record; the other two are views of it and may fail or be turned off without losing a number.
rich and mlflow are imported where they are used, so that `tracking=none` never loads MLflow.
"""

import json
import logging
import math
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

from chattrain.tracking.metrics import read_metrics, write_metrics
from chattrain.tracking.mlflow_sink import MLflowSink

logger = logging.getLogger("chattrain")

ARTIFACTS = ("config.yaml", "summary.json", "report.html")  # what MLflow gets of a run folder
RUN_STATUS = {"completed": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}  # summary's word -> MLflow's
PACE = (  # what the progress line shows: key of `Tracker.update`, label, format
    ("loss", "train/loss", "{:.5g}"),
    ("lr_factor", "lr_factor", "{:#.3g}"),
    ("tokens_per_second", "tokens/s", "{:,.0f}"),
    ("mfu", "mfu", "{:.1%}"),  # fraction of the device's peak
)
REDRAW_SECONDS = 0.1  # least time between two drawings of the bar


class Tracker:
    """Writes each number to metrics.jsonl, then shows it, then hands it to MLflow: a sink that fails costs no line.

    Used on rank 0 only; other ranks hold `NullTracker`, so that the loop needs no `if rank == 0`.
    `last` has the last value of each metric by its name (None where it was not finite), for summary.json.
    """

    def __init__(
        self,
        run_dir: Path,
        num_steps: int,  # optimizer steps of the whole run
        start_step: int = 0,  # the step of the checkpoint that the run goes on from; 0 starts a new file
        mlflow: MLflowSink | None = None,
        console: bool = True,
    ):
        self._run_dir, self._num_steps, self._mlflow, self._console = Path(run_dir), num_steps, mlflow, console
        self._run_dir.mkdir(parents=True, exist_ok=True)
        path = self._run_dir / "metrics.jsonl"
        kept = [row for row in read_metrics(path) if row["step"] <= start_step] if start_step else []
        write_metrics(path, kept)
        self._file = path.open("a", encoding="utf-8")
        self.last: dict[str, float | None] = {}
        for row in kept:
            self.last |= {name: value for name, value in row.items() if name not in ("step", "time")}
        self._shown: dict[str, float | None] = {}
        self._pace_from: tuple[int, float] | None = None  # (step, seconds) from which the time left is reckoned
        terminal = console and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._bar, self._drawn = _progress_bar(num_steps, start_step) if terminal else None, 0.0

    @property
    def mlflow_run_id(self) -> str | None:
        return self._mlflow.run_id if self._mlflow else None

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """One line of metrics.jsonl, flushed before anyone else hears of it; nan and inf are null, which JSON knows."""
        values = {name: _finite(value) for name, value in metrics.items()}
        row = {"step": step, "time": round(time.time(), 3), **values}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        self.last |= values
        self._say(step, metrics)
        if self._mlflow:
            self._mlflow.log(step, metrics)

    def update(self, step: int, **shown: float | None) -> None:
        """Moves the bar, each step; `shown`: new values of loss, lr_factor, tokens_per_second, mfu (None: n/a)."""
        self._shown |= shown
        if self._pace_from is None:  # not before: the first step compiles, and would make the rest look slow
            self._pace_from = step, time.monotonic()
        if self._bar:
            redraw = time.monotonic() - self._drawn > REDRAW_SECONDS
            *cells, left = self._pace(step)
            text = "  ".join([f"{step}/{self._num_steps}", left, *cells])  # a narrow terminal cuts the end off
            self._bar.update(0, completed=step, shown=text, refresh=redraw)
            self._drawn = time.monotonic() if redraw else self._drawn

    def finish(self, summary: dict) -> None:
        """Stops the bar, gives MLflow the run's files and ends its run by summary["status"]: call it last, and once."""
        if self._bar:
            self._bar.stop()
        self._file.close()
        if self._mlflow:
            for path in (self._run_dir / name for name in ARTIFACTS):
                if path.exists():
                    self._mlflow.artifact(path)
            self._mlflow.close(RUN_STATUS[summary["status"]])

    def _say(self, step: int, metrics: dict[str, float]) -> None:
        """One line a call, for train.log always and for stderr where no bar shows the same."""
        training = "train/loss" in metrics
        if training:
            known = {name.removeprefix("train/"): value for name, value in metrics.items()}
            self.update(step, **{key: known.get(key) for key, _, _ in PACE})
        summed_up = ("train/", "lr") if training else ()  # prefixes of what the pace says already
        rest = [f"{name} {value:.5g}" for name, value in metrics.items() if not name.startswith(summed_up)]
        cells = [*self._pace(step), *rest] if training else rest
        file_only = not self._console or (training and self._bar is not None)
        logger.info("step %d/%d  %s", step, self._num_steps, "  ".join(cells), extra={"file_only": file_only})

    def _pace(self, step: int) -> list[str]:
        values = [(label, form, self._shown.get(key)) for key, label, form in PACE]
        cells = [f"{label} {'n/a' if value is None else form.format(value)}" for label, form, value in values]
        first, since = self._pace_from
        if step == first:
            return [*cells, "left n/a"]
        seconds = (time.monotonic() - since) / (step - first) * (self._num_steps - step)
        return [*cells, f"left {timedelta(seconds=round(seconds))}"]


class NullTracker:
    """`Tracker` for ranks other than 0: the same methods, and nothing happens."""

    def __init__(self):
        self.last: dict[str, float | None] = {}
        self.mlflow_run_id: str | None = None

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def update(self, step: int, **shown: float | None) -> None: ...

    def finish(self, summary: dict) -> None: ...


def _progress_bar(num_steps: int, start_step: int):
    """A rich bar on stderr with one task, 0. It keeps no thread, and what others print comes out above it, untorn."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = BarColumn(12), TextColumn("{task.fields[shown]}", markup=False)
    terminal = sys.stdout.isatty()  # else what is printed goes to the pipe as ever, not to the terminal above the bar
    bar = Progress(*columns, console=Console(stderr=True), auto_refresh=False, redirect_stdout=terminal)
    bar.add_task("", total=num_steps, completed=start_step, shown="")
    bar.start()
    return bar


def _finite(value: float) -> float | None:
    value = value if isinstance(value, int) else float(value)
    return value if math.isfinite(value) else None
