"""Where numbers go: metrics.jsonl first, then the console, then MLflow.

metrics.jsonl is the record; the other two are views of it and may fail or be turned off without losing a number.
rich and mlflow are imported where they are used, so that `tracking=none` never loads MLflow.
"""

import fcntl
import json
import logging
import math
import os
import queue
import sqlite3
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import closing
from datetime import timedelta
from pathlib import Path

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
DRAIN_SECONDS = 60  # longest wait for a slow MLflow store at the end of a run


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
        mlflow: "MLflowSink | None" = None,
        console: bool = True,
    ):
        self._run_dir, self._num_steps, self._mlflow, self._console = Path(run_dir), num_steps, mlflow, console
        self._run_dir.mkdir(parents=True, exist_ok=True)
        path = self._run_dir / "metrics.jsonl"
        kept = [row for row in read_metrics(path) if row["step"] <= start_step] if start_step else []
        _write_rows(path, kept)
        self._file = path.open("a", encoding="utf-8")
        self.last: dict[str, float | None] = {}
        for row in kept:
            self.last |= {name: value for name, value in row.items() if name not in ("step", "time")}
        self._shown: dict[str, float | None] = {}
        self._pace_from: tuple[int, float] | None = None  # (step, seconds) from which the time left is reckoned
        terminal = console and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._bar, self._drawn = _progress_bar(num_steps, start_step) if terminal else None, 0.0

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
            shown = "  ".join([f"{step}/{self._num_steps}", left, *cells])  # a narrow terminal cuts the end off
            self._bar.update(0, completed=step, shown=shown, refresh=redraw)
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


