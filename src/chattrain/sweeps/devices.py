"""The share of this host that each worker of a sweep gets: GPUs, or cores."""

from __future__ import annotations

import os

from chattrain.errors import UserError
from chattrain.parallel.cores import CORES_VARIABLE, cores
from chattrain.tracking.console import QUIET_VARIABLE


def environments(jobs: int | None, gpus_per_job: int | None) -> list[dict[str, str]] | None:
    """The environment variables of each worker; None where one job at a time has the whole host.

    `jobs`, `gpus_per_job`: sweep.jobs and sweep.gpus_per_job. Raises UserError where the host has too few GPUs.
    """
    if gpus_per_job is None and jobs in (None, 1):
        return None
    gpus = _visible_gpus()
    if gpus_per_job is not None and gpus_per_job > len(gpus):
        raise UserError(f"sweep.gpus_per_job={gpus_per_job}, but {len(gpus)} GPUs are visible; on a CPU use sweep.jobs")
    if not gpus:
        assert jobs is not None
        return [_cores(jobs)] * jobs
    each = gpus_per_job or len(gpus) // (jobs or 1)
    most = len(gpus) // max(1, each)
    if each == 0 or (jobs or 1) > most:
        raise UserError(
            f"sweep.jobs={jobs} with sweep.gpus_per_job={gpus_per_job or 1} need {(jobs or 1) * (gpus_per_job or 1)} GPUs, and "
            f"{len(gpus)} are visible; try sweep.jobs={most or len(gpus)}"
        )
    count = jobs or most
    if count == 1 and each == len(gpus):
        return None
    return [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[i * each : (i + 1) * each]), **_cores(count)} for i in range(count)]


def _cores(jobs: int) -> dict[str, str]:
    """An equal share of the cores, unless the user has set the number of threads; parallel/launch.py divides it between ranks."""
    share = str(max(1, cores() // jobs))
    return {CORES_VARIABLE: share, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", share), QUIET_VARIABLE: "1"}


def _visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch  # seconds; only a sweep with jobs side by side comes here

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return given.split(",")[:count] if given else [str(i) for i in range(count)]
