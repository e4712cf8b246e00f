"""The processes of a run, and their collectives. Only this file has collectives; each of them is called on every rank."""

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

# NCCL's time-out aborts the process, gloo's can say who is missing: NCCL waits longer, so that gloo's comes first.
NCCL_EXTRA_TIMEOUT = timedelta(seconds=60)


class Ranks:
    """The processes of a run. With one process, every collective is the identity. `watch` is None for one process.

    `moved_bytes` counts what this rank has sent for gradients and weights: the least that each collective must send
    (https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md).
    """

    def __init__(self, rank: int = 0, local_rank: int = 0, world_size: int = 1, watch: Watch | None = None):
        self.rank, self.local_rank, self.world_size, self.watch = rank, local_rank, world_size, watch
        self.timeout = timedelta(seconds=watch.timeout_s) + NCCL_EXTRA_TIMEOUT if watch else None
        self.moved_bytes = 0.0
        self._meshes: dict[str, DeviceMesh] = {}

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def at(self, place: str) -> None:
        """Publish how far this rank has come, such as `step 12`: a collective that times out then says who is missing."""
        if self.watch:
            self.watch.at(place)

    def on_forced_exit(self, log_file: Path, callback: Callable[[BaseException], Any]) -> None:
        """If the watch has to end this process, it first writes its stacks to log_file and calls callback(the reason)."""
        if self.watch:
            self.watch.log_file, self.watch.on_forced_exit = log_file, callback

    def failed(self) -> bool:
        """Has this rank heard that some rank has failed?"""
        return self.watch is not None and self.watch.failed.is_set()

    def report_failure(self, raised: BaseException, where: str | None = None) -> BaseException:
        """Tell the other ranks. Returns the error that the run ends with: that of the rank which failed first.

        `where`: what the rank was doing, such as `step 12`; None: what it last published with `at`.
        """
        return self.watch.report_failure(raised, where) if self.watch else raised

    def sum(self, values: list[float]) -> list[float]:
        """Each number summed over ranks, in fp64."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def all_gather_interleaved(self, rows: list[list[float]]) -> list[list[float]]:
        """The rows of all ranks, which have the same number of them: the first of rank 0, of rank 1, ..., the second of rank 0,
        ... Rows have the same length."""
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
        """Call `do` on rank 0 and return its result on every rank. If it raises, every rank raises the same error."""
        if self.world_size == 1:
            return do()
        result, error = None, None
        if self.is_main:
            try:
                result = do()
            except Exception as raised:  # sent to all ranks: they would wait for a rank that has left
                error = raised
                if not isinstance(raised, UserError | RunFailed):  # others may not be picklable
                    log.exception("rank 0 failed")
                    error = RunFailed(f"{type(raised).__name__}: {raised}")
        result, error = self.broadcast((result, error))
        if error is not None:
            raise error
        return result

    def mesh(self, device_type: str) -> DeviceMesh:
        """All ranks as a 1-D device mesh, for FSDP. Created once."""
        if device_type not in self._meshes:
            self._meshes[device_type] = init_device_mesh(device_type, (self.world_size,))
        return self._meshes[device_type]

    def in_groups(self, size: int) -> Group:
        """Divide the ranks into groups of `size` consecutive ranks; returns this rank's."""
        if size == self.world_size:
            return Group(self, size, None, None)
        replicas = [list(range(rank, self.world_size, size)) for rank in range(size)]
        shard_group, _ = dist.new_subgroups(size, timeout=self.timeout)
        replicate_group, _ = dist.new_subgroups_by_enumeration(replicas, timeout=self.timeout)
        assert isinstance(shard_group, dist.ProcessGroup) and isinstance(replicate_group, dist.ProcessGroup)
        return Group(self, size, shard_group, replicate_group)

    def send_to_rank0(self, source: int, tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """On rank 0: the named `tensors` of rank `source`, on the CPU. On other ranks: None. Every rank may call it."""
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

    def all_to_all(self, tensors: list[Tensor], sizes: list[int]) -> list[Tensor]:
        """Send the flat tensors[r] to rank r; returns what each rank r has sent here: flat, sizes[r] elements."""
        received = torch.empty(sum(sizes), dtype=tensors[0].dtype, device=tensors[0].device)
        sent_sizes = [tensor.numel() for tensor in tensors]
        dist.all_to_all_single(received, torch.cat(tensors), sizes, sent_sizes)
        self.moved_bytes += (sum(sent_sizes) - sent_sizes[self.rank]) * received.itemsize
        return list(received.split(sizes))

    def close(self) -> None:
        """Leave the process group. After a failure this is left to the exit of the process, as NCCL would wait for ranks that
        have already exited."""
        if self.world_size > 1 and dist.is_initialized() and not self.failed():
            dist.destroy_process_group()
        if self.watch:
            self.watch.close()


@dataclass(frozen=True)
class Group:
    """`size` ranks that shard something among themselves; each other group of the run holds a copy.

    Collectives are asynchronous: they return at once, with a function that waits for them.
    """

    ranks: Ranks
    size: int
    shard_group: dist.ProcessGroup | None  # the ranks of this group; None: all ranks
    replicate_group: dist.ProcessGroup | None  # the ranks with the same shard_rank in all groups; None: there is one group

    @property
    def shard_rank(self) -> int:
        """This rank's number in its group."""
        return self.ranks.rank % self.size

    def reduce_scatter(self, whole: Tensor) -> tuple[Tensor, Callable[[], None]]:
        """Flat (size x n) to this rank's shard (n), summed over all ranks of the run after the wait."""
        shard = whole.new_empty(whole.numel() // self.size)
        work = torch_compat.reduce_scatter_single(shard, whole, group=self.shard_group, async_op=True)
        assert work is not None  # it is asynchronous
        self._count_sent(shard, self.size - 1)

        def wait() -> None:
            work.wait()
            if self.replicate_group is not None:
                dist.all_reduce(shard, group=self.replicate_group)
                num_groups = self.ranks.world_size // self.size
                self._count_sent(shard, 2 * (num_groups - 1) / num_groups)

        return shard, wait

    def all_gather(self, rows: Tensor) -> Callable[[], object]:
        """Fill in the rows (size, n), row i from shard_rank i, by the end of the wait. This rank's row is filled in already."""
        own = rows[self.shard_rank]
        work = torch_compat.all_gather_single(rows.view(-1), own, group=self.shard_group, async_op=True)
        assert work is not None  # it is asynchronous
        self._count_sent(own, self.size - 1)
        return work.wait

    def norm(self, norms: Tensor) -> Tensor:
        """The norm of the whole from the norm of each shard; also of several at once. Reduced over all ranks of the run, not over
        one group, so that all ranks get the same bits."""
        total = norms.square()
        dist.all_reduce(total)
        return (total / (self.ranks.world_size // self.size)).sqrt()

    def _count_sent(self, shard: Tensor, times: float) -> None:
        self.ranks.moved_bytes += shard.nbytes * times


def join(timeout_s: int, cuda: bool) -> Ranks:
    """Join the process group that the launcher's environment variables name: gloo for CPU tensors, NCCL for CUDA tensors.

    `timeout_s`: seconds that a rank waits for the others. With `cuda`, this process uses the GPU of its local rank.
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
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))  # pyright: ignore[reportPrivateImportUsage]
        watch = Watch(store, rank, world_size, timeout_s)
        try:
            dist.init_process_group(
                backend,
                store=dist.PrefixStore("group", store),  # pyright: ignore[reportPrivateImportUsage]
                rank=rank,
                world_size=world_size,
                timeout=timeout + NCCL_EXTRA_TIMEOUT,
            )
            assert dist.group.WORLD is not None
            dist.group.WORLD._get_backend(torch.device("cpu"))._set_default_timeout(timeout)  # of gloo
        except Exception as raised:
            raise watch.report_failure(raised) from None
    return Ranks(rank, local_rank, world_size, watch)
