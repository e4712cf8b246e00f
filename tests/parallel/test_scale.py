"""The strategies of many ranks, each alone on fake tensors in a group that only says that it is there."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from chattrain import loop, torch_compat
from chattrain.data.batch import Batch
from chattrain.model.generate import generate
from chattrain.model.gpt import GPT
from chattrain.optim import adamw, muon_adamw
from chattrain.parallel import zero
from chattrain.parallel.fsdp import FSDP
from chattrain.parallel.ranks import Group, Ranks
from chattrain.parallel.zero import ZeroDDP
from tests.optim.test_optimizers import ADAMW
from tests.optim.test_optimizers import MUON as FIVE_ITERATIONS

MUON = FIVE_ITERATIONS | {"ns_steps": 1}  # who does what, and what is sent, is the same after one
CPU = torch.device("cpu")
D12, D32 = (12, 768), (32, 2048)
TALL = (88, 64)  # more matrices than 512 ranks
WIDE = (2, 2048)


@pytest.fixture
def group():
    """Rank `rank` of `world_size`, alone."""

    def join(rank: int, world_size: int) -> Ranks:
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
        ranks = Ranks(rank, 0, world_size)
        ranks.mesh("cpu")
        return ranks

    yield join
    dist.destroy_process_group()


class Collectives(TorchDispatchMode):
    """Counts the collectives that are called within."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.namespace in ("c10d", "_c10d_functional")
        return func(*args, **(kwargs or {}))


