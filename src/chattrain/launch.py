"""Starting the processes of a run: how many, on which devices, and what becomes of them."""

from __future__ import annotations

import logging
import os
import socket
import tempfile
from collections.abc import Callable
from typing import Any

import torch

from chattrain.config import Device
from chattrain.errors import RunFailed, UserError

SAVE_S = 600  # seconds that ranks have, after a signal, to finish their step and save


class Stopped(Exception):
    """The launch was stopped by a signal."""


def started_by_launcher() -> bool:
    """Is this process a rank that torchrun, Slurm's torchrun or our own launch started?"""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def world_size(nproc: str, device: Device) -> int:
    """Processes a run will have: the launcher's number, or distributed.nproc (auto: the visible GPUs where the run may
    use them, else 1).

    Raises UserError where a launcher started another number than distributed.nproc asks for.
    """
    if started_by_launcher():
        started = int(os.environ["WORLD_SIZE"])
        if nproc != "auto" and int(nproc) != int(os.environ.get("LOCAL_WORLD_SIZE", started)):
            raise UserError(f"distributed.nproc={nproc}, but the launcher started "
                            f"{os.environ.get('LOCAL_WORLD_SIZE', started)} processes here; leave distributed.nproc out")
        return started
    if nproc != "auto":
        return int(nproc)
    return max(1, torch.cuda.device_count()) if device in (Device.auto, Device.cuda) else 1


def check_devices(device: torch.device, world_size: int) -> None:
    """Raises UserError where the ranks of this host do not have a device each."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if device.type == "cuda" and here > torch.cuda.device_count():
        raise UserError(f"{here} processes on this host and {torch.cuda.device_count()} visible GPUs; use "
                        f"distributed.nproc={torch.cuda.device_count()}, or train.device=cpu")
    if device.type == "mps" and world_size > 1:
        raise UserError(f"{world_size} processes, but MPS works with one; use distributed.nproc=1, or train.device=cpu")


def start(nproc: int, entry: Callable, *arguments: Any) -> Any:
    """Run entry(*arguments) in nproc processes of this host through torch's elastic launcher; rank 0's result.

    Raises what the first failing rank raised: UserError and RunFailed as they are, others as RunFailed. Raises Stopped
    when this process got Ctrl-C or SIGTERM, after the ranks have saved and ended.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    try:
        with tempfile.TemporaryDirectory(prefix="chattrain-") as scratch:
            config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=nproc, rdzv_backend="c10d",
                                  start_method="spawn", rdzv_endpoint=f"localhost:{_free_port()}",
                                  run_id=str(os.getpid()), max_restarts=0, monitor_interval=0.1,
                                  shutdown_timeout=SAVE_S,
                                  logs_specs=DefaultLogsSpecs(log_dir=scratch))
            return elastic_launch(config, entry)(*arguments)[0]
    except SignalException:
        raise Stopped from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        message = failure.message["message"] if isinstance(failure.message, dict) else str(failure.message)
        kind, _, text = message.partition(": ")
        if kind in ("UserError", "RunFailed"):
            raise (UserError if kind == "UserError" else RunFailed)(text) from None
        raise RunFailed(f"rank {rank} failed: {message}") from None


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]
