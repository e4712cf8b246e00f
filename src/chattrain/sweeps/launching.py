"""The launching process's side of a sweep: its record in sweep.json, what is shown while it runs, its exit status, its table."""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from omegaconf import DictConfig

from chattrain.commands.exit import report_error
from chattrain.config import Config
from chattrain.errors import RunFailed, UserError
from chattrain.redact import redact, redact_tree
from chattrain.setup.job import Job, set_job
from chattrain.setup.mlflow_target import mlflow_target
from chattrain.setup.names import is_main_process, run_folder
from chattrain.sweeps.hydra_keys import own_dirs
from chattrain.sweeps.overrides import command_alone, shared_settings
from chattrain.sweeps.record import JobOutcome, read_outcome, read_outcomes, read_record
from chattrain.sweeps.schedule import Done, Skipped
from chattrain.sweeps.sweep import Sweep
from chattrain.tracking.sweep_record import JobRecord, SweepRecord

if TYPE_CHECKING:
    from chattrain.sweeps.live import LiveTable
    from chattrain.tracking.mlflow_sink import MLflowSink

_current: Launch | None = None


def current() -> Launch | None:
    """The launch of this process; None where Hydra was started by something else."""
    return _current


class Bystander:
    """Watches jobs that are no trainings, such as those of Hydra's own tests: does nothing."""

    prune: int | None = None  # sweep.prune
    direction = "minimize"  # of the jobs' results

    def __init__(self):
        self.at_end = ExitStack()  # what to close after the launch

    def plan(self, configs: dict[int, DictConfig]) -> None: ...

    def waits_for(self, num: int) -> list[int]:
        return []

    def shown(self, live: bool):
        return nullcontext()

    def started(self, num: int) -> None: ...

    def ended(self, num: int, done: Done) -> None: ...

    def pruned(self, num: int) -> None: ...

    def poll(self) -> None: ...


