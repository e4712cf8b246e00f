"""What the tests of sweeps share."""

from __future__ import annotations

from pathlib import Path

from chattrain.tracking.sweep_record import JobRecord, SweepRecord
from tests.helpers import TINY

SFT = ["stage=sft", *TINY, "init.from=scratch", "train.max_steps=2", "eval.every=1"]  # two steps, measured after each


def jobs(name: str) -> list[JobRecord]:
    """The jobs of a sweep in the current folder."""
    return SweepRecord.read(Path("runs/sweeps") / name).jobs
