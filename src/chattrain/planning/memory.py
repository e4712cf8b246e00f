"""Memory of a step on one device: the real step, on tensors that have shapes and no content.

Under FakeTensorMode every operation returns tensors of the right size and allocates nothing; torch's MemTracker counts what would
be alive. It does not see contexts, workspaces inside kernels or what an allocator leaves unused: a fraction of the device is
reserved for them (see hardware.py). Of compiled blocks the compiler says what they keep (compiled.py), and the compiled head is
one pass over the logits. docs/planning.md compares the results with measurements.

B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from chattrain import device, loop
from chattrain.config import Config
from chattrain.config.instantiate import instantiate_config
from chattrain.data.batch import Batch
from chattrain.model import head
from chattrain.model.attention import always, block_attention_pays, never
from chattrain.model.causal_lm import CausalLM
from chattrain.model.gpt import GPT
from chattrain.optim import newton_schulz
from chattrain.optim.adamw_bf16 import CHUNK_ELEMENTS, AdamWBF16
from chattrain.optim.named import NamedOptimizer
from chattrain.optim.newton_schulz import MuonSettings
from chattrain.parallel.ranks import Ranks
from chattrain.parallel.strategy import ParallelStrategy
from chattrain.planning.compiled import CompiledBlocks
from chattrain.planning.fake_ranks import fake_ranks
from chattrain.planning.mem_tracker import CPU, StepMemTracker
from chattrain.planning.model import fake_model
from chattrain.setup.build import prepare_for_training

CLEAR = 0.02  # share of the limit, in the search for the largest batch
MIN_DOCUMENT = 64  # average tokens a document, for the size of cu_seqlens: real rows hold fewer and longer documents


@dataclass(frozen=True)
class MicroBatchSpec:
    """The shape of a micro-batch."""

    rows: int
    width: int  # tokens a row
    partial: bool  # are some targets ignored? Then the head takes the supervised tokens by their indices
    isolated: bool  # is attention within the documents of a row?
    repeats: bool  # does a step hold more than one micro-batch?


@dataclass(frozen=True)
class Memory:
    """Bytes of one device in a step after the first: at the peak, by category, and by component."""

    peak: int
    phases: dict[str, int]  # forward, backward, optimizer: the peak of each
    at_peak: dict[str, int]  # weights, gradients, optimizer, activations, temporary
    components: dict[str, int]  # of activations: what blocks, embedding and head keep for backward; logits while the head runs
    moved: float  # bytes a step that ddp's collectives and Muon's exchange send


def step_memory(cfg: Config, vocab_size: int, start: Path | None, shape: MicroBatchSpec, world_size: int = 1) -> Memory:
    """Memory of rank 0 of world_size ranks in a step on micro-batches of this shape, once the optimizer has its state.

    For the device of train.device, a GPU unless that says cpu; the sizes of chunks depend on it. Raises UserError if the model
    cannot be built without weights.
    """
    kind = "cpu" if cfg.train.device.name == "cpu" else "cuda"
    compiled = cfg.train.compile is not False
    bf16 = cfg.train.dtype.name != "fp32" if kind == "cuda" else device.use_bf16(cfg.train.dtype, CPU)
    with fake_ranks(world_size, copies=kind == "cpu") as ranks, FakeTensorMode():
        model, strategy = _build_model(cfg, vocab_size, start, shape, kind, bf16, compiled, ranks)
        optimizer = instantiate_config(cfg.optimizer, model, strategy)
        for part in optimizer.optimizers:
            if isinstance(part, AdamWBF16):
                part.chunk_elements = CHUNK_ELEMENTS[kind]
        tracker, kept = StepMemTracker(copies=kind == "cpu"), {}
        loss_of = _tracked_loss(model, tracker, device.autocast(bf16, CPU), kept)
        components = _components(cfg, model, loss_of, optimizer, strategy, ranks)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Expected a tensor or a traceable wrapper-subclass")
            _second_step(components, tracker, shape)
    at_peak = {name: size for name, size in tracker.at_peak.items() if name != "total"}
    return Memory(max(tracker.phases.values()), tracker.phases, at_peak, kept, ranks.moved_bytes)


def _build_model(
    cfg: Config, vocab_size: int, start: Path | None, shape: MicroBatchSpec, kind: str, bf16: bool, compiled: bool, ranks: Ranks
) -> tuple[CausalLM, ParallelStrategy]:
    """The model as a run on a device of this kind would have it, on fake CPU tensors. If compiled, its blocks take the memory of
    compiled ones."""
    model = fake_model(cfg, vocab_size, start)
    model.head_settings = _head_settings(kind, compiled)
    if kind == "cpu":
        model.use_block_attention = block_attention_pays if compiled else never
    elif isinstance(model, GPT):  # it stands in for FlashAttention within documents, which takes as much memory
        model.use_block_attention = always if bf16 and shape.isolated else never
    eager = replace(cfg, train=replace(cfg.train, compile=False))
    strategy = prepare_for_training(eager, model, CPU, ranks, bf16)
    if compiled:
        CompiledBlocks(kind == "cuda", model.recomputes_inputs).replace_forward(model.blocks)
    # Products of whole matrices take as much memory as products of strips, in fewer operations. And no threads: a FakeTensorMode
    # holds for one thread only.
    strategy.muon_settings = MuonSettings(batch=newton_schulz.SETTINGS[kind].batch)
    return model, strategy


def _components(
    cfg: Config,
    model: CausalLM,
    loss_of: Callable[[Batch], Tensor],
    optimizer: NamedOptimizer,
    strategy: ParallelStrategy,
    ranks: Ranks,
) -> loop.TrainerComponents:
    """The components of `train_step`."""
    unused: Any = None  # only `fit` reads these
    return loop.TrainerComponents(
        model=model,
        loss_of=loss_of,
        optimizer=optimizer,
        lr_factor=unused,
        loader=unused,
        evaluate=unused,
        save=unused,
        finish_saving=unused,
        is_best=unused,
        track=unused,
        show=unused,
        stop_asked=lambda: False,
        save_asked=lambda: False,
        ranks=ranks,
        max_grad_norm=cfg.train.max_grad_norm,
        checks_each_step=False,
        max_skipped=None,
        watch=unused,
        flops_per_token=0,
        peak_flops=None,
        meters=unused,
        strategy=strategy,
    )


def _tracked_loss(model: CausalLM, tracker: StepMemTracker, autocast: Any, kept: dict[str, int]) -> Callable[[Batch], Tensor]:
    """The loss of a batch; each call updates `kept` with what its forward keeps for backward."""

    def loss_of(batch: Batch) -> Tensor:
        tracker.reset_mod_stats()
        with autocast:
            loss = model.loss(batch)
        kept.update(tracker.kept_by_forward(model.blocks))
        return loss

    return loss_of


def _second_step(components: loop.TrainerComponents, tracker: StepMemTracker, shape: MicroBatchSpec) -> None:
    """Make the optimizer's state by a step on empty gradients, then measure one micro-batch of the step after it.

    We measure the step's last micro-batch; when accumulating, earlier gradients exist and weights are already gathered.
    """
    parameters = list(components.model.parameters())
    tracker.track_external(components.model)
    with tracker:
        _set_gradients(parameters)
        tracker.track_gradients(components.model)
        components.strategy.reduce_gradients(components.optimizer)
        components.strategy.step(components.optimizer)
        if shape.repeats:
            components.strategy.wait_for_weights()
            _set_gradients(parameters)
            tracker.track_gradients(components.model)
        tracker.reset_peaks()
        components.ranks.moved_bytes = 0.0
        loop.train_step(components, [fake_batch(shape)], step=1)


def _set_gradients(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)


def fake_batch(shape: MicroBatchSpec) -> Batch:
    """A micro-batch of this shape in which every target is supervised, so that no real batch takes more memory."""
    B, T = shape.rows, shape.width
    ids, size = torch.zeros(B, T, dtype=torch.int64), B * T
    return Batch(
        ids,
        torch.zeros_like(ids),
        num_tokens=size,
        num_supervised=size,
        positions=torch.zeros_like(ids) if shape.isolated else None,
        cu_seqlens=torch.zeros(size // MIN_DOCUMENT + 1, dtype=torch.int32) if shape.isolated else None,
        target_indices=torch.zeros(size, dtype=torch.int64) if shape.partial else None,
    )


def _head_settings(kind: str, compiled: bool) -> head.HeadSettings:
    """The head's settings on a device of this kind: the fake tensors are on the CPU."""
    settings = head.head_settings(kind, compiled)
    fused = partial(_fused_losses_and_gradient, in_fp32=kind == "cpu")
    return replace(settings, losses_and_gradient=fused, dynamic=False) if compiled else settings


