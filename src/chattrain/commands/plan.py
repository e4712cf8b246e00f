"""command=plan: what a run would need on other devices: memory, steps, tokens, traffic, time and money. Starts no training."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from chattrain.config import Config
from chattrain.config.model import GPTConfig, HFModelConfig
from chattrain.errors import UserError
from chattrain.planning import cost, show
from chattrain.planning.data import count, shape_of
from chattrain.planning.hardware import Hardware, hardware_of
from chattrain.planning.memory import Memory, largest, step_memory
from chattrain.planning.work import workload
from chattrain.setup.data import RunData, open_data, report_counts
from chattrain.setup.start import Start, find_start
from chattrain.setup.tokenizer import choose_tokenizer
from chattrain.tracking.console import setup_logging

log = logging.getLogger("chattrain")
MAX_ROWS = 1024  # the largest train.device_batch_size that is tried


def main(cfg: Config) -> dict:
    """Print the plan for plan.world_size devices and return its figures. Memory is measured on tensors without data; time is an
    estimate.

    Raises UserError for what cannot be planned: a Hugging Face model without its folder, fp8, a batch that does not divide.
    """
    close_log = setup_logging(None, console=True, resume=False)
    try:
        hardware = hardware_of(cfg.plan)
        start = _start(cfg)
        cfg.eval.validation = cfg.eval.multiple_choice = False  # only training rows are planned
        data = open_data(cfg, choose_tokenizer(cfg, start.checkpoint), cfg.plan.world_size)
        report_counts(data.train, data.num_steps)
        counts = count(data, cfg.train.device_batch_size, cfg.plan.world_size)
        work, groups = workload(cfg, data, start.checkpoint, counts)
        memory, fits = _memory(cfg, data, start, hardware.usable)
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
            **_batch(cfg, data, fits),
            "flops_per_token": work.flops_a_token,
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
    finally:
        close_log()


def _source_of_mfu(cfg: Config, hardware: Hardware) -> str:
    if cfg.plan.mfu is not None:
        return "as given"
    return f"measured on this device with {hardware.measured.run}" if hardware.measured else "assumed"


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


def _memory(cfg: Config, data: RunData, start: Start, limit: float) -> tuple[Memory, int]:
    """Memory at train.device_batch_size, and the largest device_batch_size whose peak is within `limit` bytes."""
    isolated, varies, rank_rows = (
        cfg.collator.isolates,
        cfg.collator.has_varying_shapes,
        data.rows_per_step // cfg.plan.world_size,
    )
    measured: dict[int, Memory] = {}

    def measure(rows: int) -> int:
        if rows not in measured:
            shape = shape_of(data.train, isolated, varies, rows, repeats=rows < rank_rows)
            measured[rows] = step_memory(cfg, data.tokenizer.vocab_size, start.checkpoint, shape, cfg.plan.world_size)
        return measured[rows].peak

    batch_size = cfg.train.device_batch_size
    measure(batch_size)
    return measured[batch_size], largest(measure, limit, batch_size, max(batch_size, min(rank_rows, MAX_ROWS)))


def _batch(cfg: Config, data: RunData, fits: int) -> dict[str, Any]:
    """The largest device_batch_size that fits and divides a rank's rows of a step, and how many micro-batches that makes."""
    rank_rows = data.rows_per_step // cfg.plan.world_size
    rows = max((b for b in range(1, min(fits, rank_rows) + 1) if rank_rows % b == 0), default=None)
    return {"suggested_device_batch_size": rows, "grad_accum_steps": rank_rows // rows if rows else None}
