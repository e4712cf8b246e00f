"""The components of the loop, built in each process: model, strategy, optimizer, loader, evaluation, saving of checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from chattrain import device as devices
from chattrain import loop
from chattrain.config import Config
from chattrain.config.instantiate import instantiate_config
from chattrain.config.words import ActivationCheckpointing, OnNonfinite, Strategy
from chattrain.data.loader import Loader
from chattrain.data.packing import cu_seqlens_of
from chattrain.errors import RunFailed, UserError
from chattrain.model import fp8
from chattrain.model.causal_lm import CausalLM
from chattrain.optim.named import NamedOptimizer
from chattrain.parallel.ranks import Ranks
from chattrain.parallel.signals import Signals
from chattrain.parallel.strategy import ParallelStrategy, SingleProcess
from chattrain.parallel.zero import ZeroDDP
from chattrain.setup.data import RunData, pass_limits
from chattrain.setup.evaluation import Evaluation
from chattrain.setup.learning_rates import build_lr_factor, peak_rates
from chattrain.setup.mlflow_run import model_params
from chattrain.setup.plan import RunSetup
from chattrain.setup.saving import Saver
from chattrain.setup.spikes import Spikes
from chattrain.storage import checkpoint
from chattrain.tracking.tracker import NullTracker, Tracker

log = logging.getLogger("chattrain")


def build_components(
    cfg: Config,
    setup: RunSetup,
    ranks: Ranks,
    data: RunData,
    tracker: Tracker | NullTracker,
    signals: Signals,
    saved: checkpoint.CheckpointState | None,
) -> tuple[loop.TrainerComponents, loop.State]:
    """What the loop of this process runs on, and the state that it starts in: that of the checkpoint `saved`, or step 0.

    Raises UserError where the checkpoint's optimizer state belongs to another optimizer, RunFailed where documents that share a
    row are not isolated.
    """
    device = devices.pick_device(cfg.train.device, ranks.local_rank)
    bf16 = devices.use_bf16(cfg.train.dtype, device)
    devices.choose_attention_kernels(device, cfg.collator.has_varying_shapes)
    start, vocab_size = setup.start.checkpoint, data.tokenizer.vocab_size
    model, strategy = build_model(cfg, vocab_size, start, device, ranks, bf16, setup.compilation.on)
    optimizer = instantiate_config(cfg.optimizer, model, strategy)
    state = loop.State()
    if saved and setup.resume:
        weight = float(saved.supervised_tokens) if saved.loss_weight is None else saved.loss_weight
        state = loop.State(saved.step, saved.tokens_seen, saved.supervised_tokens, weight, saved.skipped)
        load_optimizer(optimizer, strategy, setup.resume)
    autocast = devices.autocast(bf16, device)
    if cfg.collator.isolates:
        shape = (cfg.train.device_batch_size, cfg.train.seq_len)
        check_isolation(in_context(autocast, model.features), shape, data.tokenizer.vocab_size, device)
    limits, num_steps = pass_limits(cfg.train, device.type), data.num_steps
    evaluate = Evaluation(cfg.eval, limits, data, num_steps, model, autocast, device, ranks, strategy, setup.run_dir, state.step)
    lr_factor = build_lr_factor(cfg, num_steps)
    loader = Loader(data.train, data.rows_per_step, limits, device, ranks.rank, ranks.world_size)
    saver = Saver(cfg, setup.run_dir, data, model, optimizer, tracker, ranks, strategy, setup.lineage)
    tracker.describe(model_params(model, peak_rates(optimizer, lr_factor, num_steps)))
    return loop.TrainerComponents(
        model=model,
        loss_of=in_context(autocast, model.loss),
        optimizer=optimizer,
        lr_factor=lr_factor,
        loader=loader,
        evaluate=evaluate,
        save=saver.save,
        finish_saving=saver.finish,
        save_asked=lambda: signals.save_asked() or saver.is_due(),
        is_best=saver.is_best,
        track=tracker.log,
        show=tracker.update,
        stop_asked=signals.stop_asked,
        ranks=ranks,
        strategy=strategy,
        max_grad_norm=cfg.train.max_grad_norm,
        checks_each_step=device.type == "cpu",
        max_skipped=cfg.train.max_skipped if cfg.train.on_nonfinite == OnNonfinite.skip else None,
        watch=Spikes(setup.run_dir, loader.describe, ranks.is_main),
        flops_per_token=model.flops_per_token(cfg.train.seq_len),
        peak_flops=devices.peak_flops(device),
        meters=build_meters(device, strategy),
    ), state


def load_optimizer(optimizer: NamedOptimizer, strategy: ParallelStrategy, folder: Path) -> None:
    """Load this rank's shard of a checkpoint's optimizer state. Raises UserError where it is another optimizer's."""
    try:
        optimizer.load_state(strategy.shard_state(checkpoint.load_optimizer(folder)))
    except ValueError as error:
        raise UserError(f"{folder}: {error}; use the optimizer that the run began with") from error


