"""MLflow while a run goes on: a thread sends what the run's folder holds, so that training never waits for a server.

metrics.jsonl is the record and MLflow a view of it. What could not be sent is in the folder, and goes out with the next try, with
the run's next part, or with `command=sync`.
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path

from chattrain.redact import redact, redact_tree, without_user
from chattrain.tracking import mlflow_store as store
from chattrain.tracking.metrics import read_metrics
from chattrain.tracking.mlflow_delivery import Delivery
from chattrain.tracking.mlflow_state import FILE, About, Busy, Copy, MLflowState, count_lines, read_state, sending, unsent
from chattrain.tracking.mlflow_store import Param
from chattrain.tracking.provenance import git_tags

SEND_SECONDS = 2.0  # between two calls of a run that logs often: each takes 20 ms of this process, for one point as for many
DRAIN_SECONDS = 60  # longest wait for a slow store at the end of a run
PATIENCE = 10.0  # seconds at the end of a run in which a store must take something
SHORT_PATIENCE = 3.0  # the same, of a store that has failed before, and of a server where the run was interrupted
LONGEST_PAUSE = 60.0  # seconds between two tries; the first pause is a second, each other twice the one before
LAST_PAUSE = 0.5  # the same at the end of a run

log = logging.getLogger("chattrain")


class MLflowSink:
    """One run, or sweep, in MLflow. Nothing here raises or makes the training wait.

    The first failure that lasts is one warning. Tries go on in growing intervals. A resumed run keeps the points that MLflow got
    after the checkpoint, as MLflow's client cannot delete them; steps that give the same values again are not sent again.
    """

    def __init__(
        self,
        folder: Path,
        uri: str,  # sqlite:////abs/path/mlflow.db (artifacts go to mlartifacts/ beside it), or a server's
        experiment: str,
        about: About,
        resume: bool = False,  # go on with the run that this folder has in MLflow
        run_id: str | None = None,  # of a run to go on with, where the folder knows none
        system_metrics: bool = False,
        failed_before: bool = False,  # this store has failed, and that was said: no warning, no long wait
    ):
        store.import_mlflow()  # here: two threads that import at once may meet half of a module
        self._folder, self._watches = Path(folder), system_metrics
        self._folder.mkdir(parents=True, exist_ok=True)
        self._wake, self._ending, self._done, self._tried = (threading.Event() for _ in range(4))
        self._warned, self._monitor, self._moved_at = failed_before, None, 0.0
        self._lock, self._locked = ExitStack(), False
        self._is_file = uri.startswith("sqlite")  # to make its tables takes seconds, in which other processes wait
        state, copy = _begin(self._folder, uri, experiment, about, resume, run_id)
        self._delivery = Delivery(self._folder, state, copy, uri, live=True, progressed=self._progressed)
        self._save()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)

    @property
    def run_id(self) -> str | None:
        """None as long as the store has not answered."""
        return self._delivery.copy.run_id

    @property
    def experiment(self) -> str:
        return self._delivery.copy.experiment

    def start(self) -> None:
        """Begin to send. metrics.jsonl must hold what the run keeps of it: a resumed one has cut it."""
        copy = self._delivery.copy
        copy.lines = min(copy.lines, count_lines(self._folder / "metrics.jsonl"))
        self._thread.start()

    def wait(self, seconds: float) -> None:
        """Until the store has answered or failed; longer for a file."""
        self._tried.wait(DRAIN_SECONDS if self._is_file else seconds)

    def describe(self, params: dict[str, Param], tags: dict[str, str] | None = None) -> None:
        """Further params, known only once the model is built, and tags."""
        with self._delivery.lock:
            about = self._delivery.state.about
            about.params, about.tags = about.params | redact_tree(params), about.tags | redact_tree(tags or {})
        self._save()
        self.send()

    def send(self) -> None:
        """Something new is in the folder; returns at once."""
        self._wake.set()

    def close(self, status: str = "FINISHED", result: str = "", metrics: dict[str, float] | None = None) -> None:
        """End the run (FINISHED, FAILED, KILLED) with its result in a line, once everything is stored. Waits as long as the store
        takes something, at most DRAIN_SECONDS."""
        ended = {"status": status, "time": int(time.time() * 1000), "result": result, "metrics": metrics or {}}
        self._delivery.state.ended = ended
        self._save()
        quick = self._warned or (status == "KILLED" and not self._is_file)
        patience = min(PATIENCE, SHORT_PATIENCE) if quick else PATIENCE
        self._moved_at = began = time.monotonic()
        self._ending.set()
        self._wake.set()
        while not self._done.wait(0.05):
            now = time.monotonic()
            opening = self._is_file and not self._warned and self.run_id is None
            if (now - self._moved_at > patience and not opening) or now - began > DRAIN_SECONDS:
                self._warn(TimeoutError(f"no answer for {now - self._moved_at:.0f} seconds"))
                break
        self._delivery.abandoned.set()
        self._lock.close()
        if not self._done.is_set() and self._monitor:
            threading.Thread(target=self._monitor.finish, daemon=True).start()  # it joins a thread that may wait as well
        self._say_what_is_missing()

    def _work(self) -> None:
        """Send, again after a pause where it fails, until the run has ended and everything is sent or nothing can be."""
        failures = 0
        while not self._delivery.abandoned.is_set():
            self._wake.clear()
            ending = self._ending.is_set()
            try:
                self._send(ending, recovered=failures > 0)
                failures = 0
            except Exception as error:
                failures += 1
                if failures > 1:
                    self._warn(error)
            if ending and failures != 1:
                break
            if not self._tried.is_set():
                self._tried.set()
                self.describe({}, git_tags())  # it may take seconds in a large repository
            if failures:
                time.sleep(LAST_PAUSE) if ending else self._ending.wait(min(2.0 ** (failures - 1), LONGEST_PAUSE))
            else:
                self._wake.wait()
                self._ending.wait(SEND_SECONDS)
        self._done.set()

    def _send(self, ending: bool, recovered: bool) -> None:
        opened = self._tried.is_set() and not recovered
        if not self._locked:
            self._lock.enter_context(sending(self._folder))
            self._locked = True
        self._delivery.send()
        if not opened:
            where = redact(self._delivery.uri), self.experiment, self.run_id
            log.info("numbers go to metrics.jsonl and to MLflow: %s, experiment %s, run %s", *where)
        if self._watches and not ending and (self._monitor is None or recovered):
            self._watch_system()
        if ending:
            if self._monitor:
                self._monitor.finish()
            self._delivery.end()

    def _watch_system(self) -> None:
        """Have MLflow's own thread measure the machine (system/*) every 10 seconds. It ends when the store fails."""
        if self._monitor:
            self._monitor.finish()
        try:
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            self._monitor = SystemMetricsMonitor(self.run_id, resume_logging=True, tracking_uri=self._delivery.uri)
            self._monitor.start()
        except ImportError as error:  # of psutil
            self._watches = False
            log.warning("MLflow does not measure the machine: %s", error)

    def _save(self) -> None:
        """Write mlflow.json, from the run's own thread, which no full disk may end for that."""
        with suppress(OSError), self._delivery.lock:
            self._delivery.state.write(self._folder)

    def _progressed(self) -> None:
        self._moved_at = time.monotonic()

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            store.warn(self._delivery.action, error)

    def _say_what_is_missing(self) -> None:
        missing = unsent(self._folder, self._delivery.state, self._delivery.copy)
        if missing:
            log.info("MLflow lacks of this run: %s. Send it with: chattrain command=sync run.dir=%s", missing, self._folder)
        elif self._warned:
            log.info("MLflow has got everything in the end")


