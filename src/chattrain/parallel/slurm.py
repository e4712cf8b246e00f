"""Slurm's environment variables: which nodes train together, and the endpoint of their rendezvous."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from chattrain.errors import UserError


@dataclass(frozen=True)
class Nodes:
    """The nodes of a job, with one task on each. `endpoint`: host:port of torch's rendezvous."""

    count: int
    endpoint: str
    run_id: str


def nodes(environ: Mapping[str, str] = os.environ) -> Nodes | None:
    """The nodes that this task of srun trains on; None for a single task, and without Slurm.

    Raises UserError if several tasks would each train a run of their own, or if nodes would stay unused.

    >>> nodes({"SLURM_JOB_ID": "70", "SLURM_STEP_ID": "0", "SLURM_NNODES": "2", "SLURM_NTASKS": "2",
    ...        "SLURM_JOB_NODELIST": "gpu[07-08]"})
    Nodes(count=2, endpoint='gpu07:20070', run_id='70.0')
    """
    count, tasks = (int(environ.get(name, 1)) for name in ("SLURM_NNODES", "SLURM_NTASKS"))
    step = environ.get("SLURM_STEP_ID")
    if count > 1 and step is None:
        raise UserError(
            f"the Slurm job has {count} nodes, but this process is no task of srun, so the run would use one of "
            "them; put srun with --ntasks-per-node=1 before the command, or --nodes=1 for a run on one"
        )
    if step is None or tasks == 1:
        return None
    if tasks != count:
        raise UserError(
            f"srun started {tasks} tasks on {count} node{'s' if count > 1 else ''}, and each would train a run of "
            "its own; use srun --ntasks-per-node=1 (each task starts a process a GPU: distributed.nproc=auto), "
            "or torchrun"
        )
    job = environ["SLURM_JOB_ID"]
    port = 20_000 + (int(job) + 1_009 * int(step)) % 10_000  # steps of a job may run at the same time
    hosts = environ.get("SLURM_STEP_NODELIST", environ["SLURM_JOB_NODELIST"])
    return Nodes(count, f"{first_host(hosts)}:{port}", f"{job}.{step}")


def first_host(nodelist: str) -> str:
    """The first host of Slurm's compressed host list.

    >>> first_host("node[01-04,7],gpu9"), first_host("gpu9,node[1-2]"), first_host("rack[2-3]-n[08,9]")
    ('node01', 'gpu9', 'rack2-n08')
    """
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodelist)
    assert first is not None, f"{nodelist!r} names no host"
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first.group())