def build_model(
    cfg: Config, vocab_size: int, start: Path | None, device: torch.device, ranks: Ranks, bf16: bool, compile: bool
) -> tuple[CausalLM, ParallelStrategy]:
    """The model on its device, ready to train as train.* asks, and the strategy that spreads it over ranks.

    `start`: the checkpoint or folder of its weights; None: random weights.
    """
    model = instantiate_config(cfg.model, vocab_size=vocab_size, start=start, seed=cfg.run.seed)
    if not shards_weights(cfg.distributed.strategy, ranks):  # FSDP moves each rank's shards only: the whole may not fit
        model.to(device)
    return model, prepare_for_training(cfg, model, device, ranks, bf16, compile)


def prepare_for_training(
    cfg: Config, model: CausalLM, device: torch.device, ranks: Ranks, bf16: bool, compile: bool = False
) -> ParallelStrategy:
    """Apply fp8, activation checkpointing, parallelism and compilation; return the strategy."""
    if cfg.train.fp8:
        fp8.convert(model, device)
    checkpointing = cfg.train.activation_checkpointing
    if checkpointing != ActivationCheckpointing.none:
        model.checkpoint_activations(selective=checkpointing == ActivationCheckpointing.selective)
    strategy = build_strategy(cfg.distributed.strategy, model, device, ranks, torch.bfloat16 if bf16 else torch.float32)
    if compile:
        devices.allow_many_shapes()
        model.compile_blocks(dynamic=cfg.collator.has_varying_shapes)
    return strategy


def build_strategy(
    strategy: Strategy, model: CausalLM, device: torch.device, ranks: Ranks, dtype: torch.dtype
) -> ParallelStrategy:
    """How the model is spread over ranks. One process gets SingleProcess, with a warning if distributed.strategy=fsdp."""
    if ranks.world_size == 1:
        if strategy == Strategy.fsdp:
            log.warning("distributed.strategy=fsdp, but there is one process: nothing is sharded, it holds everything")
        return SingleProcess(dtype)
    if shards_weights(strategy, ranks):
        from chattrain.parallel.fsdp import FSDP  # half a second of imports

        return FSDP(model, ranks, dtype, device)
    return ZeroDDP(model, ranks, dtype)


def shards_weights(strategy: Strategy, ranks: Ranks) -> bool:
    return strategy == Strategy.fsdp and ranks.world_size > 1


def build_meters(device: torch.device, strategy: ParallelStrategy) -> Callable[[], dict[str, float]]:
    """device.meters, and under ddp `train/sent_gib`: gradients and weights that this rank has sent since the last call."""
    device_meters = devices.meters(device)

    def read() -> dict[str, float]:
        if not isinstance(strategy, ZeroDDP):
            return device_meters()
        sent, strategy.ranks.moved_bytes = strategy.ranks.moved_bytes / devices.GIB, 0.0
        return device_meters() | {"train/sent_gib": sent}

    return read


def in_context(context: AbstractContextManager, function: Callable) -> Callable:
    """The function, with every call of it made inside the context: the autocast of a run."""

    def call(*arguments):
        with context:
            return function(*arguments)

    return call


def check_isolation(features: Callable, shape: tuple[int, int], vocab_size: int, device: torch.device) -> None:
    """Check, on the device, compilation and number format of the run, that documents that share a row do not see each other.

    Two documents fill each row of `shape` (B, T). The first is replaced; the features of the second must stay the same to the
    bit. Raises RunFailed otherwise.
    """
    B, T = shape
    generator = torch.Generator().manual_seed(0)
    inputs, others = (torch.randint(0, vocab_size, (B, T), generator=generator) for _ in range(2))
    cut = T // 2
    positions = torch.cat([torch.arange(cut), torch.arange(T - cut)]).expand(B, T).contiguous()
    changed = torch.cat([others[:, :cut], inputs[:, cut:]], dim=1)
    cu_seqlens = torch.from_numpy(cu_seqlens_of(positions.numpy()))
    before, after = (
        features(ids.to(device), positions.to(device), cu_seqlens.to(device)).detach()[:, cut:] for ids in (inputs, changed)
    )
    if not torch.equal(before, after):
        largest = float((before - after).abs().max())
        raise RunFailed(
            f"documents are not isolated on {device}: changing one changes the features of its neighbour by up to "
            f"{largest:.2g}. Use train.compile=false, or collator.isolate_documents=false"
        )
