"""The jobs of a sweep as a table that is redrawn while they run: status, step, loss, time left."""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from chattrain.tracking.sweep_record import JobRecord, shown

STYLES = {"running": "bold", "completed": "green", "failed": "red", "skipped": "red", "interrupted": "yellow", "waiting": "dim"}
TAIL_BYTES = 65536  # of metrics.jsonl, read at each look


class LiveTable:
    """On a terminal a table of all jobs; in a file or pipe one line for each that starts or ends. Both on stderr."""

    def __init__(self, jobs: dict[int, JobRecord], started_at: dict[int, float]):
        self.jobs, self.started_at = jobs, started_at
        self.ended: dict[tuple[int, str], tuple[str, str, str]] = {}  # number and status of a job that runs no more -> its cells
        console = Console(stderr=True)
        terminal = console.is_terminal and os.environ.get("TERM") != "dumb"
        self.live = Live(console=console, auto_refresh=False, transient=True) if terminal else None

    def __enter__(self) -> LiveTable:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.refresh()
            self.live.stop()

    def say(self, text: str) -> None:
        """A line where there is no table."""
        if self.live:
            self.refresh()
        else:
            print(text, file=sys.stderr, flush=True)

    def refresh(self) -> None:
        if self.live:
            self.live.update(self._table(), refresh=True)

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False)
        for column in ("job", "status", "step", "loss", "left"):
            table.add_column(column, justify="left" if column in ("job", "status") else "right", no_wrap=True)
        for job in self.jobs.values():
            values = " ".join(f"{key.rpartition('.')[2]}={shown(value)}" for key, value in job.values.items())
            table.add_row(values or str(job.num + 1), job.status, *self._progress(job), style=STYLES.get(job.status, ""))
        return table

    def _progress(self, job: JobRecord) -> tuple[str, str, str]:
        if job.status == "running":
            return progress(job, self.started_at.get(job.num, 0.0))
        key = (job.num, job.status)
        if key not in self.ended:
            self.ended[key] = progress(job, 0.0)
        return self.ended[key]


def progress(job: JobRecord, started_at: float) -> tuple[str, str, str]:
    """Step of steps, training loss and time left of a job, from the files of its run; empty where they are not known.

    `started_at`: seconds since the epoch; the time left follows from what the job has done since.
    """
    if job.run_dir is None or job.status == "waiting":
        return "", "", ""
    total = job.num_steps or _planned_steps(Path(job.run_dir))
    rows = [row for row in _tail(Path(job.run_dir) / "metrics.jsonl") if "train/loss" in row]
    if not rows:
        return "", "", ""
    first, last = next((row for row in rows if row["time"] >= started_at), rows[-1]), rows[-1]
    step = f"{last['step']}/{total}" if total else str(last["step"])
    loss = "n/a" if last["train/loss"] is None else f"{last['train/loss']:.4g}"
    if job.status != "running" or not total or last["step"] == first["step"]:
        return step, loss, ""
    seconds = (last["time"] - first["time"]) / (last["step"] - first["step"]) * (total - last["step"])
    return step, loss, str(timedelta(seconds=round(seconds)))


def _planned_steps(run_dir: Path) -> int | None:
    try:
        return json.loads((run_dir / "identity.json").read_text())["num_steps"]
    except (OSError, ValueError, KeyError):
        return None


def _tail(file: Path) -> list[dict[str, Any]]:
    """The last complete lines of a metrics.jsonl."""
    try:
        with file.open("rb") as opened:
            opened.seek(0, os.SEEK_END)
            start = max(0, opened.tell() - TAIL_BYTES)
            opened.seek(start)
            lines = opened.read().split(b"\n")
    except OSError:
        return []
    rows = []
    for line in lines[1:] if start else lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows
