"""Rank 0 of a run whose other ranks do not exist: collectives return at once, with tensors of the right size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh

from chattrain.parallel.ranks import Group, Ranks


class FakeRanks(Ranks):
    """Rank 0; every other rank is assumed to hold the same values. copies: do collectives work on a copy, as gloo's do?"""

    def __init__(self, world_size: int, copies: bool):
        super().__init__(0, 0, world_size)
        self.copies = copies

    def sum(self, values: list[float]) -> list[float]:
        return [value * self.world_size for value in values]

    def mesh(self, device_type: str) -> DeviceMesh:
        with unset_fake_temporarily():  # a DeviceMesh reads the values of a tensor of ranks
            return super().mesh(device_type)

    def in_groups(self, size: int) -> Group:
        return FakeGroup(**vars(super().in_groups(size)), copies=self.copies)


@dataclass(frozen=True)
class FakeGroup(Group):
    """Its reduce-scatters keep their input alive until waited for, as asynchronous ones do, and with copies gloo's copy of it."""

    copies: bool

    def reduce_scatter(self, whole: Tensor) -> tuple[Tensor, Callable[[], None]]:
        shard, wait = super().reduce_scatter(whole)
        held = [whole, *([whole.clone()] if self.copies else [])]

        def wait_and_release() -> None:
            wait()
            held.clear()

        return shard, wait_and_release


@contextmanager
def fake_ranks(world_size: int, copies: bool) -> Iterator[Ranks]:
    """Ranks of a process group of torch's "fake" backend. Raises RuntimeError if this process is in a real one already."""
    if world_size == 1:
        yield Ranks()
        return
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("this process is in a process group already")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield FakeRanks(world_size, copies)
    finally:
        dist.destroy_process_group()
