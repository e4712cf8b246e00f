"""What command=plan expects of a step on full rows: python -m benchmarks.gpu_check.forecast FILE key=value ..."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from chattrain.config import Config
from chattrain.config.compose import compose
from chattrain.device import GIB
from chattrain.planning import cost
from chattrain.planning.data import Counts
from chattrain.planning.hardware import hardware_of
from chattrain.planning.memory import MicroBatchSpec, step_memory
from chattrain.planning.work import workload

DEVICES = {
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA A100-SXM4-80GB": "a100",
}  # plan.device of torch's names


def main(file: Path, overrides: list[str]) -> None:
    cfg = compose(["stage=base", "eval=none", "tracking=none", *overrides])
    rows, vocab_size = cfg.train.rows_a_step(1), cfg.tokenizer.vocab_size
    repeats = rows > cfg.train.device_batch_size
    shape = MicroBatchSpec(cfg.train.device_batch_size, cfg.train.seq_len, partial=False, isolated=False, repeats=repeats)
    memory = step_memory(cfg, vocab_size, None, shape)
    found = {"peak_gib": memory.peak / GIB, "at_peak_gib": {name: size / GIB for name, size in memory.at_peak.items()}}
    known = DEVICES.get(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    file.write_text(json.dumps(found | (times(cfg, rows, known) if known else {})), encoding="utf-8")


def times(cfg: Config, rows: int, device: str) -> dict[str, Any]:
    """Seconds of a step and of the optimizer on one such device."""
    cfg.plan.device, cfg.plan.world_size = type(cfg.plan.device)[device], 1
    tokens = rows * cfg.train.seq_len
    data: Any = SimpleNamespace(tokenizer=SimpleNamespace(vocab_size=cfg.tokenizer.vocab_size), num_steps=1, rows_per_step=rows)
    counts = Counts(tokens, tokens, tokens, exact=True, rows_a_pass=cfg.train.device_batch_size)
    (work, _), hardware = workload(cfg, data, None, counts), hardware_of(cfg.plan)
    mfu = cfg.plan.mfu or hardware.mfu
    step = cost.step_on(work, hardware, mfu, 1)
    return {"device": device, "mfu": mfu, "tokens": tokens, "step_s": step.seconds, "optimizer_s": step.update_s}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
