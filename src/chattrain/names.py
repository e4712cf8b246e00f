"""Names of runs: chosen once by the process that the user started, never from each process's clock."""

from __future__ import annotations

import os
import time

LAUNCH_VARIABLE = "CHATTRAIN_LAUNCH"  # inherited by the processes that a launch starts
TIME_FORMAT = "%Y%m%d-%H%M%S"


def set_launch_time() -> None:
    os.environ[LAUNCH_VARIABLE] = time.strftime(TIME_FORMAT)


def launch_time() -> str:
    """The time of the launch, or now where no command line started this process (a notebook)."""
    return os.environ.get(LAUNCH_VARIABLE) or time.strftime(TIME_FORMAT)


def sweep_suffix(job_overrides: list[str], swept: set[str]) -> str:
    """What tells the jobs of a sweep apart; the stage does so by its folder.

    >>> sweep_suffix(["stage=sft", "optimizer.lr_scale=0.3"], {"stage", "optimizer.lr_scale"})
    '-lr_scale=0.3'
    """
    parts = [o.lstrip("+").partition("=") for o in job_overrides]
    named = [f"{key.rpartition('.')[2]}={value}" for key, _, value in parts if key in swept and key != "stage"]
    return "".join(f"-{name}" for name in named).replace("/", "_").replace(" ", "")
