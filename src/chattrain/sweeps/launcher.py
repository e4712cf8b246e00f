"""The adapter between Hydra's interface for launchers (hydra_plugins/chattrain_local.py) and `schedule`.

Where all devices belong to one job at a time, jobs run in this process, one after another: imports, compiled code and memory
are reused. Otherwise each of several workers has its share of the devices, or of the cores.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, configure_log, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from chattrain.sweeps.callback import QuietReturn
from chattrain.sweeps.devices import environments
from chattrain.sweeps.launching import Bystander, current
from chattrain.sweeps.prune import rungs, survivors
from chattrain.sweeps.schedule import Done, Task, run_here, run_side_by_side
from chattrain.sweeps.worker import Pool


class Jobs:
    """All jobs of a sweeper, which launches them in one batch or in several."""

    def __init__(self, context: HydraContext, task_function: TaskFunction, config: DictConfig):
        self.context, self.task_function, self.config = context, task_function, config
        self.done: dict[int, Done] = {}  # of the batches before
        self.pool: Pool | None = None  # of jobs side by side

    def launch(
        self, overrides: Sequence[Sequence[str]], first: int, jobs: int | None, gpus_per_job: int | None
    ) -> list[JobReturn]:
        """Run a batch. `overrides`: of each job; `first`: the number of the first."""
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        if self.pool is None and (slots := environments(jobs, gpus_per_job)) is not None:
            self.pool = Pool(slots)
        configs = {num: self._compose(num, list(job)) for num, job in enumerate(overrides, start=first)}
        watcher = current() or Bystander()
        watcher.plan(configs)
        if self.pool is not None:
            watcher.at_end.callback(self.pool.close)
        with watcher.shown(live=self.pool is not None):
            if watcher.prune is None:
                done = self._run(configs, watcher)
            else:
                done = self._halve(configs, watcher, watcher.prune)
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        self.done |= done
        return [_returned(done[num], list(overrides[num - first])) for num in configs]

    def _run(self, configs: dict[int, DictConfig], watcher: Bystander) -> dict[int, Done]:
        """Run the jobs to their ends, in workers, or in this process where there are none."""
        tasks = [Task(num, self._call(config), watcher.waits_for(num)) for num, config in configs.items()]
        if self.pool is None:
            return run_here(tasks, watcher, self.done)
        return run_side_by_side(tasks, self.pool, watcher, self.done)

    def _halve(self, configs: dict[int, DictConfig], watcher: Bystander, keep: int) -> dict[int, Done]:
        """Run the jobs to the first rung, the best of them to the next, and so on."""
        done: dict[int, Done] = {}
        for fraction in rungs(len(configs), keep):
            for config in configs.values():
                config.train.stop_after = fraction if fraction < 1 else None
            done |= self._run(configs, watcher)
            objectives = {num: done[num].result.return_value for num in configs if not done[num].failed}
            if fraction < 1:
                best = survivors(objectives, keep, watcher.direction)
                for num in set(objectives) - set(best):
                    watcher.pruned(num)
                configs = {num: configs[num] for num in best}
        return done

    def _compose(self, num: int, overrides: list[str]) -> DictConfig:
        config = self.context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = num
        return config

    def _call(self, config: DictConfig) -> Callable[[], JobReturn]:
        """What runs a job, here or in a worker: Hydra keeps its globals in singletons, which a worker lacks."""
        state, context, task_function, here = Singleton.get_state(), self.context, self.task_function, os.getpid()

        def call() -> JobReturn:
            if os.getpid() != here:
                setup_globals()
                Singleton.set_state(state)
            HydraConfig.instance().set_config(config)
            returned = run_job(
                hydra_context=context,
                task_function=task_function,
                config=config,
                job_dir_key="hydra.sweep.dir",
                job_subdir_key="hydra.sweep.subdir",
            )
            if returned.status == JobStatus.FAILED:
                raise _JobFailed(returned)
            return returned

        return call


def _returned(done: Done, overrides: list[str]) -> JobReturn:
    """What Hydra's sweepers take. A job that was skipped, or whose process died, is a failed one."""
    if isinstance(done.error, _JobFailed):
        return done.error.returned
    if done.error is not None:
        return QuietReturn(overrides=overrides, status=JobStatus.FAILED, _return_value=done.error)
    return done.result


class _JobFailed(Exception):
    """Tells the scheduler that the task function raised; `returned` holds its error."""

    def __init__(self, returned: JobReturn):
        super().__init__(returned)
        self.returned = returned
