"""A measurement of command=evaluate as a run in MLflow, nested in that of the training where the store has it.

As for a training, the folder is the record: what cannot be sent now goes out with `command=sync run.dir=<folder>`.
"""

from __future__ import annotations

from pathlib import Path

from chattrain.config import Config
from chattrain.setup import mlflow_run
from chattrain.setup.job import current_job
from chattrain.setup.mlflow_target import mlflow_target
from chattrain.tracking.metrics import now_row, write_metrics
from chattrain.tracking.mlflow_sink import MLflowSink
from chattrain.tracking.mlflow_state import PARENT_TAG, About, read_state
from chattrain.tracking.table_evaluations import label

FILES = ("result.md", "result.json", "answers.jsonl")


def send_evaluation(cfg: Config, folder: Path, run: Path, result: dict) -> None:
    """Send what the folder of a measurement holds, and wait until it is stored, as a training waits at its end.

    `run`: the run folder of the checkpoint, or the checkpoint itself where it belongs to none.
    """
    job, (uri, experiment) = current_job(), mlflow_target(cfg)
    name = Path(result["checkpoint"]).name
    step = int(name.removeprefix("step_")) if name.startswith("step_") and name[5:].isdecimal() else 0
    write_metrics(folder / "metrics.jsonl", [now_row(step, result["metrics"])])
    training = read_state(run)
    copy = training.copy_in(uri) if training else None
    parent = {PARENT_TAG: copy.run_id} if copy and copy.run_id else {}
    about = About(
        name=f"evaluate {label(result)}",
        params={**mlflow_run.chosen_params(cfg, job), "checkpoint": result["checkpoint"], "part": result["part"]},
        tags={**mlflow_run.run_tags(cfg, folder, job), **parent},
        note=(folder / "result.md").read_text(),
        files=FILES,
    )
    sink = MLflowSink(folder, uri, copy.experiment if copy else experiment, about)
    sink.start()
    sink.close(result=label(result))