def read_metrics(path: Path) -> list[dict]:
    """The whole lines of a metrics.jsonl, in order; [] where there is no file. A line torn by a crash is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            row = json.loads(line, parse_constant=lambda word: None)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def _write_rows(path: Path, rows: Iterable[dict]) -> None:
    """Replaces the file at once: a crash here leaves the old file or the new one, never half of one."""
    partial = path.with_name(path.name + ".tmp")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _finite(value: float) -> float | None:
    value = value if isinstance(value, int) else float(value)
    return value if math.isfinite(value) else None


class _StderrHandler(logging.Handler):
    """Plain messages to what sys.stderr is at that moment: a rich bar swaps it to print above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "file_only", False):
            return
        try:
            text = self.format(record)
            yellow = record.levelno >= logging.WARNING and sys.stderr.isatty()
            print(f"\033[33m{text}\033[0m" if yellow else text, file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


def setup_logging(run_dir: Path | None, console: bool, resume: bool) -> Callable[[], None]:
    """Sends the logger "chattrain" to run_dir/train.log (appended to on `resume`) and stderr; returns what undoes it.

    A second call takes the place of the first, so a sweep in one process prints each line once. `propagate` stays
    on, which lets pytest's caplog listen; give the root logger no handler of its own, or each line is printed twice.
    """
    handlers: list[logging.Handler] = [logging.NullHandler()]  # alone, it keeps logging's own fallback off stderr
    if run_dir is not None:
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(Path(run_dir) / "train.log", mode="a" if resume else "w", encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        handlers.append(file)
    if console:
        handlers.append(_StderrHandler())
    _detach([handler for handler in logger.handlers if handler.name == logger.name])
    for handler in handlers:
        handler.set_name(logger.name)  # the mark by which the next call finds them
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    return lambda: _detach(handlers)


def _detach(handlers: list[logging.Handler]) -> None:
    for handler in handlers:
        logger.removeHandler(handler)
        handler.close()


class MLflowSink:
    """One MLflow run. Nothing here raises or makes the training wait: it is a view of metrics.jsonl, not the record.

    The store is opened (and made) at once, in seconds and before step 0; every later call goes through one thread.
    The first failure is one warning; later calls are still tried, in silence, as a locked store may open again.
    A continued run keeps the points that MLflow got after the checkpoint: its client cannot take them back.
    """

    def __init__(
        self,
        uri: str,  # sqlite:////abs/path/mlflow.db; artifacts go to mlartifacts/ beside it
        experiment: str,
        run_name: str,
        params: dict[str, str | int | float | bool | None],
        tags: dict,
        run_id: str | None = None,  # go on with this run
    ):
        self._warned, self._thread, self.run_id = False, None, None
        try:
            self._client, experiment_id = _open_store(uri, experiment)
            self.run_id = self._start(experiment_id, run_name, run_id)
            self._describe(params, tags)
        except Exception as error:
            self._warn(f"use {uri}", error)
        if self.run_id:
            self._points: deque[tuple[str, float, int, int]] = deque()  # name, value, milliseconds, step
            self._queue: queue.SimpleQueue = queue.SimpleQueue()
            self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
            self._thread.start()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if self._thread:
            now = int(time.time() * 1000)  # MLflow's milliseconds
            self._points.extend((name, float(value), now, step) for name, value in metrics.items())
            self._later("log metrics", self._send_points)

    def artifact(self, path: Path) -> None:
        self._later(f"store {path.name}", lambda: self._client.log_artifact(self.run_id, str(path)))

    def close(self, status: str = "FINISHED") -> None:
        """Ends the run (FINISHED, FAILED, KILLED) when all that was handed over is stored, or after DRAIN_SECONDS."""
        self._later("end the run", lambda: self._client.set_terminated(self.run_id, status))
        if self._thread:
            self._queue.put(None)
            self._thread.join(DRAIN_SECONDS)
            if self._thread.is_alive():
                self._warn("end the run", TimeoutError(f"no answer from the store in {DRAIN_SECONDS} seconds"))
            self._thread = None

    def _later(self, what: str, call: Callable[[], object]) -> None:
        if self._thread:
            self._queue.put((what, call))

    def _work(self) -> None:
        for what, call in iter(self._queue.get, None):
            try:
                call()
            except Exception as error:
                self._warn(what, error)

    def _warn(self, what: str, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            reason = (str(error).splitlines() or [""])[0]
            logger.warning(
                "MLflow could not %s (%s: %s). Training goes on and metrics.jsonl stays whole; "
                "turn MLflow off with tracking=none",
                *(what, type(error).__name__, reason),
            )

    def _send_points(self) -> None:
        """All that waits, as many a call as MLflow takes: a call costs 20 ms, so a store that lags catches up."""
        from mlflow.entities import Metric

        while self._points:
            batch = [Metric(*self._points.popleft()) for _ in range(min(1000, len(self._points)))]
            self._client.log_batch(self.run_id, metrics=batch)

    def _start(self, experiment_id: str, run_name: str, run_id: str | None) -> str:
        from mlflow.exceptions import MlflowException

        try:
            if run_id:
                self._client.update_run(run_id, status="RUNNING")
                return run_id
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            logger.warning("MLflow's store has no run %s to go on with (was it moved?); a new run is used", run_id)
        return self._client.create_run(experiment_id, run_name=run_name).info.run_id

    def _describe(self, params: dict, tags: dict) -> None:
        """MLflow lets no param change, so a continued run keeps its first values; its config.yaml has the new ones."""
        from mlflow.entities import Param, RunTag

        there = self._client.get_run(self.run_id).data.params
        # 6000 characters is the most MLflow takes of a value, and 100 the most params of one call
        words = {key: (value if isinstance(value, str) else json.dumps(value))[:6000] for key, value in params.items()}
        if changed := [key for key, word in words.items() if there.get(key, word) != word]:
            logger.info("MLflow keeps the first values of changed params: %s", ", ".join(changed))
        new = [Param(key, word) for key, word in words.items() if key not in there]
        for start in range(0, len(new), 100):
            self._client.log_batch(self.run_id, params=new[start : start + 100])
        self._client.log_batch(self.run_id, tags=[RunTag(key, str(value)) for key, value in tags.items()])


def _open_store(uri: str, experiment: str):
    """An MlflowClient for this store alone, without global state, telemetry or chatter, and the experiment's id.

    One process at a time: two that make one store's tables at once break each other ("duplicate column name").
    """
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # read at import
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "CRITICAL")  # below: table making, and a traceback for each refusal
    from mlflow import MlflowClient

    if not uri.startswith("sqlite:///"):
        client = MlflowClient(tracking_uri=uri)
        return client, _experiment_id(client, experiment, artifacts=None)
    path = Path(uri.removeprefix("sqlite:///").partition("?")[0]).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.lock", "w") as lock, closing(sqlite3.connect(path)) as database:
        fcntl.flock(lock, fcntl.LOCK_EX)
        database.execute("PRAGMA schema_version").fetchone()  # raises at once; MLflow would try for 100 seconds
        client = MlflowClient(tracking_uri=uri)  # makes the tables
        return client, _experiment_id(client, experiment, (path.parent / "mlartifacts").as_uri())


def _experiment_id(client, name: str, artifacts: str | None) -> str:
    """Finds the experiment or makes it. Another process may make it in between, so a refusal means: look again."""
    from mlflow.exceptions import MlflowException

    if found := client.get_experiment_by_name(name):
        return found.experiment_id
    try:
        return client.create_experiment(name, artifact_location=artifacts)
    except MlflowException:
        if found := client.get_experiment_by_name(name):
            return found.experiment_id
        raise
