"""mlflow.json in the folder of a run or a sweep: what MLflow is to be told of it, and how much of that each store has got.

With it and the folder's other files everything can be sent again at any time: by the run that goes on, or by `command=sync`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from chattrain.redact import redact_tree, without_user
from chattrain.storage.files import replace_text
from chattrain.tracking.mlflow_models import DataSet, checkpoint_digest
from chattrain.tracking.mlflow_store import Param
from chattrain.tracking.run_folder import SAMPLES

FILE = "mlflow.json"
LOCK = ".mlflow.lock"  # held by the process that sends
RUN_FILES = ("config.yaml", "summary.json", "report.html")  # artifacts of a run
RUN_STATUS = {"completed": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}  # status in summary.json -> MLflow's
SWEEP_FILES = ("sweep.json", "table.md", "answer.json", "report.html")
PARENT_TAG = "mlflow.parentRunId"
OF_RUNS = ("mlflow.note.content", PARENT_TAG)  # tags that models of checkpoints do not get


class Busy(OSError):
    """Another process sends this folder to MLflow: its run goes on."""


@dataclass
class About:
    """What MLflow is told, besides the numbers of metrics.jsonl and the checkpoints. A state has it without credentials."""

    name: str
    params: dict[str, Param] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    note: str = ""  # description in Markdown; how it ended comes before it
    data_sets: list[DataSet] = field(default_factory=list)
    measured_on: dict[str, DataSet] = field(default_factory=dict)  # beginning of metrics' names -> the data
    start: str | None = None  # checkpoint that the run starts from
    sweep: str | None = None  # folder of the sweep that it is a job of
    files: tuple[str, ...] = RUN_FILES

    def without_credentials(self) -> About:
        name, params, tags, note = (redact_tree(value) for value in (self.name, self.params, self.tags, self.note))
        measured_on = {begin: data.without_credentials() for begin, data in self.measured_on.items()}
        data_sets = [data.without_credentials() for data in self.data_sets]
        return replace(self, name=name, params=params, tags=tags, note=note, data_sets=data_sets, measured_on=measured_on)

    def data_set(self, metric: str) -> DataSet | None:
        """What a metric is measured on: the entry of `measured_on` that its name begins with, the longest of several."""
        beginnings = [begin for begin in self.measured_on if metric.startswith(begin)]
        return self.measured_on[max(beginnings, key=len)] if beginnings else None


@dataclass
class Copy:
    """What one store has of the folder."""

    uri: str  # without user and password
    experiment: str
    run_id: str | None = None  # None: not reached yet
    experiment_id: str | None = None
    lines: int = 0  # of metrics.jsonl
    described: dict[str, str] = field(default_factory=dict)  # hashes of params and tags
    inputs: bool = False  # data sets and start
    models: dict[str, str] = field(default_factory=dict)  # checkpoints that have a LoggedModel: name of the folder -> hash
    files: dict[str, str] = field(default_factory=dict)  # name -> hash
    status: str | None = None  # MLflow's, once the run's end was sent


@dataclass
class MLflowState:
    about: About
    key: str = field(default_factory=lambda: uuid.uuid4().hex)  # tag of the run in every store, so that none gets two
    started_at: int = field(default_factory=lambda: int(time.time() * 1000))  # milliseconds
    ended: dict | None = None  # status (MLflow's), time (milliseconds), result (a line), metrics; None: it goes on, or was killed
    pid: int = field(default_factory=os.getpid)
    host: str = field(default_factory=socket.gethostname)
    copies: list[Copy] = field(default_factory=list)  # the first is the run's own
    killed: list[dict] = field(default_factory=list)  # runs of killed processes, begun in this folder: uri, run_id, status, time

    def write(self, folder: Path) -> None:
        replace_text(folder / FILE, json.dumps(asdict(self), indent=1) + "\n")

    def copy_in(self, uri: str, experiment: str | None = None) -> Copy | None:
        """What a store has; `experiment` None: in any experiment."""
        same = [c for c in self.copies if c.uri == without_user(uri)]
        return next((c for c in same if experiment in (None, c.experiment)), None)


def read_state(folder: Path) -> MLflowState | None:
    """None where there is none, or none that can be read."""
    try:
        held = json.loads((folder / FILE).read_text(encoding="utf-8"))
        about = held.pop("about")
        about["data_sets"] = [DataSet(**each) for each in about["data_sets"]]
        about["measured_on"] = {begin: DataSet(**each) for begin, each in about["measured_on"].items()}
        about["files"] = tuple(about["files"])
        return MLflowState(**{**held, "about": About(**about), "copies": [Copy(**each) for each in held["copies"]]})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def unsent(folder: Path, state: MLflowState, copy: Copy | None) -> str:
    """What a store lacks, in words; empty where it has everything."""
    if copy is None or copy.run_id is None:
        return "the whole run"
    lines = count_lines(folder / "metrics.jsonl") - copy.lines
    checkpoints = [c.name for c in checkpoints_of(folder) if copy.models.get(c.name) != checkpoint_digest(c)]
    files = [
        name
        for name in (*state.about.files, SAMPLES)
        if (folder / name).is_file() and copy.files.get(name) != digest(folder / name)
    ]
    lacks = [f"{lines} lines of metrics.jsonl"] if lines > 0 else []
    lacks += checkpoints + files + ([] if copy.status else ["the end of the run"])
    lacks += [f"the end of the run {k['run_id']}, which was killed" for k in state.killed if k["uri"] == copy.uri]
    return ", ".join(lacks)


def checkpoints_of(folder: Path) -> list[Path]:
    """The complete checkpoints of a run folder, in order."""
    return sorted(file.parent for file in (folder / "checkpoints").glob("step_*/manifest.json"))


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def count_lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.is_file() else 0


@contextmanager
def sending(folder: Path) -> Iterator[None]:
    """Only one process sends a folder at a time. The system gives the lock back when its process dies, however it dies.

    Raises Busy. A file system without locks locks nothing.
    """
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            state = read_state(folder)
            owner = f"process {state.pid} on {state.host}" if state else "another process"
            raise Busy(f"{owner} sends {folder} to MLflow") from None
        except OSError:
            pass
        try:
            yield
        finally:
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_UN)


def result_of(summary: dict) -> str:
    """How a run ended, in a line: `completed at step 20 of 20: val/bpb 1.25`."""
    steps = f" at step {summary['steps']} of {summary['num_steps']}" if "steps" in summary else ""
    measured = [f"{name} {value:.5g}" for name, value in summary.get("metrics", {}).items() if _is_measure(name, value)]
    return f"{summary['status']}{steps}" + (": " + ", ".join(measured) if measured else "")


def _is_measure(name: str, value: float | None) -> bool:
    return value is not None and name.startswith(("val/", "eval/"))
