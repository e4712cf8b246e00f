"""Where a run or a sweep goes in MLflow. It imports no torch, so that the process that launches a sweep may ask too."""

from __future__ import annotations

import os
from pathlib import Path

from chattrain.config import Config
from chattrain.setup.job import Job

DEFAULT_EXPERIMENT = "chattrain"


def mlflow_target(cfg: Config) -> tuple[str, str]:
    """(URI of the store, name of the experiment): of tracking.*, else of MLflow's environment variables, else our own."""
    uri = cfg.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    experiment = cfg.tracking.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME")
    return absolute_uri(uri or f"sqlite:///{Path(cfg.run.root) / 'mlflow.db'}"), experiment or DEFAULT_EXPERIMENT


def absolute_uri(uri: str) -> str:
    """The URI of a file with its whole path, so that it names the same store in any folder.

    >>> absolute_uri("sqlite:////home/me/mlflow.db"), absolute_uri("http://host:5000")
    ('sqlite:////home/me/mlflow.db', 'http://host:5000')
    """
    path = uri.removeprefix("sqlite:///")
    if path == uri or path.startswith(("/", ":")):
        return uri
    file, mark, query = path.partition("?")
    return f"sqlite:///{Path(file).resolve()}{mark}{query}"


def given_run_id(saved: str | None, job: Job) -> str | None:
    """The run in MLflow to go on with: that of the checkpoint, else $MLFLOW_RUN_ID. In a sweep that names the sweep's run."""
    return saved or (None if job.sweep else os.environ.get("MLFLOW_RUN_ID") or None)
