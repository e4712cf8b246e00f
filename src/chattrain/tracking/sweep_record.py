"""sweep.json: the jobs of a sweep, in <run.root>/sweeps/<name>/. The launching process writes it; tables and reports read it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from chattrain.storage.files import replace_text

FILE = "sweep.json"


def shown(value: str, most: int = 32) -> str:
    """A value of the command line as tables show it; of a long one the end, where paths differ.

    >>> shown("0.3"), shown("/data/of/a/project/with/a/long/name/talk.jsonl")
    ('0.3', '…ect/with/a/long/name/talk.jsonl')
    """
    return value if len(value) <= most else f"…{value[1 - most :]}"


@dataclass
class JobRecord:
    """One job of a sweep."""

    num: int  # from 0, in the order of the sweeper
    stage: str
    values: dict[str, str]  # swept key or group -> value, as on the command line
    overrides: list[str]  # the whole command line of this job: `python -m chattrain <overrides>` runs it alone
    run_dir: str | None = None  # absolute; None before it is known
    status: str = "waiting"  # waiting, running, completed, failed, interrupted, skipped (its stage before failed), pruned
    objective: float | None = None  # last value of the sweep's objective
    error: str | None = None  # why it failed
    steps: int | None = None  # completed optimizer steps
    num_steps: int | None = None


@dataclass
class SweepRecord:
    """A sweep. `objective` and `direction` of a chain of stages are those of its last stage."""

    name: str
    command: list[str]  # as typed: sys.argv[1:]
    created_at: float  # seconds since the epoch
    swept: list[str] = field(default_factory=list)  # keys and groups with several values
    objective: str | None = None  # a metric, such as val/loss
    direction: str = "minimize"  # or maximize
    mlflow_run_id: str | None = None
    jobs: list[JobRecord] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Replace <folder>/sweep.json; a crash leaves the old file or the new one."""
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / FILE, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> SweepRecord:
        """Raises OSError or ValueError where the file is missing or damaged."""
        values = json.loads((folder / FILE).read_text())
        jobs = [JobRecord(**job) for job in values.pop("jobs")]
        return cls(**values, jobs=jobs)