class Launch(Bystander):
    """One command line. `status`: the exit status, the highest of all jobs."""

    def __init__(self, command: list[str]):
        super().__init__()
        self.sweep, self.command, self.status = Sweep(), command, 0
        self.record: SweepRecord | None = None
        self.kept: list[JobRecord] = []  # of earlier launches of the same sweep
        self.jobs: dict[int, JobRecord] = {}
        self.results: list[dict] = []  # what the jobs' commands returned
        self.table: LiveTable | None = None
        self.mlflow: MLflowSink | None = None  # the sweep's run there
        self.started_at: dict[int, float] = {}  # of running jobs, seconds since the epoch

    @contextmanager
    def workspace(self) -> Iterator[None]:
        """This launch is the current one, and has a folder that Hydra writes to. The folder is removed after the launch: a sweep
        has sweep.json, a run its config.yaml."""
        global _current
        _current = self
        with tempfile.TemporaryDirectory(prefix="chattrain-") as scratch, self.at_end:
            os.environ["CHATTRAIN_SCRATCH"] = scratch
            yield
        _current = None

    # --- called by Hydra's callback ----------------------------------------------------------------------------------

    def begin(self, config: DictConfig, multirun: bool) -> None:
        """Before the first job. Raises UserError; nothing is written before."""
        self.sweep.begin(config, multirun, self.command)
        set_job(Job(config_dirs=own_dirs(config.hydra)))  # for what this process itself reads: the winner of a sweep
        if self.sweep.launcher and self.sweep.folder is not None:  # it tells us nothing of its jobs before they run
            self._take_folder(self.sweep.folder)
            os.environ["CHATTRAIN_SCRATCH"] = str(self.sweep.folder)  # Hydra's own files of the sweep; other hosts read them
            self._open_parent(config)

    def _take_folder(self, folder: Path) -> None:
        """Make the sweep's folder this launch's own. Raises UserError where another process runs the sweep."""
        folder.mkdir(parents=True, exist_ok=True)
        lock = self.at_end.enter_context((folder / ".lock").open("w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process runs the sweep {folder.name}; wait for it, or use another sweep.name") from None
        shutil.rmtree(folder / "jobs", ignore_errors=True)  # of an earlier launch of this sweep

    def _open_parent(self, config: DictConfig) -> None:
        """Make the sweep's run in MLflow, under which those of its jobs are nested, or go on with that of an earlier launch."""
        folder = self.sweep.folder
        if folder is None or not config.tracking.mlflow or not self.sweep.trains or not is_main_process():
            return
        from chattrain.tracking.mlflow_parent import open_parent  # imports mlflow, for seconds

        before = read_record(folder)
        uri, experiment = mlflow_target(cast(Config, config))  # the same keys
        run_id = (before.mlflow_run_id if before else None) or os.environ.get("MLFLOW_RUN_ID")
        self.mlflow = open_parent(folder, uri, experiment, self.command, self.sweep.swept, run_id)
        self.sweep.mlflow_run_id = self.mlflow.run_id

    # --- called by our launcher --------------------------------------------------------------------------------------

    def plan(self, configs: dict[int, DictConfig]) -> None:
        """Give each job of a batch its folder and its line in sweep.json. Raises UserError where two would share a folder."""
        planned: dict[int, JobRecord] = {}
        for num, config in configs.items():
            overrides = list(config.hydra.overrides.task)
            values = self.sweep.values(overrides)
            record = JobRecord(num, config.stage, values, redact_tree(command_alone(self.command, overrides)))
            if self.sweep.trains:
                name = self.sweep.name_of_run(config.run.name, values)
                record.run_dir = config.run.dir or str(run_folder(config.run.root, config.stage, name))
                if config.run.dir is not None and len(configs) > 1:
                    raise UserError("run.dir names one folder, but this sweep has several jobs; use run.name or sweep.name")
                twin = next((job for job in planned.values() if job.run_dir == record.run_dir), None)
                if twin and not self.sweep.searches:
                    raise UserError(f"jobs {twin.num + 1} and {num + 1} would share {record.run_dir}; make their names differ")
                if before := self.sweep.stage_before(config.stage):
                    record.overrides += [f"init.from={run_folder(config.run.root, before, name)}"]
            planned[num] = record
            self.prune = config.sweep.prune
            self.sweep.set_objective(config)  # of the last job: where stages are swept, that of the last stage
        if self.record is None and self.sweep.folder is not None:
            self._take_folder(self.sweep.folder)
            self._open_parent(list(configs.values())[-1])
        self.direction = self.sweep.direction
        self._open_record(planned)

    def _open_record(self, planned: dict[int, JobRecord]) -> None:
        """Add jobs to the record; the first time, make it, with the completed jobs of earlier launches of this sweep."""
        folder = self.sweep.folder
        assert folder is not None
        if self.record is None:
            before = read_record(folder)
            self.record = SweepRecord(folder.name, redact_tree(self.command), before.created_at if before else time.time())
            self.record.mlflow_run_id = self.sweep.mlflow_run_id
            self.kept = [job for job in before.jobs if job.status == "completed"] if before else []
        self.jobs |= planned
        folders = {job.run_dir for job in self.jobs.values()}
        swept = {key for job in [*self.jobs.values(), *self.kept] for key in job.values}
        settings = {shared_settings(job, swept) for job in self.jobs.values()}
        others = [job for job in self.kept if job.run_dir not in folders]
        self.kept = [job for job in others if shared_settings(job, swept) in settings]
        if len(self.kept) < len(others):
            left_out = len(others) - len(self.kept)
            print(
                f"{left_out} earlier jobs of the sweep {folder.name} had other settings: its table leaves them out",
                file=sys.stderr,
            )
        self.record.swept = sorted({key for job in self.jobs.values() for key in job.values})
        self.record.objective, self.record.direction = self.sweep.objective, self.sweep.direction
        self._write()

    def waits_for(self, num: int) -> list[int]:
        """The job of the stage before with the same other values, and any job before that has the same folder."""
        job = self.jobs[num]
        same_folder = [n for n, other in self.jobs.items() if n < num and job.run_dir and other.run_dir == job.run_dir]
        wanted = {**job.values, "stage": self.sweep.stage_before(job.stage)}
        return same_folder + [n for n, other in self.jobs.items() if other.values == wanted]

    @contextmanager
    def shown(self, live: bool) -> Iterator[None]:
        """Show the jobs while they run: `live` as a table, else each run shows its own progress."""
        from chattrain.sweeps.live import LiveTable  # imports rich

        self.table = LiveTable(self.jobs, self.started_at) if live else None
        try:
            with self.table or nullcontext():
                yield
        finally:
            self.table = None
            self._write()

    def started(self, num: int) -> None:
        self.jobs[num].status, self.started_at[num] = "running", time.time()
        self._write()
        label = JobOutcome(num, self.jobs[num].values, []).label
        if self.table:
            self.table.say(f"{label} started")
        elif len(self.jobs) > 1:
            print(f"\n{label} of {len(self.jobs)}", file=sys.stderr, flush=True)

    def ended(self, num: int, done: Done) -> None:
        outcome = read_outcome(self.sweep.folder, num) if self.sweep.folder else None
        if outcome is None:  # skipped, or its process died
            outcome = JobOutcome(num, self.jobs[num].values, self.jobs[num].overrides)
            outcome.failed(done.error or RunFailed("it wrote no outcome"))
            if isinstance(done.error, Skipped):
                outcome.status = "skipped"
        self._note(outcome)
        self._write()
        if self.table and outcome.status == "completed":
            value = "" if outcome.objective is None else f": {outcome.metric} {outcome.objective:.5g}"
            self.table.say(f"{outcome.label} {outcome.status}{value}")

    def pruned(self, num: int) -> None:
        self.jobs[num].status = "pruned"
        self._write()
        if self.table:
            self.table.say(f"{JobOutcome(num, self.jobs[num].values, []).label} pruned")

    def poll(self) -> None:
        if self.table:
            self.table.refresh()

    # --- after the jobs ----------------------------------------------------------------------------------------------

    def collect(self) -> None:
        """Note how jobs ended that ran in another launcher's processes, or that were interrupted."""
        folder = self.sweep.folder
        if folder is None or not is_main_process():
            return
        outcomes = read_outcomes(folder)
        self.results = [outcome.result for outcome in outcomes]
        new = [outcome for outcome in outcomes if outcome.num not in self.jobs or self.jobs[outcome.num].status == "running"]
        if new:
            jobs = [JobRecord(o.num, o.stage, o.values, o.overrides, o.run_dir) for o in new]
            self._open_record({job.num: job for job in jobs})
            for outcome in new:
                self._note(outcome)
            self._write()
        shutil.rmtree(folder / "jobs", ignore_errors=True)

    def show(self) -> None:
        """Print what a sweep found, or the stages of a chain side by side; nothing without `-m`."""
        folder, complete = self.sweep.folder, self.status != 130 and self.sweep.launcher is None
        if self.record is None or not self.record.jobs or folder is None or not is_main_process():
            return
        from chattrain.sweeps.results import show_results  # imports rich and numpy

        try:
            show_results(self.record, folder, self.results, self.sweep.trains, complete)
        finally:
            self._close_parent(folder)
            if not self.sweep.trains:
                shutil.rmtree(folder, ignore_errors=True)  # what only reads runs leaves no sweep

    def _close_parent(self, folder: Path) -> None:
        """End the sweep's run in MLflow with its result and its files."""
        if self.mlflow is None:
            return
        from chattrain.sweeps.results import read_answer

        statuses = {job.status for job in self.jobs.values()}
        status = "KILLED" if self.status == 130 else "FAILED" if "failed" in statuses else "FINISHED"
        self.mlflow.close(status, metrics=read_answer(folder))

    def resume_with(self) -> str:
        """What the user types after Ctrl-C, to go on with a sweep."""
        folder = self.sweep.folder
        if self.record is None or folder is None or not self.sweep.trains or not self.sweep.swept:
            return ""
        named = any(argument.startswith(("sweep.name=", "run.name=")) for argument in self.command)
        return "; the same command goes on" if named else f"; the same command with sweep.name={folder.name} goes on"

    def explains(self, error: BaseException) -> bool:
        """Is this the error of a job, which was printed when the job failed? Hydra's sweepers raise it again."""
        return redact(str(error)) in {job.error for job in self.jobs.values() if job.status in ("failed", "skipped")}

    def _note(self, outcome: JobOutcome) -> None:
        """Write the outcome into the job's record, print its error unless that was done, and raise the exit status."""
        job = self.jobs[outcome.num]
        job.status, job.objective, job.error = outcome.status, outcome.objective, outcome.error
        job.steps, job.num_steps = (outcome.result.get(key) for key in ("steps", "num_steps"))
        job.run_dir = outcome.run_dir or job.run_dir
        self.status = max(self.status, outcome.exit_status)
        if outcome.error and not outcome.reported and outcome.status != "skipped":
            report_error(RunFailed(f"{outcome.label}: {outcome.error}"))

    def _write(self) -> None:
        if self.record is not None and self.sweep.folder is not None and is_main_process():
            self.record.jobs = [self.jobs[num] for num in sorted(self.jobs)]
            for num, job in enumerate(self.kept, start=max(self.jobs, default=-1) + 1):
                self.record.jobs.append(replace(job, num=num))
            if self.sweep.trains:
                self.record.write(self.sweep.folder)
