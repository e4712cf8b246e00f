"""Memory of a step on one device: the real step, run on tensors that have shapes and no content.

Under FakeTensorMode every operation gives tensors of the right size and takes no memory; torch's MemTracker counts what would be
alive. What it cannot see is left to a share of the device (see hardware.py): contexts, workspaces inside a kernel, what an
allocator leaves unused. torch.compile is not run, for that takes longer than a plan may: the blocks are counted as they are
without it, and the head as the one pass over logits that its compilation makes of it. See docs/planning.md for what was measured.

B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType, _ModState
from torch.distributed.device_mesh import DeviceMesh

from chattrain import device, loop
from chattrain.config import Config
from chattrain.config.instantiate import instantiate_config
from chattrain.data.batch import Batch
from chattrain.model import head
from chattrain.optim import newton_schulz
from chattrain.optim.newton_schulz import MuonSettings
from chattrain.parallel.ranks import Group, Ranks
from chattrain.planning.model import fake_model
from chattrain.setup.build import prepare_for_training

CPU = torch.device("cpu")
COLLECTIVES = (torch.ops.c10d._allgather_base_.default, torch.ops.c10d._reduce_scatter_base_.default)
DOCUMENT = 64  # tokens of a document at least, of rows that hold several: more boundaries than real rows have


@dataclass(frozen=True)
class MicroBatchSpec:
    """What a micro-batch is made of."""

    rows: int
    width: int  # tokens a row
    partial: bool  # are some targets ignored? Then the head is computed for places by their numbers
    isolated: bool  # do documents share rows without seeing each other?
    repeats: bool  # does a step hold more than one micro-batch?


@dataclass(frozen=True)
class Memory:
    """Bytes of one device in a step that is not the first: all at its peak, by what they are for, and by where."""

    peak: int
    phases: dict[str, int]  # forward, backward, optimizer: the most in each
    at_peak: dict[str, int]  # weights, gradients, optimizer, activations, temporary
    components: dict[str, int]  # of activations: what each kind of part keeps for backward, and the logits while they are there
    moved: float  # bytes that ddp's collectives and Muon's exchange send in the step


class StepMemTracker(MemTracker):
    """MemTracker with the peaks of forward, backward and optimizer in place of a peak for each module, which would take most of
    the time."""

    def __init__(self, copies: bool) -> None:
        """copies: does the backend of collectives put what it gathers or sums into a tensor of its own?"""
        super().__init__()
        self.copies, self.passing = copies, 0
        self.phases: dict[str, int] = {}
        self.at_peak: dict[str, int] = {}

    def forget(self) -> None:
        """Count peaks from here on."""
        self.phases, self.at_peak = {}, {}

    def adopt(self, model: nn.Module) -> None:
        """Know the gradients of all its parameters as such, of those too that are used outside their module."""
        self._track_module_params_and_buffers(model, install_grad_hooks=True)

    def now(self) -> dict[str, int]:
        """Bytes by what they are for; `total` is all of them."""
        found = self._curr_mem_snap.get(CPU, {})
        named = {
            "weights": (_MemRefType.PARAM, _MemRefType.BUFFER),
            "gradients": (_MemRefType.GRAD,),
            "optimizer": (_MemRefType.OPT,),
            "activations": (_MemRefType.ACT, _MemRefType.OTH),
            "temporary": (_MemRefType.TEMP,),
        }
        sizes = {name: sum(found.get(kind, 0) for kind in kinds) for name, kinds in named.items()}
        return sizes | {"total": found.get("Total", 0)}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.passing = 0
        if self.copies and func in COLLECTIVES:
            self.passing = max(t.untyped_storage().nbytes() for t in args if isinstance(t, Tensor))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _update_peak_stats(self, peak_state: _ModState) -> None:
        phase = "optimizer" if self._in_opt else "backward" if peak_state == _ModState.PEAK_BW else "forward"
        total = self._curr_mem_snap.get(CPU, {}).get("Total", 0) + self.passing
        if total > max(self.phases.values(), default=0):
            self.at_peak = self.now()
        self.phases[phase] = max(self.phases.get(phase, 0), total)


def step_memory(cfg: Config, vocab_size: int, start: Path | None, shape: MicroBatchSpec, world_size: int = 1) -> Memory:
    """Memory of rank 0 of world_size from the second step on, when the optimizer has its state, with micro-batches of this shape.

    For the device that train.device names, a GPU where it leaves the choice: only sizes of chunks differ. Raises UserError where
    the model cannot be built without weights.
    """
    kind = "cpu" if cfg.train.device.name == "cpu" else "cuda"
    bf16 = cfg.train.dtype.name != "fp32" if kind == "cuda" else device.use_bf16(cfg.train.dtype, CPU)
    eager = replace(cfg, train=replace(cfg.train, compile=False))
    with pretended_ranks(world_size, copies=kind == "cpu") as ranks, FakeTensorMode():
        model = fake_model(cfg, vocab_size, start)
        in_blocks = cfg.train.compile if kind == "cpu" else bf16 and shape.isolated  # in place of FlashAttention, and as large
        if in_blocks and hasattr(model, "in_blocks"):
            model.trunk = partial(model.features, in_blocks=True)
        if hasattr(model, "head_settings"):
            model.head_settings = _head_settings(kind, cfg.train.compile)
        strategy = prepare_for_training(eager, model, CPU, ranks, bf16)
        # Products of whole matrices take as much memory as strips, and fewer operations. Fake modes are a thread's own.
        strategy.muon_settings = MuonSettings(batch=newton_schulz.SETTINGS[kind].batch)
        optimizer = instantiate_config(cfg.optimizer, model, strategy)
        tracker, seen = StepMemTracker(copies=kind == "cpu"), {}
        parts = loop.TrainerComponents(
            model=model,
            loss_of=_watched(model, tracker, device.autocast(bf16, CPU), seen),
            optimizer=optimizer,
            lr_factor=lambda step: 1.0,
            loader=None,
            evaluate=None,
            save=None,
            track=None,
            show=None,
            stop_asked=lambda: False,
            ranks=ranks,
            max_grad_norm=cfg.train.max_grad_norm,
            checks_each_step=False,
            flops_per_token=0,
            peak_flops=None,
            meters=None,
            strategy=strategy,
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Expected a tensor or a traceable wrapper-subclass")
            _second_step(parts, tracker, shape)
    at_peak = {name: size for name, size in tracker.at_peak.items() if name != "total"}
    return Memory(max(tracker.phases.values()), tracker.phases, at_peak, seen["kept"], ranks.moved_bytes)


def _watched(model: nn.Module, tracker: StepMemTracker, autocast: Any, seen: dict) -> Callable[[Batch], Tensor]:
    """The loss, after which `seen` holds what forward has left."""

    def loss_of(batch: Batch) -> Tensor:
        tracker.reset_mod_stats()
        with autocast:
            loss = model.loss(batch)
        seen["kept"] = _kept(tracker, model)
        return loss

    return loss_of


def _second_step(parts: loop.TrainerComponents, tracker: StepMemTracker, shape: MicroBatchSpec) -> None:
    """A step on gradients without content makes the optimizer's state; peaks are counted in the one after it.

    Its micro-batch is its last: where others came before, it meets their gradients, and weights that have arrived.
    """
    parameters = list(parts.model.parameters())
    tracker.track_external(parts.model)
    with tracker:
        _put_gradients(parameters)
        tracker.adopt(parts.model)
        parts.strategy.reduce_gradients(parts.optimizer)
        parts.strategy.step(parts.optimizer)
        if shape.repeats:
            parts.strategy.wait_for_weights()
            _put_gradients(parameters)
            tracker.adopt(parts.model)
        tracker.forget()
        parts.ranks.moved_bytes = 0.0
        loop.train_step(parts, [fake_batch(shape)], step=1)


def _put_gradients(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)


def _kept(tracker: StepMemTracker, model: nn.Module) -> dict[str, int]:
    """After forward: what the blocks keep for backward, all else that is kept, and the most that was there beyond it while the
    head ran: logits and what is made of them."""

    def activations(module: nn.Module, state: _ModState) -> int:
        return tracker.memory_tracking[module].snapshots[state][0].get(CPU, {}).get(_MemRefType.ACT, 0)

    blocks = sum(activations(block, _ModState.POST_FW) - activations(block, _ModState.PRE_FW) for block in model.blocks)
    now = tracker.now()
    blocks = min(blocks, now["activations"])  # fsdp's gathered weights are among them, and soon gone
    return {
        "blocks": blocks,
        "embedding and head": now["activations"] - blocks,
        "logits": max(0, tracker.phases["forward"] - now["total"]),
    }


def fake_batch(shape: MicroBatchSpec) -> Batch:
    """A micro-batch of this shape, all its targets supervised: none of the data takes more."""
    B, T = shape.rows, shape.width
    ids, places = torch.zeros(B, T, dtype=torch.int64), B * T
    return Batch(
        ids,
        torch.zeros_like(ids),
        num_tokens=places,
        num_supervised=places,
        positions=torch.zeros_like(ids) if shape.isolated else None,
        cu_seqlens=torch.zeros(places // DOCUMENT + 1, dtype=torch.int32) if shape.isolated else None,
        target_indices=torch.zeros(places, dtype=torch.int64) if shape.partial else None,
    )


class PretendedRanks(Ranks):
    """Rank 0 among others that are not there and do as it does. `copies`: does the backend of collectives work on a copy?"""

    def __init__(self, world_size: int, copies: bool):
        super().__init__(0, 0, world_size)
        self.copies = copies

    def sum(self, values: list[float]) -> list[float]:
        return [value * self.world_size for value in values]

    def mesh(self, device_type: str) -> DeviceMesh:
        with unset_fake_temporarily():  # it keeps the ranks in a tensor, and reads that
            return super().mesh(device_type)

    def in_groups(self, size: int) -> Group:
        return HoldingGroup(**vars(super().in_groups(size)))


class HoldingGroup(Group):
    """Its sums hold what they work on until they are waited for, as those that really take time do: what was given, and gloo
    a copy of it too."""

    def reduce_scatter(self, whole: Tensor) -> tuple[Tensor, Callable[[], None]]:
        share, wait = super().reduce_scatter(whole)
        held = [whole, *([whole.clone()] if self.ranks.copies else [])]

        def waited() -> None:
            wait()
            held.clear()

        return share, waited


@contextmanager
def pretended_ranks(world_size: int, copies: bool) -> Iterator[Ranks]:
    """Collectives that return at once, with tensors of the right size. Raises RuntimeError within a real process group."""
    if world_size == 1:
        yield Ranks()
        return
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("this process is one of several already")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield PretendedRanks(world_size, copies)
    finally:
        dist.destroy_process_group()


def _head_settings(kind: str, compiled: bool) -> head.HeadSettings:
    """The head as on this kind of device, though tensors say that they are on a CPU."""
    settings = head.head_settings(kind, compiled=False)
    return replace(settings, loss_and_gradient=_fused_loss_and_gradient) if compiled else settings


def _fused_loss_and_gradient(logits: Tensor, targets: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """What head.py's function takes when it is compiled: its results, and a few numbers a row."""
    return logits.new_empty(len(logits), dtype=torch.float32).sum(dtype=head.sum_dtype(logits.device)), torch.empty_like(logits)


