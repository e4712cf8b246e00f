"""One MLflow run as a view of metrics.jsonl: MLflow's client on one thread, so that training never waits for it."""

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

DRAIN_SECONDS = 60  # longest wait for a slow store at the end of a run


class MLflowSink:
    """One MLflow run. Nothing here raises or makes the training wait: it is a view of metrics.jsonl, not the record.

    The store is opened (and made) at once, in seconds and before step 0; every later call goes through one thread.
    The first failure is one warning; later calls are still tried, in silence, as a locked store may open again.
    A continued run keeps the points that MLflow got after the checkpoint: its client cannot take them back.
    """

    def __init__(
        self,
        uri: str,  # sqlite:////abs/path/mlflow.db; artifacts go to mlartifacts/ beside it
        experiment: str,
        run_name: str,
        params: dict[str, str | int | float | bool | None],
        tags: dict,
        run_id: str | None = None,  # go on with this run
    ):
        self._warned, self._thread, self.run_id = False, None, None
        try:
            self._client, experiment_id = _open_store(uri, experiment)
            self.run_id = self._start(experiment_id, run_name, run_id)
            self._describe(params, tags)
        except Exception as error:
            self._warn(f"use {uri}", error)
        if self.run_id:
            self._points: deque[tuple[str, float, int, int]] = deque()  # name, value, milliseconds, step
            self._queue: queue.SimpleQueue = queue.SimpleQueue()
            self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
            self._thread.start()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if self._thread:
            now = int(time.time() * 1000)  # MLflow's milliseconds
            self._points.extend((name, float(value), now, step) for name, value in metrics.items())
            self._later("log metrics", self._send_points)

    def artifact(self, path: Path) -> None:
        self._later(f"store {path.name}", lambda: self._client.log_artifact(self.run_id, str(path)))

    def close(self, status: str = "FINISHED") -> None:
        """Ends the run (FINISHED, FAILED, KILLED) when all that was handed over is stored, or after DRAIN_SECONDS."""
        self._later("end the run", lambda: self._client.set_terminated(self.run_id, status))
        if self._thread:
            self._queue.put(None)
            self._thread.join(DRAIN_SECONDS)
            if self._thread.is_alive():
                self._warn("end the run", TimeoutError(f"no answer from the store in {DRAIN_SECONDS} seconds"))
            self._thread = None

    def _later(self, what: str, call: Callable[[], object]) -> None:
        if self._thread:
            self._queue.put((what, call))

    def _work(self) -> None:
        for what, call in iter(self._queue.get, None):
            try:
                call()
            except Exception as error:
                self._warn(what, error)

    def _warn(self, what: str, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            reason = (str(error).splitlines() or [""])[0]
            logger.warning(
                "MLflow could not %s (%s: %s). Training goes on and metrics.jsonl stays whole; "
                "turn MLflow off with tracking=none",
                *(what, type(error).__name__, reason),
            )

    def _send_points(self) -> None:
        """All that waits, as many a call as MLflow takes: a call costs 20 ms, so a store that lags catches up."""
        from mlflow.entities import Metric

        while self._points:
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
            logger.warning("MLflow's store has no run %s to go on with (was it moved?); a new run is used", run_id)
        return self._client.create_run(experiment_id, run_name=run_name).info.run_id

    def _describe(self, params: dict, tags: dict) -> None:
        """MLflow lets no param change, so a continued run keeps its first values; its config.yaml has the new ones."""
        from mlflow.entities import Param, RunTag

        there = self._client.get_run(self.run_id).data.params
        # 6000 characters is the most MLflow takes of a value, and 100 the most params of one call
        words = {key: (value if isinstance(value, str) else json.dumps(value))[:6000] for key, value in params.items()}
        if changed := [key for key, word in words.items() if there.get(key, word) != word]:
            logger.info("MLflow keeps the first values of changed params: %s", ", ".join(changed))
        new = [Param(key, word) for key, word in words.items() if key not in there]
        for start in range(0, len(new), 100):
            self._client.log_batch(self.run_id, params=new[start : start + 100])
        self._client.log_batch(self.run_id, tags=[RunTag(key, str(value)) for key, value in tags.items()])


def _open_store(uri: str, experiment: str):
    """An MlflowClient for this store alone, without global state, telemetry or chatter, and the experiment's id.

    One process at a time: two that make one store's tables at once break each other ("duplicate column name").
    """
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # read at import
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "CRITICAL")  # below: table making, and a traceback for each refusal
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
    """Finds the experiment or makes it. Another process may make it in between, so a refusal means: look again."""
    from mlflow.exceptions import MlflowException

    if found := client.get_experiment_by_name(name):
        return found.experiment_id
    try:
        return client.create_experiment(name, artifact_location=artifacts)
    except MlflowException:
        if found := client.get_experiment_by_name(name):
            return found.experiment_id
        raise
