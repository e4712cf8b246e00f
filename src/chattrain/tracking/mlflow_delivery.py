"""Sends what a folder holds, and a store has not got yet, to the store. Everything may be sent again: nothing arrives twice.

A point that arrives again has the same name, value, time and step, of which MLflow keeps one. Where a run is opened again, its
points are compared first, as a resumed run measures some steps again. The run itself has a tag by which it is found.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chattrain.storage.files import replace_text
from chattrain.tracking import mlflow_store as store
from chattrain.tracking.metrics import parse_row
from chattrain.tracking.mlflow_models import CheckpointModels, checkpoint_digest, log_data_sets, log_start
from chattrain.tracking.mlflow_state import OF_RUNS, PARENT_TAG, Copy, MLflowState, checkpoints_of, digest, read_state
from chattrain.tracking.run_folder import SAMPLES, read_samples
from chattrain.tracking.samples_table import mlflow_table

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import RunInfo

BATCH = 1000  # metrics of one call, the most that MLflow takes
KEY_TAG = "chattrain.key"
SAMPLES_TABLE = "samples.json"  # MLflow's name of samples.jsonl
SAMPLES_SECONDS = 60.0

Point = tuple[str, float, int, int]  # name, value, milliseconds, step


class Abandoned(Exception):
    """The run has ended and no longer waits for the store."""


class Delivery:
    """One folder and one store. Its calls wait for the store and raise what MLflow raises; call again to go on."""

    def __init__(
        self,
        folder: Path,
        state: MLflowState,
        copy: Copy,
        uri: str,  # with user and password
        live: bool = False,  # the run goes on: its status is RUNNING
        restore: bool = False,  # bring back what was deleted in the store
        progressed: Callable[[], None] = lambda: None,  # called after each part that the store has taken
    ):
        self.folder, self.state, self.copy, self.uri = Path(folder), state, copy, uri
        self.lock = threading.RLock()  # of `state`, which the run's own thread changes too
        self.abandoned = threading.Event()
        self.action = "be reached"  # what is being done: completes "MLflow could not ..."
        self._live, self._restore, self._progressed = live, restore, progressed
        self._client: MlflowClient | None = None
        self._samples_at = -SAMPLES_SECONDS  # when they were sent
        self._at = (0, 0)  # (lines of metrics.jsonl, bytes)
        self._existed = False  # the store has had the run before this object
        self._had: dict[str, set[tuple[int, float | None]]] = {}  # metric -> (step, value) that an existing run has

    def open(self) -> MlflowClient:
        """The store's client, with the run made there."""
        if self._client is None:
            self.action = f"use {self.uri}"
            client, experiment_id = store.open_store(self.uri, self.copy.experiment, self._restore)
            run = self._find(client, experiment_id) or self._create(client, experiment_id)
            if run.experiment_id != experiment_id:
                self.copy.experiment = client.get_experiment(run.experiment_id).name
            self._note(run_id=run.run_id, experiment_id=run.experiment_id)
            self._client = client
        return self._client

    def send(self) -> None:
        """Everything that the store lacks, but for the end of the run."""
        client = self.open()
        self.action = "end an earlier run"
        self._close_killed(client)
        self.action = "set params and tags"
        self._describe(client)
        self.action = "store data sets"
        self._send_inputs(client)
        self.action = "log metrics"
        self._send_metrics(client)
        self.action = "store checkpoints"
        self._send_checkpoints(client)
        self.action = "store replies"
        self._send_samples(client)

    def end(self) -> None:
        """What `send` sends, the files, and how the run ended: state.ended."""
        self.send()
        ended, run_id = self.state.ended, self.copy.run_id or ""
        if ended is None:
            return
        client = self.open()
        self.action = "store files"
        for name, value in ended["metrics"].items():
            client.log_metric(run_id, store.valid_name(name), float(value), timestamp=ended["time"])
        self._add_run_id_to_summary()
        for file in [self.folder / name for name in self.state.about.files]:
            if file.is_file() and self.copy.files.get(file.name) != (held := digest(file)):
                client.log_artifact(run_id, str(file))
                self._note(files={**self.copy.files, file.name: held})
        self.action = "end the run"
        if self.copy.status != ended["status"]:
            client.set_terminated(run_id, ended["status"], ended["time"])
            self._note(status=ended["status"])

    # --- the run -----------------------------------------------------------------------------------------------------

    def _find(self, client: MlflowClient, experiment_id: str) -> RunInfo | None:
        """The run in this store: by the id that is known, by that of another store (this one may be it, moved), by its key."""
        others = [c.run_id for c in self.state.copies if c.uri != self.copy.uri]
        found = None
        for run_id in dict.fromkeys([self.copy.run_id, *others]):
            found = found or (store.find_run(client, run_id, self._restore) if run_id else None)
        if found is None:
            tagged = client.search_runs([experiment_id], f"tags.`{KEY_TAG}` = '{self.state.key}'", max_results=1)
            found = tagged[0].info if tagged else None
        if self.copy.run_id and (found is None or found.run_id != self.copy.run_id):
            store.logger.warning(
                "MLflow's store has no run %s to go on with (was it moved?); this run gets a new one", self.copy.run_id
            )
            self._note(run_id=None, lines=0, described={}, inputs=False, models={}, files={}, status=None)
        if found is not None:
            self._existed = True
            if self._live:
                client.update_run(found.run_id, status="RUNNING")
        return found

    def _create(self, client: MlflowClient, experiment_id: str) -> RunInfo:
        about, tags = self.state.about, {KEY_TAG: self.state.key}
        return client.create_run(experiment_id, self.state.started_at, tags, about.name).info

    def _close_killed(self, client: MlflowClient) -> None:
        """End the runs that a killed process left behind in this folder."""
        for killed in [k for k in self.state.killed if k["uri"] == self.copy.uri]:
            with suppress(store.Deleted):
                if store.find_run(client, killed["run_id"]) is not None:
                    client.set_terminated(killed["run_id"], killed["status"], killed["time"])
            self.state.killed.remove(killed)
            self._note()

    def _describe(self, client: MlflowClient) -> None:
        with self.lock:
            about, ended = self.state.about, self.state.ended
            params, tags = dict(about.params), dict(about.tags)
            result = ended["result"] if ended else ""
        if about.note:
            tags.setdefault("mlflow.note.content", "\n\n".join(filter(None, [result, about.note])))
        if parent := self._parent():
            tags[PARENT_TAG] = parent
        said = {"params": store.hash_of(params), "tags": store.hash_of(tags)}
        if said != self.copy.described:
            news = params if said["params"] != self.copy.described.get("params") else {}
            store.describe_run(client, self.copy.run_id or "", news, tags)
            self._note(described=said)

    def _parent(self) -> str | None:
        """The run of the sweep in this store."""
        state = read_state(Path(self.state.about.sweep)) if self.state.about.sweep else None
        copy = state.copy_in(self.uri) if state else None
        return copy.run_id if copy else None

    def _send_inputs(self, client: MlflowClient) -> None:
        about, copy = self.state.about, self.copy
        if not copy.inputs:
            log_data_sets(client, copy.run_id or "", about.data_sets)
            if about.start:
                log_start(client, copy.experiment_id or "", copy.run_id or "", Path(about.start))
            self._note(inputs=True)

    # --- numbers -----------------------------------------------------------------------------------------------------

    def _send_metrics(self, client: MlflowClient) -> None:
        from mlflow.entities import Metric

        for lines, points in self._unsent_points():
            new = [Metric(*point) for point in self._without_known(client, points)]
            for start in range(0, len(new), BATCH):
                self._log_batch(client, new[start : start + BATCH])
            self._note(lines=self.copy.lines + lines)

    def _log_batch(self, client: MlflowClient, metrics: list) -> None:
        """Log them. What the store would never take is left out with a warning, or nothing behind it would arrive."""
        from mlflow.exceptions import MlflowException

        try:
            client.log_batch(self.copy.run_id or "", metrics=metrics)
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            store.find_run(client, self.copy.run_id or "")  # raises where it was deleted, which is why
            store.warn(f"take {len(metrics)} values, which it will not get", error)

    def _unsent_points(self) -> Iterator[tuple[int, list[Point]]]:
        """(Number of lines, their points) of the part of metrics.jsonl that the store lacks. A line without its end is left."""
        path = self.folder / "metrics.jsonl"
        if not path.is_file():
            return
        with path.open("rb") as file:
            if self._at[0] != self.copy.lines:
                read = sum(1 for _ in zip(range(self.copy.lines), iter(file.readline, b""), strict=False))
                self._at = read, file.tell()
                self.copy.lines = read
            while True:
                file.seek(self._at[1])
                lines, points = 0, []
                while len(points) < BATCH and (line := file.readline()).endswith(b"\n"):
                    lines, end = lines + 1, file.tell()
                    points += _points(line.decode("utf-8", "replace")).values()
                if not lines:
                    return
                yield lines, points
                self._at = self._at[0] + lines, end

    def _without_known(self, client: MlflowClient, points: list[Point]) -> list[Point]:
        """Without those that a run which existed before has, by step and value."""
        if not self._existed:
            return points
        for name in {point[0] for point in points} - self._had.keys():
            history = client.get_metric_history(self.copy.run_id or "", name)
            self._had[name] = {(held.step, _comparable(held.value)) for held in history}
        return [(name, value, at, step) for name, value, at, step in points if (step, _comparable(value)) not in self._had[name]]

    def _send_checkpoints(self, client: MlflowClient) -> None:
        """A LoggedModel for each checkpoint; those of checkpoints that are gone are deleted."""
        there = {c: held for c in checkpoints_of(self.folder) if (held := checkpoint_digest(c))}
        known = {c.name: held for c, held in there.items()}
        if known == self.copy.models or not (self.folder / "checkpoints").is_dir():
            return
        models = CheckpointModels(client, self.copy.experiment_id or "", self.copy.run_id or "")
        with self.lock:
            about = self.state.about
            params, tags = dict(about.params), {key: tag for key, tag in about.tags.items() if key not in OF_RUNS}
        for folder, held in there.items():
            if self.copy.models.get(folder.name) != held and folder.is_dir():
                step = int(folder.name.removeprefix("step_"))
                model_id = models.add(step, folder, f"{about.name} step {step}", params, tags)
                self._assign(client, step, model_id)
                self._note(models={**self.copy.models, folder.name: held})
        models.keep(set(known.values()))
        self._note(models=known)

    def _assign(self, client: MlflowClient, step: int, model_id: str) -> None:
        """Log what was measured at a step once more, as the model's. The run keeps one of each."""
        from mlflow.entities import Metric

        measured = []
        with (self.folder / "metrics.jsonl").open(encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith(f'{{"step": {step},'):
                    points = _points(line).items()
                    measured += [(p, data) for name, p in points if (data := self.state.about.data_set(name))]
        metrics = [Metric(*p, model_id=model_id, dataset_name=d.name, dataset_digest=d.digest) for p, d in measured]
        if metrics:
            client.log_batch(self.copy.run_id or "", metrics=metrics)

    def _send_samples(self, client: MlflowClient) -> None:
        """The replies to eval.prompts as a table of MLflow's own; while the run goes on once a minute at most, as each time all
        of it is sent."""
        file, now = self.folder / SAMPLES, time.monotonic()
        early = self._live and self.state.ended is None and now - self._samples_at < SAMPLES_SECONDS
        if early or not file.is_file() or self.copy.files.get(SAMPLES) == (held := digest(file)):
            return
        run_id = self.copy.run_id or ""
        client.log_text(run_id, mlflow_table(read_samples(file)), SAMPLES_TABLE)
        client.set_tag(run_id, "mlflow.loggedArtifacts", json.dumps([{"path": SAMPLES_TABLE, "type": "table"}]))
        self._samples_at = now
        self._note(files={**self.copy.files, SAMPLES: held})

    # --- the record --------------------------------------------------------------------------------------------------

    def _note(self, **changes: Any) -> None:
        """Write down what the store has got. Raises Abandoned where nobody waits any more: another process may send by now."""
        with self.lock:
            if self.abandoned.is_set():
                raise Abandoned
            for name, value in changes.items():
                setattr(self.copy, name, value)
            self.state.write(self.folder)
        self._progressed()

    def _add_run_id_to_summary(self) -> None:
        """A run that ended before its store answered has none in summary.json."""
        file = self.folder / "summary.json"
        if self.copy is self.state.copies[0] and "summary.json" in self.state.about.files and file.is_file():
            summary = json.loads(file.read_text())
            if summary.get("mlflow_run_id") is None:
                replace_text(file, json.dumps({**summary, "mlflow_run_id": self.copy.run_id}, indent=1) + "\n")


def _points(line: str) -> dict[str, Point]:
    """The points of a line of metrics.jsonl, by name; null there is a value that was not finite."""
    row = parse_row(line) or {"step": 0}
    at, step = int(row.get("time", 0) * 1000), row["step"]
    values = {name: math.nan if v is None else v for name, v in row.items() if name not in ("step", "time")}
    return {n: (store.valid_name(n), float(v), at, step) for n, v in values.items() if isinstance(v, int | float)}


def _comparable(value: float) -> float | None:
    return None if math.isnan(value) else value
