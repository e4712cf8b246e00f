"""What a launch runs: one job, or the jobs of a sweep.

begin     once, in the launching process: what is swept, the sweep's name, what is refused
run_job   the task function, here or in another process: trains, writes jobs/<num>.json, returns the job's objective
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from chattrain.commands.exit import report_error
from chattrain.config import Config, schema
from chattrain.config.compose import drop_other_alternatives, key_of
from chattrain.config.run import check_folder_name
from chattrain.config.sweep import SweepConfig
from chattrain.config.words import Command
from chattrain.errors import RunFailed, UserError
from chattrain.setup.job import Job, SweepMember, set_job
from chattrain.setup.names import finished_run, is_main_process, launch_name, run_folder, set_launch
from chattrain.sweeps.hydra_keys import (
    own_dirs,
    refuse_intervals,
    refuse_keys_without_effect,
    refuse_unread_lists,
    refuse_unused_sweep,
)
from chattrain.sweeps.naming import UNNAMED, parse, run_name, swept_values
from chattrain.sweeps.objective import direction_of, metrics_at, objective_of
from chattrain.sweeps.record import JobOutcome, read_record

ONLY_IN_SWEEPS = ("sweep.name", "sweep.jobs", "sweep.gpus_per_job", "sweep.prune", "sweep.direction")


@dataclass
class Sweep:
    """It is pickled with the task function, so that jobs in other processes know their sweep."""

    process: int = field(default_factory=os.getpid)  # the launching process
    launch: str = field(default_factory=launch_name)
    multirun: bool = False
    folder: Path | None = None  # <run.root>/sweeps/<name>; None: no sweep
    swept: list[str] = field(default_factory=list)  # keys and groups with several values
    fixed: set[str] = field(default_factory=set)  # keys with one value; any other that a job has was chosen by the sweeper
    stages: list[str] = field(default_factory=list)  # in order, where the stage is swept
    launcher: str | None = None  # a Hydra launcher other than ours: it runs jobs in other processes, perhaps on other hosts
    searches: bool = False  # a sweeper that needs the objective of each job
    objective: str | None = None
    direction: str = "minimize"
    mlflow_run_id: str | None = None
    command: str = "train"
    typed: list[str] = field(default_factory=list)  # the arguments

    def begin(self, config: DictConfig, multirun: bool, typed: list[str]) -> None:
        """Decide what can be decided before the first job. `typed`: the arguments. Raises UserError, with nothing written."""
        refuse_keys_without_effect(config.hydra)
        self.multirun, self.command, self.typed = multirun, str(config.command), typed
        given = [key for key in map(key_of, config.hydra.overrides.task) if key in ONLY_IN_SWEEPS]
        if not multirun:
            if given and not (self.command.endswith("report") and given == ["sweep.name"]):
                raise UserError(f"{given[0]} has no effect without -m; add -m, or leave it out")
            return refuse_unused_sweep(config.hydra, typed)
        settings = OmegaConf.to_object(config.sweep)
        assert isinstance(settings, SweepConfig)
        settings.check()
        params = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
        overrides = parse([*params, *config.hydra.overrides.task])
        self.swept = [key for key, override in overrides.items() if override.is_sweep_override()]
        self.fixed = set(overrides) - set(self.swept)
        self.stages = swept_values(overrides["stage"]) if "stage" in self.swept else []
        target = config.hydra.launcher._target_
        if not target.endswith(("chattrain_local.LocalLauncher", "basic_launcher.BasicLauncher")):
            self.launcher = config.hydra.runtime.choices["hydra/launcher"]
        self.searches = not config.hydra.sweeper._target_.endswith("BasicSweeper")
        refuse_unread_lists(config)
        if not self.searches:
            refuse_intervals(overrides)
        name = (config.sweep.name or config.run.name) if self.trains else None  # what only reads runs is no part of their sweep
        folder = self.folder = (Path(config.run.root).expanduser() / "sweeps" / (name or self.launch)).resolve()
        if config.sweep.name and (before := read_record(folder)):  # one value of what was swept is still swept
            self.swept += [key for key in before.swept if key in self.fixed and key not in UNNAMED]
            self.fixed -= set(self.swept)
        if self.trains and config.run.name is not None:
            check_folder_name(config.run.name, f"run.name={config.run.name}", "; runs go to run.root/<stage>/<run.name>")
        self.set_objective(config)
        self._refuse(config)
        if self.trains and not self.searches:
            self._refuse_duplicates(list(overrides.values()))

    def set_objective(self, config: DictConfig) -> None:
        """Take sweep.objective and sweep.direction of a composed configuration."""
        self.objective = config.sweep.objective
        self.direction = direction_of(self.objective, config.sweep.direction)

    def _refuse(self, config: DictConfig) -> None:
        """Raises UserError where `-m` does not go with the other keys or with torchrun."""
        if not (self.swept or self.searches):
            return
        if self.trains and (config.run.dir is not None or "run.dir" in self.swept):
            raise UserError(
                "run.dir names one folder, but -m starts several runs; use run.name, to which each run adds what was swept"
            )
        if "RANK" in os.environ:
            raise UserError(
                "-m starts one run after another, but torchrun starts one process group for all of them; leave torchrun out and "
                "use distributed.nproc=<number> with -m"
            )
        if self.launcher and (config.sweep.jobs or config.sweep.gpus_per_job):
            raise UserError(
                f"sweep.jobs and sweep.gpus_per_job are keys of hydra/launcher=local; hydra/launcher={self.launcher} has keys "
                "of its own, hydra.launcher.*"
            )
        if self.stages and self.launcher:
            raise UserError(
                f"stage is swept, so each run starts from the one before, but hydra/launcher={self.launcher} would "
                "start them at once; leave the launcher out"
            )
        if config.sweep.prune and (self.stages or self.launcher or self.searches):
            raise UserError(
                f"sweep.prune={config.sweep.prune} compares the jobs of one stage while they run, so it needs "
                "hydra/launcher=local, Hydra's basic sweeper and one stage"
            )
        at_once = config.hydra.sweeper.get("n_jobs")
        if self.searches and at_once == 1 and (config.sweep.jobs or 1) > 1:
            raise UserError(
                f"sweep.jobs={config.sweep.jobs}, but hydra.sweeper.n_jobs=1 gives one job at a time; add "
                f"hydra.sweeper.n_jobs={config.sweep.jobs}"
            )
        direction = config.hydra.sweeper.get("direction")
        if self.searches and isinstance(direction, str) and direction != self.direction:
            raise UserError(
                f"hydra.sweeper.direction={direction}, but sweep.objective={self.objective} is to be {self.direction}d; give "
                f"hydra.sweeper.direction={self.direction} or sweep.direction={direction}"
            )

    def _refuse_duplicates(self, overrides: list[Override]) -> None:
        """Raises UserError where two jobs would have the same folder."""
        (jobs,) = BasicSweeper.split_arguments(overrides, None)
        folders: set[tuple[str | None, ...]] = set()
        for job in jobs:
            values = self.values(job)
            folder = (*(values.get(key) for key in UNNAMED), run_name("", values))
            if folder in folders:
                given = " ".join(f"{key}={value}" for key, value in values.items())
                raise UserError(f"two jobs would share one folder: {given} is given twice; leave one out")
            folders.add(folder)

    @property
    def trains(self) -> bool:
        """Are the jobs trainings?"""
        return self.command.endswith("train")

    def values(self, overrides: list[str]) -> dict[str, str]:
        """The swept keys and groups of a job, with its values."""
        split = [override.lstrip("+").partition("=") for override in overrides]
        return {key: value for key, _, value in split if key in self.swept or key not in self.fixed}

    def name_of_run(self, given: str | None, values: dict[str, str]) -> str:
        """The name of a job's run. `given`: its run.name."""
        return run_name(given or (self.folder.name if self.folder else self.launch), values)

    def stage_before(self, stage: str) -> str | None:
        """Where stages are swept, the one before this one; None for the first, and where one stage is trained."""
        return self.stages[self.stages.index(stage) - 1] if stage in self.stages[1:] else None

    def run_job(self, composed: DictConfig) -> float | None:
        """The task function. Returns the job's objective; raises what its command raised, KeyboardInterrupt if interrupted."""
        hydra = HydraConfig.get()
        job = Job(
            overrides=list(hydra.overrides.task),
            choices={k: str(v) for k, v in hydra.runtime.choices.items() if v is not None and not k.startswith("hydra/")},
            typed=self.typed,
            config_dirs=own_dirs(hydra),
        )
        if not self.multirun:
            return self._execute(composed, job, JobOutcome(0, {}, job.overrides))
        set_launch(self.launch)  # another host need not inherit the environment
        outcome = JobOutcome(hydra.job.num, self.values(job.overrides), job.overrides)
        try:
            return self._execute(composed, job, outcome)
        except BaseException as error:
            if not (isinstance(error, KeyboardInterrupt) and outcome.status == "completed"):
                outcome.failed(error)
            if os.getpid() == self.process and isinstance(error, Exception):
                outcome.exit_status, outcome.reported = report_error(error), True
            raise
        finally:
            if is_main_process() and self.folder is not None:
                outcome.write(self.folder)

    def _execute(self, composed: DictConfig, job: Job, outcome: JobOutcome) -> float | None:
        """Run the command of one configuration, under the name and from the start that the sweep gives it."""
        drop_other_alternatives(composed, job.overrides)
        cfg = schema.from_hydra(composed)
        from chattrain.commands.execute import execute  # imports torch: a wrong value is answered before

        outcome.stage = cfg.stage
        if self.folder is not None:
            member = SweepMember(str(self.folder), outcome.num, outcome.values, self.mlflow_run_id)
            job = replace(job, sweep=member)
            if cfg.run.dir is None and cfg.command == Command.train:
                cfg.run.name = self.name_of_run(cfg.run.name, outcome.values)
                outcome.run_dir = str(run_folder(cfg.run.root, cfg.stage, cfg.run.name))
                self._start_from_stage_before(cfg)
        set_job(job)
        result = execute(cfg)
        outcome.succeeded(result)
        return self._objective(cfg, result, outcome) if cfg.command == Command.train else None

    def _objective(self, cfg: Config, summary: dict, outcome: JobOutcome) -> float | None:
        """What the job returns to the sweeper, of a run with this summary. Raises KeyboardInterrupt where it was interrupted."""
        last = cfg.train.last_step(summary["num_steps"])
        at_rung = last < summary["num_steps"] and summary["steps"] >= last
        if summary["status"] == "interrupted" and not at_rung:
            raise KeyboardInterrupt
        if self.multirun:
            metrics = metrics_at(summary, last) if at_rung else summary["metrics"]
            outcome.metric = cfg.sweep.objective
            given = any(key_of(override) == "sweep.objective" for override in outcome.overrides)
            outcome.objective = objective_of(cfg.sweep, metrics, required=self.searches or at_rung or given)
            if summary.get("stop_asked"):  # a signal during the last step: the run is complete, but no other begins
                raise KeyboardInterrupt
        return outcome.objective

    def _start_from_stage_before(self, cfg: Config) -> None:
        """Where stages are swept, start from the run of the stage before that has the same other values.

        The newest run of that stage may be another job's. Raises RunFailed where it is not complete.
        """
        before = self.stage_before(cfg.stage)
        if before is None:
            return
        start = finished_run(cfg.run.root, before, cfg.run.name)
        if start is None:
            raise RunFailed(f"the {before} run {cfg.run.name}, from which this {cfg.stage} run starts, is not complete")
        from chattrain.setup.start import start_at  # imports torch

        cfg.init = start_at(cfg.init, start)