def largest(measure: Callable[[int], int], limit: float, first: int, most: int) -> int:
    """The largest number of rows, up to `most`, whose peak measure(rows) is within the limit; 0 where one row is too much.

    Two sizes give a line, its guess is measured, and where that is wrong the line goes through it: what a step takes is linear
    in rows, but for chunks that are not full. Each size is measured once.

    >>> largest(lambda rows: 10 + 7 * rows, limit=100, first=4, most=64)
    12
    """
    peaks = {first: measure(first)}
    fits, fails = (first, most + 1) if peaks[first] <= limit else (0, first)
    while fails - fits > 1:
        guess = _guess(peaks, limit, fits, fails)
        peaks[guess] = measure(guess)
        if peaks[guess] <= limit:
            fits = guess
        else:
            fails = guess
    return fits


def _guess(peaks: dict[int, int], limit: float, fits: int, fails: int) -> int:
    """A size between the two, by the line through the two that were measured nearest to them."""
    if len(peaks) == 1:
        ((rows, peak),) = peaks.items()
        guess = rows * limit / peak if peak else fails
    else:
        below, above = (min(peaks, key=lambda rows: abs(peaks[rows] - limit)),) * 2
        above = min((rows for rows in peaks if rows != below), key=lambda rows: abs(peaks[rows] - limit))
        slope = (peaks[above] - peaks[below]) / (above - below)
        guess = below + (limit - peaks[below]) / slope if slope > 0 else fails
    return int(min(max(guess, fits + 1), fails - 1))
