"""Processes: who am I, collectives, launch. The only file with collectives; each runs on every rank."""

from __future__ import annotations

import logging
import os
import socket
import tempfile
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from chattrain.config import Device
from chattrain.errors import RunFailed, UserError

log = logging.getLogger("chattrain")


SAVE_S = 600  # seconds that ranks have, after a signal, to finish their step and save


class Stopped(Exception):
    """The launch was stopped by a signal."""


class Ranks:
    """The processes of a run. With one process, every collective is the identity."""

    def __init__(self, rank: int = 0, local_rank: int = 0, world_size: int = 1):
        self.rank, self.local_rank, self.world_size = rank, local_rank, world_size

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Sums over ranks of a few numbers, in fp64."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace every gradient by its sum over ranks, in one message."""
        if self.world_size == 1:
            return
        grads = [p.grad for p in parameters]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        for grad, summed in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(summed.view_as(grad))

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, a small picklable object, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def first(self, do: Callable[[], Any]) -> Any:
        """What `do` gives on rank 0, on every rank; where it raises, every rank raises the same."""
        if self.world_size == 1:
            return do()
        result, error = None, None
        if self.is_main:
            try:
                result = do()
            except Exception as raised:  # handed to all ranks, so that none waits for a rank that has left
                error = raised
                if not isinstance(raised, UserError | RunFailed):  # which may not survive the journey
                    log.exception("rank 0 failed")
                    error = RunFailed(f"{type(raised).__name__}: {raised}")
        result, error = self.broadcast((result, error))
        if error is not None:
            raise error
        return result

    def close(self) -> None:
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def started_by_launcher() -> bool:
    """Is this process a rank that torchrun, Slurm's torchrun or our own launch started?"""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def join(timeout_s: int, cuda: bool) -> Ranks:
    """Join the process group that the launcher's environment variables name: gloo for CPU tensors, NCCL for CUDA's.

    Where the run uses CUDA, this process takes the GPU of its local rank.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if world_size == 1:
        return Ranks(rank, local_rank, world_size)
    backend = "cpu:gloo"
    if cuda:
        torch.cuda.set_device(local_rank)
        backend += ",cuda:nccl"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    return Ranks(rank, local_rank, world_size)


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


def launch(nproc: int, entry: Callable, *arguments: Any) -> Any:
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
