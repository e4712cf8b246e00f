"""The keys `sweep.*`: several jobs from one command line."""

from __future__ import annotations

from dataclasses import dataclass

from chattrain.config.run import check_folder_name
from chattrain.config.words import Direction
from chattrain.errors import UserError


@dataclass
class SweepConfig:
    name: str | None = None  # its folder is <run.root>/sweeps/<name>; null: run.name, else the time of the launch
    objective: str | None = None  # metric whose last value a job returns, such as val/loss; each stage sets its own
    direction: Direction = Direction.auto  # of objective; auto: maximize for an accuracy (*_acc), minimize for everything else
    jobs: int | None = None  # jobs side by side; null: as many as gpus_per_job leaves room for, and one on a CPU
    gpus_per_job: int | None = None  # GPUs of each job; null: all visible GPUs, or an equal share with sweep.jobs
    prune: int | None = None  # successive halving: of the jobs at each rung the best 1/prune go on; null: all run to the end

    def check(self) -> None:
        for name, least in (("jobs", 1), ("gpus_per_job", 1), ("prune", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"sweep.{name}={value} must be {least} or more")
        if self.name is not None:
            check_folder_name(self.name, f"sweep.name={self.name}")
