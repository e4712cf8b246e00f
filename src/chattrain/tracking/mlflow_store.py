"""An MLflow store, opened without global state: its client, its experiment, and one run in it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import posixpath
import re
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from chattrain.tracking.provenance import without_passwords

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import RunInfo

logger = logging.getLogger("chattrain")

Param = str | int | float | bool | None  # a value of the flat configuration
MAX_VALUE = 6000  # characters of a param that MLflow takes
MAX_NAME = 250  # characters of the name of a metric, param or tag
MAX_PARAMS = 100  # of one call
SETTINGS = {  # environment variables of MLflow's client, where the user has not set them
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # less severe: lines about making tables, a traceback for each refused call
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # MLflow's 7 take four minutes to tell that a server does not answer
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",  # seconds
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # stdout is for what commands return
}
EXPERIMENT_TAGS = {  # of an experiment that we make
    "mlflow.experimentKind": "custom_model_development",  # the UI shows runs and models of it, not traces
    "mlflow.experiment.primaryMetric.name": "val/bpb",
    "mlflow.experiment.primaryMetric.greaterIsBetter": "false",
}


def set_environment() -> None:
    """Set what MLflow reads when it is imported; call it before the import."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)


def connect(uri: str) -> MlflowClient:
    """A client of this store, without global state, telemetry or log output."""
    set_environment()
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def open_store(uri: str, experiment: str) -> tuple[MlflowClient, str]:
    """A client of this store, and the id of the experiment; both are made where they are missing. It may take seconds.

    A lock lets one process in at a time: two that make the tables of a store at once fail ("duplicate column name").
    """
    if not uri.startswith("sqlite:///"):
        client = connect(uri)
        return client, _experiment_id(client, experiment, artifacts=None)
    path = Path(uri.removeprefix("sqlite:///").partition("?")[0]).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.lock", "w") as lock, closing(sqlite3.connect(path)) as database:
        fcntl.flock(lock, fcntl.LOCK_EX)
        database.execute("PRAGMA schema_version").fetchone()  # raises at once; MLflow would try for 100 seconds
        client = connect(uri)  # makes the tables
        return client, _experiment_id(client, experiment, (path.parent / "mlartifacts").as_uri())


def begin_run(client: MlflowClient, experiment_id: str, name: str, run_id: str | None) -> RunInfo:
    """A new run, or that of `run_id` again, which may be in another experiment. If the store does not know it: a warning and a
    new run."""
    from mlflow.exceptions import MlflowException

    try:
        if run_id:
            client.update_run(run_id, status="RUNNING")
            return client.get_run(run_id).info
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # the second: not shaped like an id
            raise
        logger.warning("MLflow's store has no run %s to resume (was it moved?); this run gets a new one", run_id)
    return client.create_run(experiment_id, run_name=name).info


def describe_run(client: MlflowClient, run_id: str, params: dict[str, Param], tags: dict[str, str]) -> None:
    """Set params and tags. MLflow lets no param change: a resumed run keeps its first values, its config.yaml has the new."""
    from mlflow.entities import Param as MLflowParam
    from mlflow.entities import RunTag

    texts = {valid_name(key): param_text(value) for key, value in params.items()}
    stored = client.get_run(run_id).data.params if texts else {}
    if changed := [key for key, text in texts.items() if stored.get(key, text) != text]:
        logger.info("MLflow keeps the first values of changed params: %s", ", ".join(changed))
    new = [MLflowParam(key, text) for key, text in texts.items() if key not in stored]
    for start in range(0, len(new), MAX_PARAMS):
        client.log_batch(run_id, params=new[start : start + MAX_PARAMS])
    client.log_batch(run_id, tags=[RunTag(valid_name(key), str(value)) for key, value in tags.items()])


def param_text(value: Param) -> str:
    return (value if isinstance(value, str) else json.dumps(value))[:MAX_VALUE]


def valid_name(name: str) -> str:
    """The name as MLflow takes it. One that had to change ends in a hash of it, so that two names never become one.

    >>> valid_name("val/bpb"), valid_name("eval/C++ (easy)_acc"), valid_name("eval/C__ _easy__acc")
    ('val/bpb', 'eval/C__ _easy__acc-27908d', 'eval/C__ _easy__acc')
    """
    parts = [part for part in re.sub(r"[^/\w.\- :]", "_", name).split("/") if part not in ("", ".", "..")]
    clean = posixpath.join(*parts) if parts else "_"
    if clean == name and len(name) <= MAX_NAME:
        return name
    return f"{clean[: MAX_NAME - 7]}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def warn(action: str, error: Exception) -> None:
    """One warning of a call that failed. `action` completes "MLflow could not ..."."""
    reason = (str(error).splitlines() or [""])[0]
    logger.warning(
        "MLflow could not %s (%s: %s). Training continues and metrics.jsonl stays whole; turn MLflow off with tracking=none",
        *(without_passwords(action), type(error).__name__, without_passwords(reason)),
    )


def _experiment_id(client: MlflowClient, name: str, artifacts: str | None) -> str:
    """Find the experiment or make it. If making it fails, another process may have made it in between: look again."""
    from mlflow.exceptions import MlflowException

    if found := client.get_experiment_by_name(name):
        return found.experiment_id
    try:
        return client.create_experiment(name, artifact_location=artifacts, tags=EXPERIMENT_TAGS)
    except MlflowException:
        if found := client.get_experiment_by_name(name):
            return found.experiment_id
        raise
