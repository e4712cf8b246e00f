"""One MLflow run as a view of metrics.jsonl. MLflow's client runs on a thread of its own, so that training never waits for it."""

import fcntl
import json
import logging
import os
import queue
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

logger = logging.getLogger("chattrain")

Param = str | int | float | bool | None  # a value of the flat configuration
DRAIN_SECONDS = 60  # longest wait for a slow store at the end of a run


class MLflowSink:
    """One MLflow run. Nothing here raises or makes the training wait: metrics.jsonl is the record, and this only a view of it.

    The constructor opens the store, or makes it, which takes seconds before step 0. Every later call goes through one thread.
    The first failure is one warning; later calls are still tried, without a warning, as a locked store may open again.
    A resumed run keeps the points that MLflow got after the checkpoint: MLflow's client cannot delete them.
    """

    def __init__(
        self,
        uri: str,  # sqlite:////abs/path/mlflow.db; artifacts go to mlartifacts/ beside it
        experiment: str,
        run_name: str,
        params: dict[str, Param],
        tags: dict,
        run_id: str | None = None,  # resume this run
    ):
        self._warned = False
        self._thread: threading.Thread | None = None
        self.run_id: str | None = None
        try:
            self._client, experiment_id = _open_store(uri, experiment)
            self.run_id = self._start(experiment_id, run_name, run_id)
            self._describe(self.run_id, params, tags)
        except Exception as error:
            self._warn(f"use {uri}", error)
        if self.run_id:
            self._points: deque[tuple[str, float, int, int]] = deque()  # name, value, milliseconds, step
            self._queue: queue.SimpleQueue = queue.SimpleQueue()
            self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
            self._thread.start()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Send the metrics of a step; returns at once."""
        if self._thread:
            now = int(time.time() * 1000)  # MLflow's milliseconds
            self._points.extend((name, float(value), now, step) for name, value in metrics.items())
            self._later("log metrics", self._send_points)

    def artifact(self, path: Path) -> None:
        """Store a file of the run folder with the run."""
        if run_id := self.run_id:
            self._later(f"store {path.name}", lambda: self._client.log_artifact(run_id, str(path)))

    def close(self, status: str = "FINISHED") -> None:
        """End the run (FINISHED, FAILED, KILLED) once everything sent is stored; waits at most DRAIN_SECONDS for that."""
        if run_id := self.run_id:
            self._later("end the run", lambda: self._client.set_terminated(run_id, status))
        if self._thread:
            self._queue.put(None)
            self._thread.join(DRAIN_SECONDS)
            if self._thread.is_alive():
                self._warn("end the run", TimeoutError(f"no answer from the store in {DRAIN_SECONDS} seconds"))
            self._thread = None

    def _later(self, action: str, call: Callable[[], object]) -> None:
        """Make the call on the thread. `action` completes "MLflow could not ..."."""
        if self._thread:
            self._queue.put((action, call))

    def _work(self) -> None:
        for action, call in iter(self._queue.get, None):
            try:
                call()
            except Exception as error:
                self._warn(action, error)

    def _warn(self, action: str, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            reason = (str(error).splitlines() or [""])[0]
            logger.warning(
                "MLflow could not %s (%s: %s). Training continues and metrics.jsonl stays whole; "
                "turn MLflow off with tracking=none",
                *(action, type(error).__name__, reason),
            )

    def _send_points(self) -> None:
        """Send all waiting points, as many in a call as MLflow takes: a call costs 20 ms, so that a slow store catches up."""
        from mlflow.entities import Metric

        while self._points and self.run_id:
            batch = [Metric(*self._points.popleft()) for _ in range(min(1000, len(self._points)))]
            self._client.log_batch(self.run_id, metrics=batch)

    def _start(self, experiment_id: str, run_name: str, run_id: str | None) -> str:
        from mlflow.exceptions import MlflowException

        try:
            if run_id:
                self._client.update_run(run_id, status="RUNNING")
                return run_id
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            logger.warning("MLflow's store has no run %s to resume (was it moved?); this run gets a new one", run_id)
        return self._client.create_run(experiment_id, run_name=run_name).info.run_id

    def _describe(self, run_id: str, params: dict[str, Param], tags: dict) -> None:
        """Set params and tags. MLflow lets no param change: a resumed run keeps its first values, its config.yaml has the new."""
        from mlflow.entities import Param as MLflowParam
        from mlflow.entities import RunTag

        stored = self._client.get_run(run_id).data.params
        # 6000 characters is the most MLflow takes of a value, and 100 the most params of one call
        texts = {key: (value if isinstance(value, str) else json.dumps(value))[:6000] for key, value in params.items()}
        if changed := [key for key, text in texts.items() if stored.get(key, text) != text]:
            logger.info("MLflow keeps the first values of changed params: %s", ", ".join(changed))
        new = [MLflowParam(key, text) for key, text in texts.items() if key not in stored]
        for start in range(0, len(new), 100):
            self._client.log_batch(run_id, params=new[start : start + 100])
        self._client.log_batch(run_id, tags=[RunTag(key, str(value)) for key, value in tags.items()])


def _open_store(uri: str, experiment: str):
    """An MlflowClient for this store, without global state, telemetry or log output, and the experiment's id.

    A lock lets one process in at a time: two that make the tables of a store at once fail ("duplicate column name").
    """
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # read at import
    os.environ.setdefault(
        "MLFLOW_LOGGING_LEVEL", "CRITICAL"
    )  # less severe: lines about making tables, a traceback for each refused call
    from mlflow import MlflowClient

    if not uri.startswith("sqlite:///"):
        client = MlflowClient(tracking_uri=uri)
        return client, _experiment_id(client, experiment, artifacts=None)
    path = Path(uri.removeprefix("sqlite:///").partition("?")[0]).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.lock", "w") as lock, closing(sqlite3.connect(path)) as database:
        fcntl.flock(lock, fcntl.LOCK_EX)
        database.execute("PRAGMA schema_version").fetchone()  # raises at once; MLflow would try for 100 seconds
        client = MlflowClient(tracking_uri=uri)  # makes the tables
        return client, _experiment_id(client, experiment, (path.parent / "mlartifacts").as_uri())


def _experiment_id(client, name: str, artifacts: str | None) -> str:
    """Find the experiment or make it. If making it fails, another process may have made it in between: look again."""
    from mlflow.exceptions import MlflowException

    if found := client.get_experiment_by_name(name):
        return found.experiment_id
    try:
        return client.create_experiment(name, artifact_location=artifacts)
    except MlflowException:
        if found := client.get_experiment_by_name(name):
            return found.experiment_id
        raise
