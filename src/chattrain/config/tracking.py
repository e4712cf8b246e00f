"""The group `tracking`."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING


@dataclass
class TrackingConfig:
    mlflow: bool = MISSING
    uri: str | None = None  # null: SQLite file mlflow.db in run.root
    experiment: str = "chattrain"