def stepped(ranks: Ranks, size: tuple[int, int], strategy: str, build=muon_adamw.build, settings=MUON) -> SimpleNamespace:
    """What a rank holds after a step."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = GPT(65_536, size[0], size[1], size[1] // 64)
        spread = ZeroDDP(model, ranks, torch.bfloat16) if strategy == "ddp" else FSDP(model, ranks, torch.bfloat16, CPU)
        optimizer = build(model, spread, **settings)
        ids = torch.zeros(1, 8, dtype=torch.long)
        batch = Batch(inputs=ids, targets=ids, num_tokens=8, num_supervised=8)
        spread.set_requires_gradient_sync(last=True)
        with torch.autocast("cpu", torch.bfloat16):
            model.loss(batch).backward()
        spread.reduce_gradients(optimizer)
        spread.step(optimizer)
        state = {key: value.numel() for key, value in optimizer.state().items() if value.ndim}
        return SimpleNamespace(
            strategy=spread,
            sent=ranks.moved_bytes,
            params=sum(shape.numel() for shape in spread.shapes.values()),
            mine=sum(p.numel() for p in optimizer.parameters()),
            state=state,
            gradients=[p.grad for p in model.parameters()],
        )


def test_passes_of_whole_weights_ask_nothing_of_other_ranks(group):
    """Of any kind, in any order, and before the first step: ranks make as many as their share of the replies takes."""
    model = GPT(256, 2, 32, 2)
    model.init_weights(torch.Generator().manual_seed(0))
    spread = FSDP(model, group(0, 2), torch.float32, CPU)
    ids = torch.zeros(1, 8, dtype=torch.long)
    batch = Batch(inputs=ids, targets=ids, num_tokens=8, num_supervised=8)
    for _ in range(2):
        with spread.whole_weights(), torch.no_grad():
            with Collectives() as sent:
                for _ in range(2):
                    assert len(list(generate(model, [1, 2], 3, set()))) == 3
                    assert model.losses(batch).shape == model(ids, ids).shape == (1, 8)
            assert sent.count == 0
        with Collectives() as sent:
            model.loss(batch).backward()
        assert sent.count > 0


@pytest.mark.parametrize(
    "strategy, world_size, size",
    [("ddp", 8, D12), ("ddp", 64, D32), ("ddp", 512, TALL), ("fsdp", 8, D12), ("fsdp", 64, WIDE), ("fsdp", 512, WIDE)],
)
def test_every_parameter_is_owned_once_and_ranks_hold_as_much(group, world_size, size, strategy):
    ranks = [0, world_size - 1]
    held = [stepped(group(rank, world_size), size, strategy) for rank in ranks]
    params, spread = held[0].params, held[0].strategy
    for name, shape in spread.shapes.items():
        parts = sorted((part.start, part.stop) for part in spread.owned_slices(name))
        assert parts[0][0] == 0 and parts[-1][1] == shape.numel()
        assert all(before[1] == after[0] for before, after in pairwise(parts))
    owned = [0] * world_size
    for name in spread.shapes:
        for part in spread.owned_slices(name):
            owned[part.rank] += part.stop - part.start
    assert min(owned) > 0 and max(owned) * world_size <= 1.1 * params
    assert [one.mine for one in held] == [owned[rank] for rank in ranks]
    for one in held:  # Muon keeps one number an element, AdamW two
        assert one.mine <= sum(one.state.values()) <= 2 * one.mine
        assert one.gradients == [None] * len(one.gradients)


def test_each_rank_of_a_few_has_the_same_work_for_newton_schulz(group):
    work = stepped(group(0, 8), D12, "ddp").strategy.buckets[-1].layout.costs
    assert len(work) == 8 and max(work) * 8 <= 1.1 * sum(work)


@pytest.mark.parametrize("world_size, size", [(2, D12), (8, D12), (512, D32)], ids=["2", "8", "512"])
@pytest.mark.parametrize("build, settings", [(muon_adamw.build, MUON), (adamw.build, ADAMW)], ids=["muon_adamw", "adamw"])
def test_a_step_sends_no_byte_more_than_reduce_scatter_and_all_gather_must(group, monkeypatch, world_size, size, build, settings):
    """Of tensors as they are handed to torch, a rank sends (n - 1) / n in a group of n; twice that where all is summed."""
    sent = 0.0

    def counting(collective, bytes_of):
        def call(*arguments, **named):
            nonlocal sent
            sent += bytes_of(arguments, dist.get_world_size(named.get("group")))
            return collective(*arguments, **named)

        return call

    for owner, name, of in [
        (torch_compat, "reduce_scatter_single", lambda a, n: a[1].nbytes * (n - 1) / n),
        (torch_compat, "all_gather_single", lambda a, n: a[0].nbytes * (n - 1) / n),
        (dist, "all_reduce", lambda a, n: a[0].nbytes * 2 * (n - 1) / n),
    ]:
        monkeypatch.setattr(owner, name, counting(getattr(owner, name), of))
    one = stepped(group(world_size - 1, world_size), size, "ddp", build, settings)
    least = 2 * (world_size - 1) / world_size * 4 * one.params
    assert sent == pytest.approx(least, rel=1e-3) and one.sent == pytest.approx(least, rel=1e-3)


def test_groups_of_ranks_that_do_the_same_hold_the_whole_each(group):
    first, last = (stepped(group(rank, 512), D32, "ddp") for rank in (3, 3 + 64 * 7))
    assert first.strategy.group.size == 64
    assert first.state == last.state and first.mine * 64 == pytest.approx(first.params, rel=0.01)


def test_gradients_leave_while_backward_runs_and_in_the_last_micro_batch_only(group, monkeypatch):
    ranks = group(1, 4)
    seen: list[tuple[str, int]] = []
    on_their_way: list[int] = []
    reduce_scatter = Group.reduce_scatter

    def send(self, whole):
        seen.append(("sent", len(seen)))
        on_their_way.append(1 + sum(bucket.wait is not None for bucket in spread.buckets))
        return reduce_scatter(self, whole)

    monkeypatch.setattr(Group, "reduce_scatter", send)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = GPT(65_536, 6, 384, 6)
        spread = ZeroDDP(model, ranks, torch.float32)
        optimizer = muon_adamw.build(model, spread, **MUON)
        for i in (5, 0):
            model.transformer.h[i].mlp.c_fc.weight.register_hook(lambda grad, i=i: seen.append((f"block {i}", len(seen))))
        ids = torch.zeros(1, 8, dtype=torch.long)
        for last in (False, True):
            spread.set_requires_gradient_sync(last)
            model.loss(Batch(inputs=ids, targets=ids, num_tokens=8, num_supervised=8)).backward()
            seen.append(("backward is over", len(seen)))
        spread.reduce_gradients(optimizer)
    events = [name for name, _ in seen]
    first, second = events[: events.index("backward is over")], events[events.index("backward is over") + 1 :]
    assert "sent" not in first
    assert second.index("sent") < second.index("block 0") and second.count("sent") == len(spread.buckets) >= 2
    assert second[-1] == "backward is over"
    assert max(on_their_way) == zero.MAX_IN_FLIGHT  # the others' gradients have been given back


def test_new_weights_are_waited_for_where_forward_needs_them(group):
    ranks = group(1, 4)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = GPT(65_536, 6, 384, 6)
        spread = ZeroDDP(model, ranks, torch.float32)
        optimizer = muon_adamw.build(model, spread, **MUON)
        ids = torch.zeros(1, 8, dtype=torch.long)
        batch = Batch(inputs=ids, targets=ids, num_tokens=8, num_supervised=8)
        waiting: list[int] = []

        def count(*_):
            waiting.append(sum(b.gathered is not None for b in spread.buckets))

        for block in model.blocks:
            block.register_forward_pre_hook(count)  # after what the strategy does there
        for _ in range(2):
            spread.set_requires_gradient_sync(last=True)
            model.loss(batch).backward()
            spread.reduce_gradients(optimizer)
            spread.step(optimizer)
        sent = sum(b.gathered is not None for b in spread.buckets)
        spread.wait_for_weights()
    first, second = waiting[:6], waiting[6:]
    assert first == [0] * 6 and sent == len(spread.buckets) >= 2
    assert second[0] > second[-1] >= 1  # the head's come after the last block
    assert not any(b.gathered is not None for b in spread.buckets)


def test_fsdp_brings_no_more_than_a_few_matrices_together_on_a_rank(group, monkeypatch):
    """Rank 2 of 8 gets its eighth of the matrices, one at a time, and of the others the rows that it steps."""
    received: list[int] = []
    all_to_all = Ranks.all_to_all

    def counted(ranks, pieces, sizes):
        received.append(sum(sizes))
        return all_to_all(ranks, pieces, sizes)

    monkeypatch.setattr(Ranks, "all_to_all", counted)
    one = stepped(group(2, 8), D12, "fsdp")
    there, back = received[::2], received[1::2]
    matrices = sum(shape.numel() for name, shape in one.strategy.shapes.items() if ".h." in name)
    assert sum(there) == sum(back) == matrices / 8
    assert max(there) == 4 * 768 * 768  # one matrix, of the largest


def test_a_step_of_the_loop_runs_on_any_rank(group):
    ranks = group(5, 8)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = GPT(512, 2, 64, 2)
        spread = ZeroDDP(model, ranks, torch.float32)
        ids = torch.zeros(1, 8, dtype=torch.long)
        batch = Batch(inputs=ids, targets=ids, num_tokens=8, num_supervised=8)
        alone = SimpleNamespace(sum=lambda values: values, at=lambda place: None)
        parts = SimpleNamespace(
            ranks=alone,
            stop_asked=lambda: False,
            save_asked=lambda: False,
            loss_of=model.loss,
            strategy=spread,
            optimizer=muon_adamw.build(model, spread, **MUON),
            max_grad_norm=1.0,
            checks_each_step=False,
        )
        result = loop.train_step(parts, [batch, batch], 0)
    assert result.tokens == 16 and result.grad_norm.shape == ()
