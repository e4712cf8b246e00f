"""The cores of this host that a run may use. Imports no torch: it is asked before torch reads OMP_NUM_THREADS."""

from __future__ import annotations

import os

CORES_VARIABLE = "CHATTRAIN_CORES"  # set for the jobs of a sweep that share the host


def cores() -> int:
    """The share of this job in a sweep, else all cores of this process."""
    share = os.environ.get(CORES_VARIABLE)
    return int(share) if share else len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
