"""The group `tracking`."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING


@dataclass
class TrackingConfig:
    mlflow: bool = MISSING
    uri: str | None = None  # of the MLflow server; null: the SQLite file mlflow.db in run.root
    experiment: str = "chattrain"
