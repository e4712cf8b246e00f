"""How a job of a sweep ended: jobs/<num>.json in the sweep's folder, written by the process that ran the job."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from chattrain.errors import UserError
from chattrain.redact import redact, redact_tree
from chattrain.storage.files import replace_text
from chattrain.tracking.sweep_record import FILE, SweepRecord, shown


@dataclass
class JobOutcome:
    """One job of this launch."""

    num: int
    values: dict[str, str]  # swept key or group -> value
    overrides: list[str]
    stage: str = ""
    run_dir: str | None = None
    status: str = "failed"  # completed, failed, interrupted
    metric: str | None = None  # the objective's name
    objective: float | None = None
    error: str | None = None
    exit_status: int = 0
    reported: bool = False  # has the error been printed?
    result: dict[str, Any] = field(default_factory=dict)  # what the command returned; for train: the summary

    def succeeded(self, result: dict[str, Any]) -> None:
        self.result = result
        self.status = result.get("status", "completed")
        self.run_dir = result.get("run_dir", self.run_dir)

    def failed(self, error: BaseException) -> None:
        interrupted = isinstance(error, KeyboardInterrupt)
        self.status = "interrupted" if interrupted else "failed"
        self.exit_status = 130 if interrupted else getattr(error, "exit_status", 1)
        self.error = None if interrupted else redact(str(error)) or type(error).__name__

    @property
    def label(self) -> str:
        """`job 4 (optimizer.lr_scale=0.3)`, counted from 1."""
        values = " ".join(f"{key}={shown(value)}" for key, value in self.values.items())
        return f"job {self.num + 1} ({values})" if values else f"job {self.num + 1}"

    def write(self, folder: Path) -> None:
        (folder / "jobs").mkdir(parents=True, exist_ok=True)
        replace_text(folder / "jobs" / f"{self.num}.json", json.dumps(redact_tree(asdict(self)), default=str))


def read_outcome(folder: Path, num: int) -> JobOutcome | None:
    """None where the job has written none: it has not ended, or its process died."""
    file = folder / "jobs" / f"{num}.json"
    return JobOutcome(**json.loads(file.read_text())) if file.is_file() else None


def read_outcomes(folder: Path) -> list[JobOutcome]:
    """Of all jobs of this launch that have ended, by number."""
    nums = sorted(int(file.stem) for file in (folder / "jobs").glob("*.json") if file.stem.isdigit())
    return [outcome for num in nums if (outcome := read_outcome(folder, num)) is not None]


def read_record(folder: Path) -> SweepRecord | None:
    """The record of a sweep, None where it has none. Raises UserError for one that cannot be read."""
    try:
        return SweepRecord.read(folder) if (folder / FILE).is_file() else None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder / FILE} cannot be read: {error}; remove it, or use another sweep.name") from error
