"""One MLflow run as a view of metrics.jsonl. MLflow's client runs on a thread of its own, so that training never waits for it."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from chattrain.tracking import mlflow_store as store
from chattrain.tracking.mlflow_models import CheckpointModels, DataSet, log_data_sets, log_start
from chattrain.tracking.mlflow_store import Param
from chattrain.tracking.provenance import git_tags

DRAIN_SECONDS = 60  # longest wait for a slow store at the end of a run
BATCH = 1000  # metrics of one call, the most that MLflow takes
WAITING = 100_000  # metrics that wait for a store that does not answer; the oldest are dropped beyond that

OF_RUNS = ("mlflow.note.content", "mlflow.parentRunId")  # tags that models of checkpoints do not get

Point = tuple[str, float, int, int]  # name, value, milliseconds, step


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
        tags: dict[str, str],
        run_id: str | None = None,  # resume this run
        measured_on: dict[str, DataSet] | None = None,  # beginning of metrics' names -> the data they are measured on
        note: Callable[[str], str] | None = None,  # how the run ended -> its description in Markdown
    ):
        self._warned = False
        self._thread: threading.Thread | None = None
        self._monitor = None
        self._uri, self._run_name, self._measured_on = uri, run_name, measured_on or {}
        self._params = dict(params)
        self._model_tags = {key: str(value) for key, value in tags.items() if key not in OF_RUNS}
        self._note = note
        self._measured: tuple[int, list[tuple[Point, DataSet]]] = (-1, [])  # step of the newest evaluation, and its points
        self.run_id: str | None = None
        self.experiment = experiment
        try:
            self._client, experiment_id = store.open_store(uri, experiment)
            info = store.begin_run(self._client, experiment_id, run_name, run_id)
            if info.experiment_id != experiment_id:
                self.experiment = self._client.get_experiment(info.experiment_id).name
            self._experiment_id, self.run_id = info.experiment_id, info.run_id
        except Exception as error:
            self._warn(f"use {uri}", error)
        if run := self.run_id:
            self._models = CheckpointModels(self._client, self._experiment_id, run)
            self._points: deque[Point] = deque(maxlen=WAITING)
            self._queue: queue.SimpleQueue = queue.SimpleQueue()
            self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
            self._thread.start()
            self._later("set params and tags", lambda: store.describe_run(self._client, run, params, tags))
            self._later("set tags of the code", lambda: store.describe_run(self._client, run, {}, git_tags()))

    def describe(self, params: dict[str, Param]) -> None:
        """Further params, known only once the model is built. Models of checkpoints get those of the run."""
        self._params |= params
        if run := self.run_id:
            self._later("set params", lambda: store.describe_run(self._client, run, params, {}))

    def inputs(self, data_sets: list[DataSet], start: Path | None) -> None:
        """The data of the run, and the checkpoint that it starts from."""
        if run := self.run_id:
            self._later("store data sets", lambda: log_data_sets(self._client, run, data_sets))
            if start:
                self._later("store the start", lambda: log_start(self._client, self._experiment_id, run, start))

    def watch_system(self) -> None:
        """Have MLflow's own thread measure the machine (system/*) every 10 seconds, until `close`."""
        self._later("watch the system", self._start_monitor)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Send the metrics of a step; returns at once."""
        if self._thread:
            now = int(time.time() * 1000)  # MLflow's milliseconds
            points = {name: (store.valid_name(name), float(value), now, step) for name, value in metrics.items()}
            self._points.extend(points.values())
            data_sets = {name: data for name in points if (data := self._data_set(name))}
            if data_sets:
                self._measured = step, [(points[name], data) for name, data in data_sets.items()]
            self._later("log metrics", self._send_points)

    def checkpoint(self, step: int, folder: Path) -> None:
        """A LoggedModel for a checkpoint that was written, with the metrics of the newest evaluation if it was at this step.

        Models of checkpoints that are gone by now are deleted.
        """
        evaluated, measured = self._measured
        name, params = f"{self._run_name} step {step}", dict(self._params)

        def send() -> None:
            model_id = self._models.add(step, folder, name, params, self._model_tags)
            self._send_points()
            if evaluated == step:
                self._assign(measured, model_id)

        self._later("store the checkpoint", send)

    def artifact(self, path: Path) -> None:
        """Store a file of the run folder with the run."""
        if run_id := self.run_id:
            self._later(f"store {path.name}", lambda: self._client.log_artifact(run_id, str(path)))

    def result(self, text: str) -> None:
        """How the run ended, in a line; it becomes part of the run's description."""
        if (run := self.run_id) and (note := self._note):
            tags = {"mlflow.note.content": note(text)}
            self._later("set the description", lambda: store.describe_run(self._client, run, {}, tags))

    def close(self, status: str = "FINISHED") -> None:
        """End the run (FINISHED, FAILED, KILLED) once everything sent is stored; waits at most DRAIN_SECONDS for that."""
        if run_id := self.run_id:
            self._later("stop watching the system", lambda: self._monitor and self._monitor.finish())
            self._later("log metrics", self._send_points)
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
            store.warn(action, error)

    def _send_points(self) -> None:
        """Send all waiting points, as many in a call as MLflow takes: a call costs 20 ms, so that a slow store catches up.

        What a store did not take because it was away is sent with the next points.
        """
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        while self._points and self.run_id:
            batch = [self._points[i] for i in range(min(BATCH, len(self._points)))]
            try:
                self._client.log_batch(self.run_id, metrics=[Metric(*point) for point in batch])
            except MlflowException as error:
                if error.error_code == "INVALID_PARAMETER_VALUE":  # it would never be taken, nor anything behind it
                    self._drop(len(batch))
                raise
            self._drop(len(batch))

    def _drop(self, count: int) -> None:
        for _ in range(count):
            self._points.popleft()

    def _assign(self, measured: list[tuple[Point, DataSet]], model_id: str) -> None:
        """Log points once more, as those of a model. The run keeps one of each: name, value, time and step are the same."""
        from mlflow.entities import Metric

        metrics = [Metric(*p, model_id=model_id, dataset_name=d.name, dataset_digest=d.digest) for p, d in measured]
        self._client.log_batch(self.run_id or "", metrics=metrics)

    def _data_set(self, metric: str) -> DataSet | None:
        """What a metric is measured on: the entry of `measured_on` that its name begins with, the longest of several."""
        beginnings = [begin for begin in self._measured_on if metric.startswith(begin)]
        return self._measured_on[max(beginnings, key=len)] if beginnings else None

    def _start_monitor(self) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self._monitor = SystemMetricsMonitor(self.run_id, resume_logging=True, tracking_uri=self._uri)
        self._monitor.start()
