"""command=plan: what a run would need on other devices: memory, steps, tokens, traffic, time and money. Starts no training."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from chattrain.config import Config
from chattrain.config.eval import EvalConfig
from chattrain.config.model import GPTConfig, HFModelConfig
from chattrain.config.words import Compile, Device
from chattrain.data.passes import PassLimits
from chattrain.errors import UserError
from chattrain.planning import cost, show
from chattrain.planning.data import count, shape_of
from chattrain.planning.hardware import Hardware, hardware_of
from chattrain.planning.memory import Memory, MicroBatchSpec, largest, step_memory
from chattrain.planning.work import workload
from chattrain.setup.compilation import choose, planned_work
from chattrain.setup.data import RunData, open_data, pass_limits
from chattrain.setup.report_data import report_data
from chattrain.setup.start import Start, find_start
from chattrain.setup.tokenizer import choose_tokenizer

log = logging.getLogger("chattrain")
MAX_ROWS = 1024  # the largest train.device_batch_size that is tried


def main(cfg: Config) -> dict:
    """Print the plan for plan.world_size devices and return its figures. Memory is measured on tensors without data; time is an
    estimate.

    Raises UserError for what cannot be planned: a Hugging Face model without its folder, fp8, a batch that does not divide.
    """
    hardware = hardware_of(cfg.plan)
    _check_batch(cfg)
    start = _start(cfg)
    cfg.eval = EvalConfig(prompts=[])  # only training rows are planned
    data = open_data(cfg, choose_tokenizer(cfg, start.checkpoint), cfg.plan.world_size)
    report_data(data)
    limits = pass_limits(cfg.train, "cpu" if cfg.train.device == Device.cpu else "cuda")
    if cfg.train.compile == Compile.auto.value:
        compilation = choose(planned_work(cfg, data, start, cfg.plan.world_size, limits.device))
        log.info(compilation.reason)
        cfg.train.compile = compilation.on
    counts = count(data, limits, cfg.plan.world_size)
    work, groups = workload(cfg, data, start.checkpoint, counts)
    memory, fits = _memory(cfg, data, start, limits, hardware.usable)
    mfu = cfg.plan.mfu or hardware.mfu
    step = cost.step_on(work, hardware, mfu, cfg.plan.world_size)
    rows = cost.scaling(work, hardware, mfu)
    hours = cost.hours_of(work, step)
    price = cfg.plan.price_per_gpu_hour
    facts = {
        "device": hardware.name,
        "world_size": cfg.plan.world_size,
        "mfu": mfu,
        "mfu_is": _source_of_mfu(cfg, hardware),
        "strategy": work.strategy,
        "parameters": groups,
        "parameters_total": sum(groups.values()),
        "memory": asdict(memory),
        "usable_bytes": int(hardware.usable),
        "fits": memory.peak <= hardware.usable,
        "largest_device_batch_size": fits,
        "all_rows_fit": fits == data.rows_per_step // cfg.plan.world_size,
        **_batch(cfg, data, limits, fits),
        "flops_per_token": work.flops_a_token,
        "data": _name_data(cfg, data),
        "num_steps": data.num_steps,
        "tokens": counts.tokens,
        "supervised_tokens": counts.supervised,
        "supervised_exact": counts.exact,
        "bytes_sent_per_step": step.bytes_sent,
        "seconds_per_step": step.seconds,
        "hours": hours,
        "cost": None if price is None else hours * cfg.plan.world_size * price,
        "communication_dominates_from": cost.dominated_from(rows),
        "scaling": [show.scaling_row(work, row, price) for row in rows],
    }
    show.plan(facts, step, cfg)
    return facts


def _check_batch(cfg: Config) -> None:
    try:
        cfg.train.rows_a_step(cfg.plan.world_size, padded=cfg.collator.has_varying_shapes)
    except UserError as error:
        raise UserError(f"{error}. The ranks are those of plan.world_size={cfg.plan.world_size}") from error


def _source_of_mfu(cfg: Config, hardware: Hardware) -> str:
    if cfg.plan.mfu is not None:
        return "as given"
    return f"measured on this device with {hardware.measured.run}" if hardware.measured else "assumed"


def _name_data(cfg: Config, data: RunData) -> str:
    """The data that the plan counts, in words: steps, time and cost are those of these documents alone."""
    sources = cfg.data.mixture(cfg.stage).train
    names = ", ".join(f"{name} ({source.path})" if source.path != name else name for name, source in sources.items())
    text = f"{data.train.counts.documents:,} documents an epoch: {names}"
    if all(source.path.startswith("generate:") for source in sources.values()):
        text += ". All are generated, for a demo: data=local or data=nanochat counts real data"
    return text


def _start(cfg: Config) -> Start:
    """What the run would start from. A plan needs only sizes: where there are no weights yet, it warns and plans without. Of a
    Hugging Face folder, config.json and the tokenizer's files are enough."""
    named = Path(cfg.init.source).expanduser()
    if isinstance(cfg.model, HFModelConfig) and (named / "config.json").is_file():
        return Start(named.resolve(), str(named))
    level = log.level
    log.setLevel(logging.WARNING)  # find_start would log a line for each run that it skips
    try:
        return find_start(cfg)
    except UserError as error:
        if not isinstance(cfg.model, GPTConfig):
            raise
        log.warning("%s. The plan needs only the sizes of weights, so it is made without them", error)
        return Start(None, "nothing")
    finally:
        log.setLevel(level)


