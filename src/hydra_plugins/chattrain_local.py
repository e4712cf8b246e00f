"""`hydra/launcher=local`: runs the jobs of a sweep on this host.

Hydra finds its plugins in the package hydra_plugins and imports all of them in every program, so what this one does is in
chattrain.sweeps.launcher, which is imported when a sweep starts. Annotations are no texts here: Hydra runs a plugin before it is
in sys.modules, where dataclasses would look them up.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class LocalLauncherConf:
    _target_: str = "hydra_plugins.chattrain_local.LocalLauncher"
    jobs: Any = "${oc.select:sweep.jobs,null}"
    gpus_per_job: Any = "${oc.select:sweep.gpus_per_job,null}"


class LocalLauncher(Launcher):
    """Runs the jobs of a sweep on this host. `jobs`: side by side; `gpus_per_job`: GPUs of each. None: one job at a time has
    all of the host."""

    def __init__(self, jobs: int | None = None, gpus_per_job: int | None = None) -> None:
        self.jobs, self.gpus_per_job = jobs, gpus_per_job

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from chattrain.sweeps.launcher import Jobs

        self.all_jobs = Jobs(hydra_context, task_function, config)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs and return how each ended, in their order. A job that failed does not end the others."""
        return self.all_jobs.launch(job_overrides, initial_job_idx, self.jobs, self.gpus_per_job)


ConfigStore.instance().store(group="hydra/launcher", name="local", node=LocalLauncherConf, provider="chattrain")
