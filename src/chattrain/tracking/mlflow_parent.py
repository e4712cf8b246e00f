"""The run of a sweep in MLflow, under which the runs of its jobs are nested. The launching process makes and ends it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from chattrain.tracking import mlflow_store as store
from chattrain.tracking.provenance import command_text, git_tags, source_tags

PARENT_TAG = "mlflow.parentRunId"


def open_parent(
    uri: str, experiment: str, name: str, command: Sequence[str], swept: Sequence[str], run_id: str | None = None
) -> str | None:
    """Begin the run of a sweep, or go on with `run_id`; returns its id, or None with one warning where MLflow does not answer.

    `command`: as typed, sys.argv[1:]. `swept`: keys and groups with several values.
    """
    try:
        client, experiment_id = store.open_store(uri, experiment)
        run = store.begin_run(client, experiment_id, name, run_id).run_id
    except Exception as error:
        store.warn(f"use {uri}", error)
        return None
    try:
        note = f"Sweep of {', '.join(swept) or 'one job'}:\n\n```\n{command_text(list(command))}\n```"
        tags = {**source_tags(list(command)), **git_tags(), "mlflow.note.content": note, "kind": "sweep"}
        store.describe_run(client, run, {"swept": ", ".join(swept)}, tags)
    except Exception as error:
        store.warn("describe the sweep", error)
    return run


def close_parent(
    uri: str, run_id: str | None, metrics: Mapping[str, float], files: Sequence[Path] = (), status: str = "FINISHED"
) -> None:
    """End the run of a sweep (FINISHED, FAILED, KILLED) with its result: `metrics`, such as the best objective, and files.

    One warning where something of it cannot be stored. None as `run_id`: `open_parent` made none.
    """
    if run_id is None:
        return
    try:
        client = store.connect(uri)
        for name, value in metrics.items():
            client.log_metric(run_id, store.valid_name(name), float(value))
        for file in files:
            client.log_artifact(run_id, str(file))
        client.set_terminated(run_id, status)
    except Exception as error:
        store.warn("end the run of the sweep", error)
