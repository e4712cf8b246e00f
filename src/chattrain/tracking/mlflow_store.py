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
from typing import TYPE_CHECKING, Any

from chattrain.redact import redact

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, RunInfo

logger = logging.getLogger("chattrain")

Param = str | int | float | bool | None  # a value of the flat configuration
MAX_VALUE = 6000  # characters of a param that MLflow takes
MAX_NAME = 250  # characters of the name of a metric, param or tag
MAX_PARAMS = 100  # of one call
SETTINGS = {  # environment variables of MLflow's client, where the user has not set them
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # less severe: lines about making tables, a traceback for each refused call
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the sink tries again by itself; MLflow's 7 take four minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # stdout is for what commands return
}
EXPERIMENT_TAGS = {  # of an experiment that we make
    "mlflow.experimentKind": "custom_model_development",  # the UI shows runs and models of it, not traces
    "mlflow.experiment.primaryMetric.name": "val/bpb",
    "mlflow.experiment.primaryMetric.greaterIsBetter": "false",
}


class Deleted(Exception):
    """What a run belongs to was deleted in the store."""


def set_environment() -> None:
    """Set what MLflow reads when it is imported; call it before the import."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)


def import_mlflow() -> type[MlflowClient]:
    """MLflow's client, without telemetry or log output. The first import takes seconds."""
    set_environment()
    from mlflow import MlflowClient

    return MlflowClient


def connect(uri: str) -> MlflowClient:
    """A client of this store, without global state. One of a file makes its tables where they are missing."""
    return import_mlflow()(tracking_uri=uri)


def open_store(uri: str, experiment: str, restore: bool = False) -> tuple[MlflowClient, str]:
    """A client of this store, and the id of the experiment; both are made where they are missing. It may take seconds.

    A lock lets one process in at a time: two that make the tables of a store at once fail ("duplicate column name").
    `restore`: bring the experiment back if it was deleted. Raises Deleted otherwise.
    """
    if not uri.startswith("sqlite:///"):
        client = connect(uri)
        return client, _experiment_id(client, experiment, None, restore)
    path = Path(uri.removeprefix("sqlite:///").partition("?")[0]).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists() or path.stat().st_size == 0:
            _make_store(path)
        _look_at(path)
        client = connect(uri)
        return client, _experiment_id(client, experiment, (path.parent / "mlartifacts").as_uri(), restore)


def _make_store(path: Path) -> None:
    """A new store. It has another name until its tables are complete: of a process that is killed while it makes them, or of a
    full disk, a store remains that MLflow can neither use nor mend."""
    scratch = path.with_name(f".{path.name}.making")
    try:
        scratch.unlink(missing_ok=True)
        _look_at(scratch)
        connect(f"sqlite:///{scratch}")
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def _look_at(path: Path) -> None:
    """Raises at once where the file is no database or cannot be written; MLflow would try for 100 seconds."""
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA schema_version").fetchone()


def find_run(client: MlflowClient, run_id: str, restore: bool = False) -> RunInfo | None:
    """None: the store does not know it. `restore`: bring it, or its experiment, back if it was deleted. Raises Deleted
    otherwise."""
    from mlflow.exceptions import MlflowException

    try:
        info = client.get_run(run_id).info
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # the second: not shaped like an id
            return None
        raise
    if info.lifecycle_stage == "deleted":
        _restore(client, client.get_experiment(info.experiment_id), restore)
        info = client.get_run(run_id).info  # an experiment brings its runs back
    if info.lifecycle_stage == "deleted":
        if not restore:
            raise Deleted(f"the run {run_id} is deleted there")
        client.restore_run(run_id)
        logger.info("the run %s was deleted in MLflow; it is restored", run_id)
    return info


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
    client.log_batch(run_id, tags=[RunTag(valid_name(key), redact(str(value))) for key, value in tags.items()])


def param_text(value: Param) -> str:
    return redact(value if isinstance(value, str) else json.dumps(value))[:MAX_VALUE]


def hash_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


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
    logger.warning(
        "MLflow could not %s (%s). Training continues and metrics.jsonl stays whole; what MLflow lacks is sent once it "
        "answers, or later by command=sync. Turn MLflow off with tracking=none",
        *(redact(action), reason_of(error)),
    )


def reason_of(error: Exception) -> str:
    """Kind and first line of an error, without credentials."""
    return redact(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")


def _experiment_id(client: MlflowClient, name: str, artifacts: str | None, restore: bool) -> str:
    """Find the experiment or make it. If making it fails, another process may have made it in between: look again."""
    from mlflow.exceptions import MlflowException

    if found := client.get_experiment_by_name(name):
        _restore(client, found, restore)
        return found.experiment_id
    try:
        return client.create_experiment(name, artifact_location=artifacts, tags=EXPERIMENT_TAGS)
    except MlflowException:
        if found := client.get_experiment_by_name(name):
            return found.experiment_id
        raise


def _restore(client: MlflowClient, experiment: Experiment, restore: bool) -> None:
    if experiment.lifecycle_stage != "deleted":
        return
    if not restore:
        raise Deleted(f"the experiment {experiment.name} is deleted there")
    client.restore_experiment(experiment.experiment_id)
    logger.info("the experiment %s was deleted in MLflow; it is restored", experiment.name)
