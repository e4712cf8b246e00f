"""The run of a sweep in MLflow, under which the runs of its jobs are nested. The launching process makes and ends it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from chattrain.tracking.mlflow_sink import MLflowSink
from chattrain.tracking.mlflow_state import SWEEP_FILES, About, read_state
from chattrain.tracking.provenance import command_text, source_tags

WAIT_SECONDS = 10.0  # for the store's first answer: jobs are nested under the run that it makes


def open_parent(
    folder: Path, uri: str, experiment: str, command: Sequence[str], swept: Sequence[str], run_id: str | None = None
) -> MLflowSink:
    """Begin the run of the sweep in `folder`, or go on with that which it has, else with `run_id`.

    Where MLflow does not answer within seconds: one warning. Jobs find the run in the folder, should it be made later.
    `command`: as typed, sys.argv[1:]. `swept`: keys and groups with several values.
    """
    note = f"Sweep of {', '.join(swept) or 'one job'}:\n\n```\n{command_text(list(command))}\n```"
    tags = {**source_tags(list(command)), "kind": "sweep"}
    about = About(f"sweep {folder.name}", {"swept": ", ".join(swept)}, tags, note, files=SWEEP_FILES)
    sink = MLflowSink(folder, uri, experiment, about, resume=read_state(folder) is not None, run_id=run_id)
    sink.start()
    sink.wait(WAIT_SECONDS)
    return sink
