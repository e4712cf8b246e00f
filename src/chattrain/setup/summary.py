"""summary.json: how a run ended. Rank 0 writes it; our launcher corrects it, or writes it if rank 0 died first."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict
from pathlib import Path

from chattrain import loop
from chattrain.errors import describe_error
from chattrain.parallel import launch
from chattrain.setup.data import RunData
from chattrain.setup.identity import read_changes
from chattrain.setup.plan import RunSetup
from chattrain.storage import checkpoint
from chattrain.storage.files import replace_text
from chattrain.tracking.metrics import read_metrics
from chattrain.tracking.report import write_report
from chattrain.tracking.tracker import NullTracker, Tracker

log = logging.getLogger("chattrain")


def summarize(
    stage: str, setup: RunSetup, data: RunData, tracker: Tracker | NullTracker, state: loop.State, error: BaseException | None
) -> dict:
    """The content of summary.json. `error`: what ended the run before its last step; None: it completed or was interrupted."""
    stopped = error is None and state.step < data.num_steps  # by a signal, or by train.stop_after
    interrupted = stopped or isinstance(error, KeyboardInterrupt)
    sources = data.train.mixture.caches
    newest, changes = checkpoint.all_checkpoints(setup.run_dir), read_changes(setup.run_dir)
    return {
        "status": "interrupted" if interrupted else "failed" if error else "completed",
        "stage": stage,
        "run_dir": str(setup.run_dir),
        "steps": state.step,
        "num_steps": data.num_steps,
        "tokens_seen": state.tokens_seen,
        "supervised_tokens": state.supervised_tokens,
        "loss_weight": state.loss_weight,
        **({"skipped": state.skipped} if state.skipped else {}),
        "tokens_per_second": state.tokens_per_second,
        "metrics": dict(tracker.last),
        "checkpoint": str(newest[-1]) if newest else None,
        "init": setup.start.description,
        "compile": setup.compilation.on,
        "mlflow_run_id": tracker.mlflow_run_id,
        "finished_at": time.time(),
        "data": {
            **asdict(data.train.counts),
            "sources": {name: asdict(counts) for name, counts in data.train.by_source().items()},
            "malformed": {c.name: c.malformed.by_reason() for c in sources if c.skipped},
            "audit": data.audit.facts,
        },
        "learning_rates": data.learning_rates,  # real ones, at their peak, by parameter group
        "validation": data.measured.facts if data.measured else None,
        **({"changes": "; ".join(changes)} if changes else {}),  # of settings while it ran: its numbers are of a mixture
        **({"error": describe_error(error)} if error else {}),
    }


def write_summary(run_dir: Path, summary: dict) -> None:
    """Write summary.json and, from it, report.html. What cannot be written is a warning: the run is worth more."""
    try:
        replace_text(run_dir / "summary.json", json.dumps(summary, indent=1) + "\n")
    except OSError as error:
        log.warning("%s/summary.json was not written: %s", run_dir, error.strerror)
        return
    try:
        write_report(run_dir)
    except Exception as error:
        log.warning("%s/report.html was not written: %s: %s", run_dir, type(error).__name__, error)


def correct_summary(stage: str, setup: RunSetup, data: RunData, error: Exception) -> dict:
    """Set the launcher's status in rank 0's summary.json; create the file if rank 0 died first. Returns the summary."""
    file = setup.run_dir / "summary.json"
    if file.is_file():
        summary = json.loads(file.read_text())
    else:
        tracker, state = _recover_progress(setup.run_dir)
        summary = summarize(stage, setup, data, tracker, state, error)
    if isinstance(error, launch.Stopped):
        summary["status"] = "interrupted"
        summary.pop("error", None)
    else:
        summary |= {"status": "failed", "error": describe_error(error)}
    write_summary(setup.run_dir, summary)
    return summary


def _recover_progress(run_dir: Path) -> tuple[NullTracker, loop.State]:
    """How far a run came whose rank 0 died, read from its metrics.jsonl and its newest checkpoint."""
    tracker, state = NullTracker(), loop.State()
    for row in read_metrics(run_dir / "metrics.jsonl"):
        state.step = row["step"]
        tracker.last |= {name: value for name, value in row.items() if name not in ("step", "time")}
    state.tokens_seen = int(tracker.last.get("train/tokens_seen") or 0)
    state.supervised_tokens = int(tracker.last.get("train/supervised_tokens") or 0)
    state.loss_weight = float(tracker.last.get("train/loss_weight") or 0)
    saved = checkpoint.newest_valid(run_dir)
    tracker.mlflow_run_id = checkpoint.load_state(saved).mlflow_run_id if saved else None
    return tracker, state
