"""The tracker of a run: metrics.jsonl in its folder, and MLflow where tracking.mlflow asks for it."""

from __future__ import annotations

from chattrain.config import Config
from chattrain.parallel.ranks import Ranks
from chattrain.setup import mlflow_run
from chattrain.setup.data import RunData
from chattrain.setup.job import current_job
from chattrain.setup.mlflow_target import given_run_id, mlflow_target
from chattrain.setup.plan import RunSetup
from chattrain.storage.checkpoint import CheckpointState
from chattrain.tracking.mlflow_sink import MLflowSink
from chattrain.tracking.mlflow_state import About
from chattrain.tracking.tracker import NullTracker, Tracker


def build_tracker(
    cfg: Config, setup: RunSetup, data: RunData, saved: CheckpointState | None, ranks: Ranks
) -> Tracker | NullTracker:
    """The tracker on rank 0, a NullTracker on other ranks. `saved`: the state of the checkpoint that the run resumes from."""
    if not ranks.is_main:
        return NullTracker()
    sink = _build_sink(cfg, setup, data, saved, ranks.world_size) if cfg.tracking.mlflow else None
    return Tracker(setup.run_dir, data.num_steps, saved.step if saved else 0, sink)


def _build_sink(cfg: Config, setup: RunSetup, data: RunData, saved: CheckpointState | None, world_size: int) -> MLflowSink:
    """What MLflow is to be told of the run, and the thread that tells it."""
    job, (uri, experiment) = current_job(), mlflow_target(cfg)
    data_sets, measured_on = mlflow_run.data_sets(cfg, data)
    about = About(
        name=mlflow_run.run_name(cfg.stage, setup.run_dir.name, job),
        params=mlflow_run.chosen_params(cfg, job) | mlflow_run.derived_params(cfg, data, world_size),
        tags=mlflow_run.run_tags(cfg, setup.run_dir, job),
        note=mlflow_run.note(setup.run_dir, job),
        data_sets=data_sets,
        measured_on=measured_on,
        start=str(setup.start.checkpoint) if setup.start.checkpoint and not setup.resume else None,
        sweep=job.sweep.folder if job.sweep else None,
    )
    return MLflowSink(
        setup.run_dir,
        uri,
        experiment,
        about,
        resume=setup.resume is not None,
        run_id=given_run_id(saved.mlflow_run_id if saved else None, job),
        system_metrics=cfg.tracking.system_metrics,
        failed_before=job.sweep is not None and job.sweep.mlflow_run_id is None,  # the sweep has waited for it in vain
    )
