"""command=inspect: what the model will see: rows of the first step, token by token, with what is supervised."""

from __future__ import annotations

import sys

import numpy as np

from chattrain.config import Config
from chattrain.data.packing import IGNORE_INDEX
from chattrain.parallel import launch
from chattrain.setup.data import open_data, report_counts
from chattrain.setup.start import find_start
from chattrain.setup.tokenizer import choose_tokenizer
from chattrain.tracking.console import setup_logging


def main(cfg: Config) -> dict:
    """Print inspect.rows rows, supervised targets in green, and the counts of the mixture. Starts no training."""
    close_log = setup_logging(None, console=True, resume=False)
    start = find_start(cfg)
    world_size = launch.processes_here(cfg.distributed.nproc, cfg.train.device)
    cfg.eval.validation = cfg.eval.multiple_choice = False  # only the training rows are looked at
    data = open_data(cfg, choose_tokenizer(cfg, start.checkpoint), world_size)
    report_counts(data.train, data.num_steps)
    shown = min(cfg.inspect.rows, data.rows_per_step)
    batch = data.train.batch(np.arange(shown))
    print("Supervised tokens stand in " + ("green." if sys.stdout.isatty() else "[brackets].") + " Padding is left out.\n")
    for row in range(shown):
        print(f"row {row}: {data.train.describe(row)}")
        print(_colour(data, batch.inputs[row].tolist(), batch.targets[row].tolist()) + "\n")
    facts = {
        "documents_an_epoch": data.train.counts.documents,
        "rows_per_step": data.rows_per_step,
        "num_steps": data.num_steps,
        "truncated": data.train.counts.truncated,
        "left_out": data.train.counts.left_out,
        "tokens_shown": batch.num_tokens,
        "supervised_shown": batch.num_supervised,
    }
    for name, value in facts.items():
        print(f"{name:20s} {value:,}")
    close_log()
    return facts


def _colour(data, inputs: list[int], targets: list[int]) -> str:
    """The row as text; each token that is a target stands in green on a terminal, in [brackets] elsewhere."""
    out, tty = [data.tokenizer.decode(inputs[:1])], sys.stdout.isatty()
    last = max(i for i, target in enumerate(targets) if target != IGNORE_INDEX)
    inputs, targets = inputs[: last + 1], targets[: last + 1]
    following = inputs[1:] + targets[-1:]
    for token, target in zip(following, targets, strict=True):
        if target == IGNORE_INDEX:
            out.append(data.tokenizer.decode([token]) if token != IGNORE_INDEX else "")
        else:
            text = data.tokenizer.decode([target])
            out.append(f"\033[32m{text}\033[0m" if tty else f"[{text}]")
            if token != target:  # the next document begins, and its first token is no target
                out.append(data.tokenizer.decode([token]))
    return "".join(out)
