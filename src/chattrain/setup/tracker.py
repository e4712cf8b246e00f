"""The tracker of a run: metrics.jsonl in its folder, and MLflow where tracking.mlflow asks for it."""

from __future__ import annotations

import logging

from chattrain.config import Config
from chattrain.parallel.ranks import Ranks
from chattrain.setup import mlflow_run
from chattrain.setup.data import RunData
from chattrain.setup.job import current_job
from chattrain.setup.mlflow_target import given_run_id, mlflow_target
from chattrain.setup.plan import RunSetup
from chattrain.storage.checkpoint import CheckpointState
from chattrain.tracking.mlflow_sink import MLflowSink
from chattrain.tracking.provenance import without_passwords
from chattrain.tracking.tracker import NullTracker, Tracker

log = logging.getLogger("chattrain")


def build_tracker(
    cfg: Config, setup: RunSetup, data: RunData, saved: CheckpointState | None, ranks: Ranks
) -> Tracker | NullTracker:
    """The tracker on rank 0, a NullTracker on other ranks. `saved`: the state of the checkpoint that the run resumes from."""
    if not ranks.is_main:
        return NullTracker()
    sink = _build_sink(cfg, setup, data, saved, ranks.world_size) if cfg.tracking.mlflow else None
    return Tracker(setup.run_dir, data.num_steps, saved.step if saved else 0, sink)


def _build_sink(cfg: Config, setup: RunSetup, data: RunData, saved: CheckpointState | None, world_size: int) -> MLflowSink:
    """Open the store, say where numbers go, and describe the run there."""
    job, (uri, experiment) = current_job(), mlflow_target(cfg)
    data_sets, measured_on = mlflow_run.data_sets(cfg, data)
    sink = MLflowSink(
        uri,
        experiment,
        mlflow_run.run_name(cfg.stage, setup.run_dir.name, job),
        mlflow_run.chosen_params(cfg, job) | mlflow_run.derived_params(cfg, data, world_size),
        mlflow_run.run_tags(cfg, setup.run_dir, job),
        given_run_id(saved.mlflow_run_id if saved else None, job),
        measured_on,
        lambda result: mlflow_run.note(setup.run_dir, job, result),
    )
    if sink.run_id:
        where = without_passwords(uri), sink.experiment, sink.run_id
        log.info("numbers go to metrics.jsonl and to MLflow: %s, experiment %s, run %s", *where)
        sink.inputs(data_sets, None if setup.resume else setup.start.checkpoint)
        if cfg.tracking.system_metrics:
            sink.watch_system()
    return sink