def _fused_losses_and_gradient(logits: Tensor, targets: Tensor, cap: float | None, in_fp32: bool) -> tuple[Tensor, Tensor]:
    """Allocates what the compiled function of head.py does: its results, one number a row, and in_fp32 (as a CPU's code needs it)
    the capped logits, which take the place of logits that are fp32 already."""
    capped = torch.empty_like(logits, dtype=torch.float32) if in_fp32 and logits.dtype != torch.float32 else None
    losses, gradient = logits.new_empty(len(logits), dtype=torch.float32), torch.empty_like(logits)
    del capped
    return losses, gradient


def largest(measure: Callable[[int], int], limit: float, first: int, most: int) -> int:
    """The largest number of rows, up to `most`, whose peak measure(rows) is within the limit; 0 if one row exceeds it.

    A secant search: memory is linear in rows but for chunks that are not full, so a line through two measured sizes guesses the
    next one. Each size is measured once, and none that the line puts well above the limit.

    >>> largest(lambda rows: 10 + 7 * rows, limit=100, first=4, most=64)
    12
    """
    peaks = {first: measure(first)}
    fits, fails = (first, most + 1) if peaks[first] <= limit else (0, first)
    while fails - fits > 1 and not _is_beyond(peaks, limit, fits + 1):
        guess = _guess(peaks, limit, fits, fails)
        peaks[guess] = measure(guess)
        if peaks[guess] <= limit:
            fits = guess
        else:
            fails = guess
    return fits


def _is_beyond(peaks: dict[int, int], limit: float, rows: int) -> bool:
    """Is the line through the two measured peaks nearest to the limit more than CLEAR above it at this number of rows?"""
    if len(peaks) == 1:
        return False
    one, other = sorted(peaks, key=lambda n: abs(peaks[n] - limit))[:2]
    slope = (peaks[other] - peaks[one]) / (other - one)
    return peaks[one] + slope * (rows - one) > limit * (1 + CLEAR)


def _guess(peaks: dict[int, int], limit: float, fits: int, fails: int) -> int:
    """A size between fits and fails, on the line through the two measured peaks nearest to the limit."""
    if len(peaks) == 1:
        ((rows, peak),) = peaks.items()
        guess = rows * limit / peak if peak else fails
    else:
        below, above = sorted(peaks, key=lambda rows: abs(peaks[rows] - limit))[:2]
        slope = (peaks[above] - peaks[below]) / (above - below)
        guess = below + (limit - peaks[below]) / slope if slope > 0 else fails
    return int(min(max(guess, fits + 1), fails - 1))
