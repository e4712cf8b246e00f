"""The components that the loop runs on, built in each process: model, strategy, optimizer, data, evaluations, tracker,
checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from chattrain import device as devices
from chattrain import loop
from chattrain.config import Config
from chattrain.config.instantiate import instantiate_config
from chattrain.config.schema import to_yaml
from chattrain.config.words import ActivationCheckpointing, Strategy
from chattrain.data.loader import Loader
from chattrain.data.packing import cu_seqlens_of
from chattrain.errors import RunFailed, UserError
from chattrain.evals.multiple_choice import MultipleChoice
from chattrain.evals.validation import Validation
from chattrain.model import fp8
from chattrain.parallel.fsdp import FSDP
from chattrain.parallel.ranks import Ranks
from chattrain.parallel.strategy import ParallelStrategy, SingleProcess
from chattrain.parallel.zero import ZeroDDP
from chattrain.setup.data import RunData
from chattrain.setup.plan import RunSetup
from chattrain.storage import checkpoint
from chattrain.tracking.mlflow_sink import MLflowSink
from chattrain.tracking.tracker import NullTracker, Tracker

log = logging.getLogger("chattrain")


def build_components(
    cfg: Config,
    setup: RunSetup,
    ranks: Ranks,
    data: RunData,
    tracker: Tracker | NullTracker,
    stop_asked: Callable[[], bool],
    saved: checkpoint.CheckpointState | None,
) -> tuple[loop.TrainerComponents, loop.State]:
    """Model, optimizer, data and evaluations of this process, and the state that they start in."""
    device = devices.pick_device(cfg.train.device, ranks.local_rank)
    bf16 = devices.use_bf16(cfg.train.dtype, device)
    model, strategy = build_model(cfg, data.tokenizer.vocab_size, setup.start.checkpoint, device, ranks, bf16)
    optimizer = instantiate_config(cfg.optimizer, model, strategy)
    state = loop.State()
    if saved:
        state = loop.State(saved.step, saved.tokens_seen, saved.supervised_tokens)
        try:
            optimizer.load_state(strategy.shard_state(checkpoint.load_optimizer(setup.resume)))
        except ValueError as error:
            raise UserError(f"{setup.resume}: {error}; use the optimizer that the run began with") from error
    autocast = devices.autocast(bf16, device)
    # On a CPU the few passes of an evaluation are over before compiling them would be.
    compiles = model.compiles and device.type == "cuda" and not isinstance(strategy, FSDP)
    losses_of = in_context(autocast, torch.compile(model, dynamic=cfg.collator.varies) if compiles else model)
    if cfg.collator.isolates:
        shape = (cfg.train.device_batch_size, cfg.train.seq_len)
        check_isolation(in_context(autocast, model.seen), shape, data.tokenizer.vocab_size, device)
    schedule = instantiate_config(cfg.schedule)
    return loop.TrainerComponents(
        model=model,
        loss_of=in_context(autocast, model.loss),
        optimizer=optimizer,
        lr_factor=lambda step: schedule(step, data.num_steps),
        loader=Loader(data.train, data.rows_per_step, cfg.train.device_batch_size, device, ranks.rank, ranks.world_size),
        evaluate=build_evaluation(cfg, data, model, losses_of, autocast, device, ranks, strategy),
        save=lambda s: save_checkpoint(cfg, setup, data, model, optimizer, tracker, ranks, strategy, s),
        track=tracker.log,
        show=tracker.update,
        stop_asked=stop_asked,
        ranks=ranks,
        strategy=strategy,
        max_grad_norm=cfg.train.max_grad_norm,
        checks_each_step=device.type == "cpu",
        flops_per_token=model.flops_per_token(cfg.train.seq_len),
        peak_flops=devices.peak_flops(device),
        meters=build_meters(device, strategy),
    ), state


def build_model(
    cfg: Config, vocab_size: int, start: Path | None, device: torch.device, ranks: Ranks, bf16: bool
) -> tuple[nn.Module, ParallelStrategy]:
    """The model on its device, ready to train as train.* ask for, and how it is spread over ranks."""
    model = instantiate_config(cfg.model, vocab_size=vocab_size, start=start, seed=cfg.run.seed)
    if not _is_sharded(cfg, ranks):
        model.to(device)
    return model, prepare_for_training(cfg, model, device, ranks, bf16)


def prepare_for_training(cfg: Config, model: nn.Module, device: torch.device, ranks: Ranks, bf16: bool) -> ParallelStrategy:
    """Apply fp8, activation checkpointing, parallelism and compilation; return the strategy."""
    if cfg.train.fp8:
        fp8.convert(model, device)
    asked = cfg.train.activation_checkpointing
    if asked != ActivationCheckpointing.none:
        model.checkpoint_activations(selective=asked == ActivationCheckpointing.selective)
    strategy = _build_strategy(cfg, model, device, ranks, torch.bfloat16 if bf16 else torch.float32)
    if devices.should_compile(cfg.train.compile, device):
        model.compile_trunk(dynamic=cfg.collator.varies, by_block=ranks.world_size > 1)
    return strategy


def _build_strategy(cfg: Config, model: nn.Module, device: torch.device, ranks: Ranks, dtype: torch.dtype) -> ParallelStrategy:
    if ranks.world_size == 1:
        if cfg.distributed.strategy == Strategy.fsdp:
            log.warning("distributed.strategy=fsdp, but there is one process: nothing is sharded, all is on it")
        return SingleProcess(dtype)
    return FSDP(model, ranks, dtype, device) if _is_sharded(cfg, ranks) else ZeroDDP(model, ranks, dtype)


def _is_sharded(cfg: Config, ranks: Ranks) -> bool:
    return cfg.distributed.strategy == Strategy.fsdp and ranks.world_size > 1


def build_meters(device: torch.device, strategy: ParallelStrategy) -> Callable[[], dict[str, float]]:
    """device.meters, and under ddp `train/sent_gib`: what this rank has sent of gradients and weights since it was last asked."""
    used = devices.meters(device)

    def read() -> dict[str, float]:
        if not isinstance(strategy, ZeroDDP):
            return used()
        sent, strategy.ranks.moved_bytes = strategy.ranks.moved_bytes / devices.GIB, 0.0
        return used() | {"train/sent_gib": sent}

    return read


def in_context(context: AbstractContextManager, function: Callable) -> Callable:
    """The function, with every call of it made inside the context: the autocast of a run."""

    def called(*arguments):
        with context:
            return function(*arguments)

    return called


def check_isolation(trunk: Callable, shape: tuple[int, int], vocab_size: int, device: torch.device) -> None:
    """Change the first document of each row, and see that the features of the second stay what they are, on this very
    device, compilation and number format. Raises RunFailed otherwise."""
    B, T = shape
    random = torch.Generator().manual_seed(0)
    inputs, others = (torch.randint(0, vocab_size, (B, T), generator=random) for _ in range(2))
    cut = T // 2
    positions = torch.cat([torch.arange(cut), torch.arange(T - cut)]).expand(B, T).contiguous()
    changed = torch.cat([others[:, :cut], inputs[:, cut:]], dim=1)
    cu_seqlens = torch.from_numpy(cu_seqlens_of(positions.numpy()))
    torch._dynamo.maybe_mark_dynamic(cu_seqlens, 0)  # as in training, so that both run the same graph
    before, after = (
        trunk(ids.to(device), None, positions.to(device), cu_seqlens.to(device)).detach()[:, cut:] for ids in (inputs, changed)
    )
    if not torch.equal(before, after):
        most = float((before - after).abs().max())
        raise RunFailed(
            f"documents are not isolated on {device}: changing one moves the features of its neighbour by up to "
            f"{most:.2g}. Use train.compile=false, or collator.isolate_documents=false"
        )


def build_evaluation(
    cfg: Config,
    data: RunData,
    model: nn.Module,
    losses_of: Callable,
    autocast: AbstractContextManager,
    device: torch.device,
    ranks: Ranks,
    strategy: ParallelStrategy,
) -> Callable[[int], dict[str, float]]:
    """One function from a step to all that the config asks to measure there: name -> value."""
    validation = (
        Validation(
            data.validation, data.validation_rows, cfg.train.device_batch_size, data.tokenizer.token_bytes(), device, ranks
        )
        if data.validation
        else None
    )
    choices = [
        MultipleChoice(name, asked, cfg.eval.batch_size, data.tokenizer.pad_id, device, ranks)
        for name, asked in data.question_sets.items()
    ]

    rarer = cfg.eval.multiple_choice_every

    def evaluate(step: int) -> dict[str, float]:
        ranks.at(f"the evaluation at step {step}")
        strategy.wait_for_weights()
        model.eval()
        metrics = validation(losses_of) if validation else {}
        if rarer is None or step % rarer == 0 or step == data.num_steps:
            for choice in choices:
                metrics |= choice(model, autocast)
        model.train()
        return metrics

    return evaluate


def build_tracker(
    cfg: Config, setup: RunSetup, ranks: Ranks, data: RunData, saved: checkpoint.CheckpointState | None
) -> Tracker | NullTracker:
    """What metrics go to; on ranks other than 0 nothing happens with them."""
    if not ranks.is_main:
        return NullTracker()
    sink = None
    if cfg.tracking.mlflow:
        uri = cfg.tracking.uri or f"sqlite:///{(Path(cfg.run.root) / 'mlflow.db').resolve()}"
        sink = MLflowSink(
            uri,
            cfg.tracking.experiment,
            f"{cfg.stage}/{setup.run_dir.name}",
            _flatten(asdict(cfg)),
            {"stage": cfg.stage, "run_dir": str(setup.run_dir)},
            saved.mlflow_run_id if saved else None,
        )
    return Tracker(setup.run_dir, data.num_steps, saved.step if saved else 0, sink)


def save_checkpoint(
    cfg: Config,
    setup: RunSetup,
    data: RunData,
    model: nn.Module,
    optimizer: Any,
    tracker: Tracker | NullTracker,
    ranks: Ranks,
    strategy: ParallelStrategy,
    state: loop.State,
) -> None:
    """Write the checkpoint of this state. Every rank takes part; rank 0 writes."""

    def write() -> None:
        saved = checkpoint.CheckpointState(
            step=state.step,
            tokens_seen=state.tokens_seen,
            supervised_tokens=state.supervised_tokens,
            stage=cfg.stage,
            model=model.shape,
            data_fingerprint=data.fingerprint,
            num_steps=data.num_steps,
            metrics=dict(tracker.last),
            mlflow_run_id=tracker.mlflow_run_id,
        )
        checkpoint.save(
            setup.run_dir, saved, weights, optimizer_state, data.tokenizer, to_yaml(cfg), cfg.checkpoint.keep, model.files
        )

    ranks.at(f"saving step {state.step}")
    weights, optimizer_state = strategy.full_weights(model), strategy.consolidate_state(optimizer.state())
    ranks.run_on_rank0(write)


def _flatten(tree: dict, prefix: str = "") -> dict:
    """Nested config to dotted keys, enums to their names."""
    flat: dict = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = (
                value if isinstance(value, str | int | float | bool | None) else getattr(value, "name", str(value))
            )
    return flat
