"""Processes: who am I, collectives. The only file with collectives; each runs on every rank."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from chattrain import torch_compat
from chattrain.errors import RunFailed, UserError
from chattrain.parallel.failures import Watch
from chattrain.parallel.signals import stopped_at_once

log = logging.getLogger("chattrain")

NCCL_LONGER = timedelta(seconds=60)  # than gloo, whose time-out can say who is missing; NCCL's aborts the process


class Ranks:
    """The processes of a run. With one process, every collective is the identity. `watch`: where there are several.

    `moved_bytes`: what this rank has sent so far for gradients and weights, by the least that each collective needs
    (https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md).
    """

    def __init__(self, rank: int = 0, local_rank: int = 0, world_size: int = 1, watch: Watch | None = None):
        self.rank, self.local_rank, self.world_size, self.watch = rank, local_rank, world_size, watch
        self.timeout = timedelta(seconds=watch.timeout_s) + NCCL_LONGER if watch else None
        self.moved_bytes = 0.0
        self._meshes: dict[str, DeviceMesh] = {}

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def at(self, place: str) -> None:
        """This rank has come to a place such as `step 12`: what a collective that times out can say of it."""
        if self.watch:
            self.watch.at(place)

    def before_the_end(self, log_file: Path, last_words: Callable[[BaseException], Any]) -> None:
        """Where this rank has to be ended by its watch: the file for its stacks, and what is called with the reason."""
        if self.watch:
            self.watch.log_file, self.watch.last_words = log_file, last_words

    def failed(self) -> bool:
        """Has a rank failed, as far as this one has heard?"""
        return self.watch is not None and self.watch.failed.is_set()

    def report_failure(self, raised: BaseException, where: str | None = None) -> BaseException:
        """The error that the run ends with: that of the rank which failed first."""
        return self.watch.report_failure(raised, where) if self.watch else raised

    def sum(self, values: list[float]) -> list[float]:
        """Sums over ranks of a few numbers, in fp64."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def all_gather_interleaved(self, rows: list[list[float]]) -> list[list[float]]:
        """The rows of numbers of all ranks, as many from each: the first of rank 0, of rank 1, ..., the second of rank 0, ..."""
        width = len(rows[0])
        table = [0.0] * (len(rows) * self.world_size * width)
        for i, row in enumerate(rows):
            start = (i * self.world_size + self.rank) * width
            table[start : start + width] = row
        table = self.sum(table)
        return [table[i : i + width] for i in range(0, len(table), width)]

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, a small picklable object, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def run_on_rank0(self, do: Callable[[], Any]) -> Any:
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

    def mesh(self, device_type: str) -> DeviceMesh:
        """All ranks in a row, as FSDP wants to know them; made once."""
        if device_type not in self._meshes:
            self._meshes[device_type] = init_device_mesh(device_type, (self.world_size,))
        return self._meshes[device_type]

    def in_groups(self, size: int) -> Group:
        """This rank's group, of `size` ranks that follow one another, and the ranks of its place in all groups."""
        if size == self.world_size:
            return Group(self, size, None, None)
        lines = [list(range(place, self.world_size, size)) for place in range(size)]
        shard_group, _ = dist.new_subgroups(size, timeout=self.timeout)
        replicate_group, _ = dist.new_subgroups_by_enumeration(lines, timeout=self.timeout)
        return Group(self, size, shard_group, replicate_group)

    def to_main(self, source: int, tensors: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
        """On rank 0: named tensors of rank `source`, on the CPU. None on other ranks; all of them may call."""
        if self.is_main and source == 0:
            return {name: tensor.cpu() for name, tensor in tensors.items()}
        if self.rank == source:
            dist.send_object_list(
                [[(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()]], dst=0, device=torch.device("cpu")
            )
            for tensor in tensors.values():
                if tensor.numel():
                    dist.send(tensor.cpu().contiguous(), dst=0)
        if not self.is_main:
            return None
        header: list[Any] = [None]
        dist.recv_object_list(header, src=source, device=torch.device("cpu"))
        received = {name: torch.empty(shape, dtype=dtype) for name, shape, dtype in header[0]}
        for tensor in received.values():
            if tensor.numel():
                dist.recv(tensor, src=source)
        return received

    def exchange(self, pieces: list[Tensor], sizes: list[int]) -> list[Tensor]:
        """Flat pieces[r] goes to rank r; returns what each rank has sent here, of sizes[r] elements."""
        received = torch.empty(sum(sizes), dtype=pieces[0].dtype, device=pieces[0].device)
        sent = [piece.numel() for piece in pieces]
        dist.all_to_all_single(received, torch.cat(pieces), sizes, sent)
        self.moved_bytes += (sum(sent) - sent[self.rank]) * received.itemsize
        return list(received.split(sizes))

    def close(self) -> None:
        """Leave the process group; after a failure the end of this process does, as NCCL would wait for ranks that are gone."""
        if self.world_size > 1 and dist.is_initialized() and not self.failed():
            dist.destroy_process_group()
        if self.watch:
            self.watch.close()


@dataclass(frozen=True)
class Group:
    """`size` ranks that spread something over themselves, as other groups do with copies of it. Collectives come back at once,
    with what waits for them."""

    ranks: Ranks
    size: int
    shard_group: dist.ProcessGroup | None  # None: all ranks
    replicate_group: dist.ProcessGroup | None  # the ranks of this place in each group; None: there is one group

    @property
    def shard_rank(self) -> int:
        return self.ranks.rank % self.size

    def reduce_scatter(self, whole: Tensor) -> tuple[Tensor, Callable[[], None]]:
        """Flat (size x n) to the n elements of this place, summed over all ranks once waited for."""
        share = whole.new_empty(whole.numel() // self.size)
        work = torch_compat.reduce_scatter_single(share, whole, group=self.shard_group, async_op=True)
        self._count(share, self.size - 1)

        def wait() -> None:
            work.wait()
            if self.replicate_group is not None:
                dist.all_reduce(share, group=self.replicate_group)
                groups = self.ranks.world_size // self.size
                self._count(share, 2 * (groups - 1) / groups)

        return share, wait

    def all_gather(self, rows: Tensor) -> Callable[[], None]:
        """Row i of (size, n) from place i, once waited for; this place's row must be there already."""
        share = rows[self.shard_rank]
        work = torch_compat.all_gather_single(rows.view(-1), share, group=self.shard_group, async_op=True)
        self._count(share, self.size - 1)
        return work.wait

    def norm(self, norms: Tensor) -> Tensor:
        """The norm of all from each place's norm of its part: over all groups, so that none differs from another in a bit."""
        total = norms.square()
        dist.all_reduce(total)
        return (total / (self.ranks.world_size // self.size)).sqrt()

    def _count(self, share: Tensor, times: float) -> None:
        self.ranks.moved_bytes += share.nbytes * times


def join(timeout_s: int, cuda: bool) -> Ranks:
    """Join the process group that the launcher's environment variables name: gloo for CPU tensors, NCCL for CUDA's.

    Where the run uses CUDA, this process takes the GPU of its local rank.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if world_size == 1:
        return Ranks(rank, local_rank, world_size)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if cuda:
        torch.cuda.set_device(local_rank)
    timeout = timedelta(seconds=timeout_s)
    with stopped_at_once():
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
        watch = Watch(store, rank, world_size, timeout_s)
        try:
            dist.init_process_group(
                backend, store=dist.PrefixStore("group", store), rank=rank, world_size=world_size, timeout=timeout + NCCL_LONGER
            )
            dist.group.WORLD._get_backend(torch.device("cpu"))._set_default_timeout(timeout)
        except Exception as raised:
            raise watch.report_failure(raised) from None
    return Ranks(rank, local_rank, world_size, watch)
