"""MLflow's stores for tests: files, and MLflow's own server on loopback with faults at will."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from chattrain.setup.job import JOB_VARIABLE, Job, set_job
from chattrain.tracking.mlflow_sink import MLflowSink
from chattrain.tracking.mlflow_state import About
from chattrain.tracking.mlflow_store import connect, open_store
from chattrain.tracking.tracker import Tracker


@contextmanager
def environment(job: Job | None = None, **variables: str):
    """MLflow's variables as given, all others of it unset; the process works on `job`."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID", JOB_VARIABLE):
            patch.delenv(name, raising=False)
        for name, value in variables.items():
            patch.setenv(name, value)
        if job:
            patch.setenv(JOB_VARIABLE, "")
            set_job(job)
        yield


def tracked(
    folder: Path, uri: str, experiment: str, num_steps: int = 3, start_step: int = 0, params=None, tags=None, **more
) -> Tracker:
    """The tracker of a run in a folder, with MLflow."""
    about = About(more.pop("name", "run"), params or {}, tags or {})
    sink = MLflowSink(folder, uri, experiment, about, resume=start_step > 0, **more)
    return Tracker(folder, num_steps, start_step, sink, console=False)


def finish(tracker: Tracker, status: str = "completed") -> str:
    """End the run; returns its id in MLflow."""
    summary = {"status": status}
    tracker.finish(summary)
    return summary["mlflow_run_id"] or ""


def history(client, run_id: str, metric: str) -> list[tuple[int, float]]:
    return sorted((point.step, point.value) for point in client.get_metric_history(run_id, metric))


class Server:
    """A server that refuses (stopped), answers 500, hangs, or does what it is asked and then loses the answer.

    `fault`: for every request, or a function from the path of a request to its fault.
    """

    def __init__(self, folder: Path, empty: Path):
        from mlflow.server import app, handlers

        shutil.copy(empty, folder / "server.db")
        handlers._tracking_store = None
        store = self.store = f"sqlite:///{folder / 'server.db'}"
        handlers.initialize_backend_stores(store, store, (folder / "server-artifacts").as_uri())
        self.fault: str | Callable[[str], str | None] | None = None
        self.requests: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.client = connect(store)  # sees what the server holds, also while it is away
        self._app, self._released, self.port = app, threading.Event(), 0
        self.start()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Quiet(WSGIRequestHandler):
            def log(self, *args, **kwargs) -> None: ...

        self._server = make_server("127.0.0.1", self.port, self._answer, threaded=True, request_handler=Quiet)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        """From here on connections are refused."""
        self._server.shutdown()
        self._server.server_close()

    def close(self) -> None:
        self._released.set()
        self.stop()

    def runs(self, experiment: str = "chattrain") -> list:
        found = self.client.get_experiment_by_name(experiment)
        return self.client.search_runs([found.experiment_id]) if found else []

    def _answer(self, environ: dict, start_response: Callable):
        path = environ["PATH_INFO"].rpartition("/mlflow/")[2]
        self.requests.append(path)
        self.headers.append({key: str(value) for key, value in environ.items()})
        fault = self.fault(path) if callable(self.fault) else self.fault
        if fault == "hang":
            self._released.wait(60)
        if fault == "lost":
            list(self._app(environ, lambda *args: lambda data: None))
        if fault is None:
            return self._app(environ, start_response)
        start_response("500 INTERNAL SERVER ERROR", [("Content-Type", "text/plain")])
        return [b"out of order"]


@contextmanager
def serving(folder: Path, empty: Path) -> Iterator[Server]:
    """A server for the time of a test, and settings that make MLflow's client give up after a second. The server leaves its
    store in MLflow's variables, where runs of later tests would find it."""
    before = _mlflow_variables()
    server = Server(folder, empty)
    with environment(MLFLOW_HTTP_REQUEST_TIMEOUT="1"):
        try:
            yield server
        finally:
            server.close()
    for name in _mlflow_variables().keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


def _mlflow_variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(("MLFLOW", "_MLFLOW"))}


def make_empty_store(folder: Path) -> Path:
    """A file with MLflow's tables; making it takes seconds."""
    open_store(f"sqlite:///{folder / 'empty.db'}", "Default")
    return folder / "empty.db"


def everything_below(folder: Path) -> str:
    """All files of a folder as one text, names included, to look for what must not be there."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and not os.path.islink(file)]
    return "\n".join(f"{file}\n{file.read_bytes().decode('utf-8', 'replace')}" for file in files)
