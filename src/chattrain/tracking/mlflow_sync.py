"""Sends to MLflow what a folder holds and a store lacks, after its process has ended: `command=sync`."""

from __future__ import annotations

import os
import shlex
import socket
import time
from contextlib import suppress
from pathlib import Path

import yaml

from chattrain.redact import redact, without_user
from chattrain.storage.lock import RunLock
from chattrain.tracking import mlflow_store as store
from chattrain.tracking.metrics import read_metrics
from chattrain.tracking.mlflow_delivery import Delivery
from chattrain.tracking.mlflow_state import (
    FILE,
    RUN_FILES,
    RUN_STATUS,
    About,
    Busy,
    Copy,
    MLflowState,
    read_state,
    result_of,
    sending,
    unsent,
)
from chattrain.tracking.run_folder import RunFolder

FRESH_SECONDS = 600  # a run on another host, which wrote its numbers less than this ago, may still go on
RETRY_SECONDS = 1.0


def sync(folder: Path, uri: str, experiment: str, to: tuple[str | None, str | None] = (None, None), restore: bool = False) -> str:
    """Send what the store lacks; returns that in words, empty where it had everything.

    uri, experiment: of a run that has no mlflow.json; of others the URI gives user and password. `to`: another store and
    experiment than the run's own, which get a copy; None: its own. `restore`: look whether the store still has the run, and bring
    back what was deleted there.
    Raises Busy where the run goes on, and what MLflow raises where it does not take something.
    """
    RunLock(folder).check()  # of the process that trains there
    with sending(folder):
        state = read_state(folder) or _of_an_untracked_run(folder, uri, experiment)
        if _may_go_on(folder, state):
            raise Busy(f"the run {folder}, process {state.pid} on {state.host}, seems to go on")
        own = state.copies[0]
        there = to[0] or (uri if without_user(uri) == own.uri else own.uri)
        copy = state.copy_in(there, to[1])
        if copy is None:
            copy = Copy(without_user(there), to[1] or own.experiment)
            state.copies.append(copy)
        state.ended = how_it_ended(folder, state)
        if copy.status != state.ended["status"]:
            copy.status = None  # a launcher has corrected summary.json
        missing = unsent(folder, state, copy)
        if missing or restore:
            store.import_mlflow()
            try:
                missing = _deliver(Delivery(folder, state, copy, there, restore=restore))
            except store.Deleted:
                raise
            except Exception:  # once more: a server may have dropped a connection
                time.sleep(RETRY_SECONDS)
                missing = _deliver(Delivery(folder, state, copy, there, restore=restore)) or missing
        return missing


def _deliver(delivery: Delivery) -> str:
    """Send everything; returns what was missing. A run that is gone from the store has lost all."""
    before = unsent(delivery.folder, delivery.state, delivery.copy)
    delivery.open()
    missing = before or unsent(delivery.folder, delivery.state, delivery.copy)
    if missing:
        delivery.end()
    return missing


def how_it_ended(folder: Path, state: MLflowState) -> dict:
    """By summary.json; without one the process was killed, at the time of its last number."""
    summary = RunFolder.read(folder).summary if "summary.json" in state.about.files else {}
    if summary.get("status") in RUN_STATUS:
        at = int(summary.get("finished_at", 0) * 1000) or state.started_at
        return {"status": RUN_STATUS[summary["status"]], "time": at, "result": result_of(summary), "metrics": {}}
    if state.ended:
        return state.ended
    rows = read_metrics(folder / "metrics.jsonl")
    times = [file.stat().st_mtime for file in (folder / "sweep.json", folder / FILE) if file.is_file()]
    at = int((rows[-1].get("time", 0) if rows else min(times, default=0)) * 1000)
    return {"status": "KILLED", "time": at, "result": "killed", "metrics": {}}


def _may_go_on(folder: Path, state: MLflowState) -> bool:
    """May its process live, although it holds no lock: on a file system without locks, or on another host?"""
    if state.ended or (folder / "summary.json").exists():
        return False
    if state.host != socket.gethostname():
        newest = max((f.stat().st_mtime for f in folder.iterdir() if f.name in ("metrics.jsonl", FILE)), default=0.0)
        return time.time() - newest < FRESH_SECONDS
    return state.pid != os.getpid() and _is_chattrain(state.pid)


def _is_chattrain(pid: int) -> bool:
    """Does this process exist, and is it one of ours: numbers of processes are given again."""
    with suppress(OSError):
        os.kill(pid, 0)
        return "chattrain" in Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    return False


def _of_an_untracked_run(folder: Path, uri: str, experiment: str) -> MLflowState:
    """Of a run with tracking=none, or of an earlier version: what its files tell."""
    run = RunFolder.read(folder)
    try:
        command = shlex.join(["chattrain", *map(str, yaml.safe_load((folder / "overrides.yaml").read_text()))])
    except (OSError, TypeError, yaml.YAMLError):
        command = "chattrain.run"
    steps = {key: run.summary[key] for key in ("num_steps",) if key in run.summary}
    about = About(
        name=f"{run.stage} {folder.name}",
        params={"stage": run.stage, **steps},
        tags={"stage": run.stage, "run_dir": str(folder), "mlflow.source.name": redact(command), "mlflow.source.type": "LOCAL"},
        note=f"```\n{redact(command)}\n```\n\nRun folder: `{folder}`",
        files=RUN_FILES,
    )
    started = int(run.rows[0].get("time", 0) * 1000) if run.rows else int(folder.stat().st_mtime * 1000)
    state = MLflowState(about, started_at=started)
    state.copies = [Copy(without_user(uri), experiment, run.summary.get("mlflow_run_id"))]
    return state
