"""Processes: who am I, collectives. The only file with collectives; each runs on every rank."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from chattrain.errors import RunFailed, UserError

log = logging.getLogger("chattrain")


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
