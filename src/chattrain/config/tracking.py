"""The group `tracking`."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING


@dataclass
class TrackingConfig:
    mlflow: bool = MISSING  # send metrics, settings, data sets and checkpoints to MLflow
    uri: str | None = None  # of the MLflow server; null: $MLFLOW_TRACKING_URI, else the SQLite file mlflow.db in run.root
    experiment: str | None = None  # of MLflow; null: $MLFLOW_EXPERIMENT_NAME, else chattrain
    tags: dict[str, str] = field(default_factory=dict)  # of the run in MLflow: +tracking.tags.team=blue
    system_metrics: bool = True  # CPU, memory, disk, network and GPU of this machine, every 10 seconds, by MLflow