def _memory(cfg: Config, data: RunData, start: Start, limits: PassLimits, usable: float) -> tuple[Memory, int]:
    """Memory of the configured passes, and the largest device_batch_size whose peak is within `usable` bytes; of padded rows,
    the largest number of whole rows whose tokens make a pass that is."""
    isolated, padded = cfg.collator.isolates, cfg.collator.has_varying_shapes
    rank_rows = data.rows_per_step // cfg.plan.world_size
    measured: dict[MicroBatchSpec, Memory] = {}

    def measure(limits: PassLimits) -> Memory:
        shape = shape_of(data.train, isolated, padded, limits, rank_rows)
        if shape not in measured:
            measured[shape] = step_memory(cfg, data.tokenizer.vocab_size, start.checkpoint, shape, cfg.plan.world_size)
        return measured[shape]

    def peak_of(rows: int) -> int:
        return measure(_of_rows(limits, rows, cfg.train.seq_len)).peak

    first = cfg.train.device_batch_size
    return measure(limits), largest(peak_of, usable, first, max(first, min(rank_rows, MAX_ROWS)))


def _batch(cfg: Config, data: RunData, limits: PassLimits, fits: int) -> dict[str, Any]:
    """The largest device_batch_size that fits and divides a rank's rows of a step, and how many micro-batches that makes.

    Of padded rows, the largest device_batch_tokens that fits, and how many micro-batches that makes on average.
    """
    rank_rows, seq_len = data.rows_per_step // cfg.plan.world_size, cfg.train.seq_len
    if cfg.collator.has_varying_shapes:
        rows = count(data, _of_rows(limits, fits, seq_len), cfg.plan.world_size).rows_a_pass if fits else None
        suggested: dict[str, Any] = {"suggested_device_batch_size": fits or None, "largest_device_batch_tokens": fits * seq_len}
    else:
        rows = max((b for b in range(1, min(fits, rank_rows) + 1) if rank_rows % b == 0), default=None)
        suggested = {"suggested_device_batch_size": rows, "largest_device_batch_tokens": None}
    return {**suggested, "grad_accum_steps": math.ceil(rank_rows / rows) if rows else None}


def _of_rows(limits: PassLimits, rows: int, seq_len: int) -> PassLimits:
    """The limits of train.device_batch_size=rows."""
    return replace(limits, rows=rows, tokens=rows * seq_len)
