"""What a process knows of the command line that it runs for: overrides, groups, and the sweep that the job belongs to.

It stands in an environment variable, so that the ranks of a run inherit it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

JOB_VARIABLE = "CHATTRAIN_JOB"


@dataclass(frozen=True)
class SweepMember:
    """A job's place in its sweep."""

    folder: str  # <run.root>/sweeps/<name>, absolute
    num: int  # of the job, from 0
    values: dict[str, str]  # swept key or group -> this job's value, as on the command line
    mlflow_run_id: str | None = None  # the sweep's run in MLflow, the parent of the job's

    @property
    def name(self) -> str:
        return Path(self.folder).name


@dataclass(frozen=True)
class Job:
    """One composed command line."""

    overrides: list[str] = field(default_factory=list)  # as typed, such as `stage=sft`; of a sweep: with this job's values
    choices: dict[str, str] = field(default_factory=dict)  # group -> choice, such as model -> tiny
    sweep: SweepMember | None = None
    typed: list[str] | None = None  # the arguments of the command line, of all jobs; None: chattrain.run was called
    config_dirs: list[str] = field(default_factory=list)  # the user's own folders of choices: --config-dir, hydra.searchpath


def set_job(job: Job) -> None:
    """This process, and those that it starts, work on `job` from here on."""
    os.environ[JOB_VARIABLE] = json.dumps(asdict(job))


@contextmanager
def as_job(job: Job) -> Iterator[None]:
    """The same until the end of the context."""
    before = os.environ.get(JOB_VARIABLE)
    set_job(job)
    try:
        yield
    finally:
        if before is None:
            del os.environ[JOB_VARIABLE]
        else:
            os.environ[JOB_VARIABLE] = before


def current_job() -> Job:
    """The job of this process; an empty one where no command line set it, as in a notebook."""
    text = os.environ.get(JOB_VARIABLE)
    if not text:
        return Job()
    values = json.loads(text)
    sweep = values.pop("sweep")
    return Job(**values, sweep=SweepMember(**sweep) if sweep else None)
