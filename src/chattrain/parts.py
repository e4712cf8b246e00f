"""The parts that the loop runs on, built in each process: model, strategy, optimizer, data, evaluations, tracker, checkpoints."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path

import torch

from chattrain import checkpoint, device, loop
from chattrain.config import ActivationCheckpointing, Config, Strategy
from chattrain.data.loader import Loader
from chattrain.data.packing import cu_seqlens_of
from chattrain.distributed import Ranks
from chattrain.errors import RunFailed, UserError
from chattrain.evals.multiple_choice import MultipleChoice
from chattrain.evals.validation import Validation
from chattrain.mlflow_sink import MLflowSink
from chattrain.model import fp8
from chattrain.parallel.alone import Alone
from chattrain.parallel.ddp import DDP
from chattrain.parallel.fsdp import FSDP
from chattrain.prepare import Plan, RunData, build_part
from chattrain.schema import to_yaml
from chattrain.tracking import NullTracker, Tracker

log = logging.getLogger("chattrain")


def build_parts(cfg: Config, plan: Plan, ranks: Ranks, data: RunData, tracker, stop_asked,
                saved: checkpoint.CheckpointState | None) -> tuple[loop.Parts, loop.State]:
    """Model, optimizer, data and evals of this process, and the state that they start in."""
    where = device.pick_device(cfg.train.device, ranks.local_rank)
    bf16 = device.use_bf16(cfg.train.dtype, where)
    model, strategy = build_model(cfg, data.tokenizer.vocab_size, plan.start.checkpoint, where, ranks, bf16)
    optimizer = build_part(cfg.optimizer, model, strategy)
    state = loop.State()
    if saved:
        state = loop.State(saved.step, saved.tokens_seen, saved.supervised_tokens)
        try:
            optimizer.load_state(strategy.pieces(checkpoint.load_optimizer(plan.resume)))
        except ValueError as error:
            raise UserError(f"{plan.resume}: {error}; use the optimizer that the run began with") from error
    autocast = device.autocast(bf16, where)
    # On a CPU the few passes of an evaluation are over before compiling them would be.
    compiles = model.compiles and where.type == "cuda" and not isinstance(strategy, FSDP)
    measured = inside(autocast, torch.compile(model, dynamic=cfg.collator.varies) if compiles else model)
    if cfg.collator.isolates:
        shape = (cfg.train.device_batch_size, cfg.train.seq_len)
        check_isolation(inside(autocast, model.seen), shape, data.tokenizer.vocab_size, where)
    schedule = build_part(cfg.schedule)
    return loop.Parts(
        model=model, loss_of=inside(autocast, model.loss), optimizer=optimizer,
        lr_factor=lambda step: schedule(step, data.num_steps),
        loader=Loader(data.train, data.rows_per_step, cfg.train.device_batch_size, where, ranks.rank, ranks.world_size),
        evaluate=build_evaluation(cfg, data, model, measured, autocast, where, ranks, strategy),
        save=lambda s: save_checkpoint(cfg, plan, data, model, optimizer, tracker, ranks, strategy, s),
        track=tracker.log, show=tracker.update, stop_asked=stop_asked, ranks=ranks,
        max_grad_norm=cfg.train.max_grad_norm, flops_per_token=model.flops_per_token(cfg.train.seq_len),
        peak_flops=device.peak_flops(where), meters=meters(where, strategy), strategy=strategy), state


def build_model(cfg: Config, vocab_size: int, start: Path | None, where: torch.device, ranks: Ranks, bf16: bool):
    """The model on its device, ready to train: in fp8, with activations recomputed, compiled, as train.* ask for; and how it
    is spread over ranks."""
    model = build_part(cfg.model, vocab_size=vocab_size, start=start, seed=cfg.run.seed)
    if not _sharded(cfg, ranks):
        model.to(where)
    return model, make_ready(cfg, model, where, ranks, bf16)


def _sharded(cfg: Config, ranks: Ranks) -> bool:
    return cfg.distributed.strategy == Strategy.fsdp and ranks.world_size > 1


def make_ready(cfg: Config, model, where: torch.device, ranks: Ranks, bf16: bool) -> Alone:
    """Do to a model what `build_model` promises, but for weights and their place; returns how it is spread."""
    if cfg.train.fp8:
        fp8.convert(model, where)
    asked = cfg.train.activation_checkpointing
    if asked != ActivationCheckpointing.none:
        model.checkpoint_activations(selective=asked == ActivationCheckpointing.selective)
    dtype = torch.bfloat16 if bf16 else torch.float32
    if ranks.world_size == 1:
        if cfg.distributed.strategy == Strategy.fsdp:
            log.warning("distributed.strategy=fsdp, but there is one process: nothing is sharded, all is on it")
        strategy = Alone(dtype)
    else:
        strategy = FSDP(model, ranks, dtype, where) if _sharded(cfg, ranks) else DDP(model, ranks, dtype)
    if device.compiles(cfg.train.compile, where):
        model.compile_trunk(dynamic=cfg.collator.varies, by_block=ranks.world_size > 1)
    return strategy


def meters(where: torch.device, strategy: Alone):
    """device.meters, and train/sent_gib under ddp: what this rank has sent of gradients and weights since it was last asked."""
    used = device.meters(where)

    def read() -> dict[str, float]:
        if not isinstance(strategy, DDP):
            return used()
        sent, strategy.ranks.moved_bytes = strategy.ranks.moved_bytes / device.GIB, 0.0
        return used() | {"train/sent_gib": sent}

    return read


def inside(context, function):
    """The function, each call of it in the number format of the run."""
    def called(*arguments):
        with context:
            return function(*arguments)
    return called


def check_isolation(trunk, shape: tuple[int, int], vocab_size: int, where: torch.device) -> None:
    """Change the first document of each row, and see that what the model makes of the second stays what it is, on this very
    device, compilation and number format. Raises RunFailed otherwise."""
    B, T = shape
    random = torch.Generator().manual_seed(0)
    inputs, others = (torch.randint(0, vocab_size, (B, T), generator=random) for _ in range(2))
    cut = T // 2
    positions = torch.cat([torch.arange(cut), torch.arange(T - cut)]).expand(B, T).contiguous()
    changed = torch.cat([others[:, :cut], inputs[:, cut:]], dim=1)
    begins = torch.from_numpy(cu_seqlens_of(positions.numpy()))
    torch._dynamo.maybe_mark_dynamic(begins, 0)  # as in training, so that both run the same graph
    before, after = (trunk(ids.to(where), None, positions.to(where), begins.to(where)).detach()[:, cut:]
                     for ids in (inputs, changed))
    if not torch.equal(before, after):
        most = float((before - after).abs().max())
        raise RunFailed(f"documents are not isolated on {where}: changing one moves the features of its neighbour by up to "
                        f"{most:.2g}. Use train.compile=false, or collator.isolate_documents=false")


def build_evaluation(cfg: Config, data: RunData, model, losses_of, autocast, where: torch.device, ranks: Ranks,
                     strategy: Alone):
    """One function from a step to all that the config asks to measure there: name -> value."""
    validation = Validation(data.validation, data.validation_rows, cfg.train.device_batch_size,
                            data.tokenizer.token_bytes(), where, ranks) if data.validation else None
    choices = [MultipleChoice(name, asked, cfg.eval.batch_size, data.tokenizer.pad_id, where, ranks)
               for name, asked in data.question_sets.items()]

    rarer = cfg.eval.multiple_choice_every

    def evaluate(step: int) -> dict[str, float]:
        ranks.at(f"the evaluation at step {step}")
        strategy.settle()
        model.eval()
        metrics = validation(losses_of) if validation else {}
        if rarer is None or step % rarer == 0 or step == data.num_steps:
            for choice in choices:
                metrics |= choice(model, autocast)
        model.train()
        return metrics

    return evaluate


def build_tracker(cfg: Config, plan: Plan, ranks: Ranks, data: RunData, saved: checkpoint.CheckpointState | None):
    if not ranks.is_main:
        return NullTracker()
    sink = None
    if cfg.tracking.mlflow:
        uri = cfg.tracking.uri or f"sqlite:///{(Path(cfg.run.root) / 'mlflow.db').resolve()}"
        sink = MLflowSink(uri, cfg.tracking.experiment, f"{cfg.stage}/{plan.run_dir.name}", _flatten(asdict(cfg)),
                          {"stage": cfg.stage, "run_dir": str(plan.run_dir)}, saved.mlflow_run_id if saved else None)
    return Tracker(plan.run_dir, data.num_steps, saved.step if saved else 0, sink)


def save_checkpoint(cfg: Config, plan: Plan, data: RunData, model, optimizer, tracker, ranks: Ranks, strategy: Alone,
                    state: loop.State) -> None:
    def write() -> None:
        saved = checkpoint.CheckpointState(
            step=state.step, tokens_seen=state.tokens_seen, supervised_tokens=state.supervised_tokens, stage=cfg.stage,
            model=model.shape, data_fingerprint=data.fingerprint, num_steps=data.num_steps, metrics=dict(tracker.last),
            mlflow_run_id=tracker.mlflow_run_id)
        checkpoint.save(plan.run_dir, saved, weights, optimizer_state, data.tokenizer, to_yaml(cfg), cfg.checkpoint.keep,
                        model.files)

    ranks.at(f"saving step {state.step}")
    weights, optimizer_state = strategy.weights(model), strategy.gather(optimizer.state())
    ranks.first(write)


def _flatten(tree: dict, prefix: str = "") -> dict:
    """Nested config to dotted keys, enums to their names."""
    flat: dict = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str | int | float | bool | None) else \
                getattr(value, "name", str(value))
    return flat