def _begin(folder: Path, uri: str, experiment: str, about: About, resume: bool, run_id: str | None) -> tuple[MLflowState, Copy]:
    """The state of a run that begins or goes on, and what the store has of it."""
    before, state = read_state(folder), MLflowState(about.without_credentials())
    if before and resume:
        state.about.start = about.start or before.about.start
        state.key, state.started_at, state.copies, state.killed = before.key, before.started_at, before.copies, before.killed
    elif before:
        state.killed = [*before.killed, *_left_running(folder, before)]
    elif aside := _moved_aside(folder):
        state.killed = _left_running(*aside)
    copy = state.copy_in(uri) or Copy(without_user(uri), experiment, run_id)
    copy.status = None
    state.copies = [copy, *(c for c in state.copies if c is not copy)]
    return state, copy


def _moved_aside(folder: Path) -> tuple[Path, MLflowState] | None:
    """The newest folder that run.resume=never has moved aside from here, unless its process lives."""
    old = sorted(folder.parent.glob(f"{folder.name}.old*"), key=lambda f: f.stat().st_mtime)
    state = read_state(old[-1]) if old else None
    if state is None:
        return None
    try:
        with sending(old[-1]):
            return old[-1], state
    except Busy:
        return None


def _left_running(folder: Path, before: MLflowState) -> list[dict]:
    """The runs in MLflow of a process that was killed before its first checkpoint, and whose folder another run now takes."""
    rows = read_metrics(folder / "metrics.jsonl")
    last = rows[-1].get("time", 0) if rows else (folder / FILE).stat().st_mtime
    ended = before.ended or {"status": "KILLED", "time": int(last * 1000)}
    left = [copy for copy in before.copies if copy.run_id and copy.status is None]
    return [{"uri": c.uri, "run_id": c.run_id, "status": ended["status"], "time": ended["time"]} for c in left]
