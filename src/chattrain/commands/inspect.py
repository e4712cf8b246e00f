"""command=inspect: rows of the first step as the model will see them, token by token, with supervised tokens marked."""

from __future__ import annotations

import sys

import numpy as np

from chattrain.config import Config
from chattrain.data.packing import IGNORE_INDEX
from chattrain.parallel import launch
from chattrain.setup.data import open_data, report_data
from chattrain.setup.start import find_start
from chattrain.setup.tokenizer import choose_tokenizer
from chattrain.tokenizer import AnyTokenizer
from chattrain.tracking.console import setup_logging


def main(cfg: Config) -> dict:
    """Print inspect.rows rows with their supervised tokens marked, and the counts of the mixture. Starts no training."""
    close_log = setup_logging(None, console=True, resume=False)
    start = find_start(cfg)
    world_size = launch.processes_here(cfg.distributed.nproc, cfg.train.device)
    cfg.eval.validation = cfg.eval.multiple_choice = False  # only training rows are shown
    data = open_data(cfg, choose_tokenizer(cfg, start.checkpoint), world_size)
    report_data(data)
    shown = min(cfg.inspect.rows, data.rows_per_step)
    batch = data.train.batch(np.arange(shown))
    print("Supervised tokens are " + ("green." if sys.stdout.isatty() else "in [brackets].") + " Padding is left out.\n")
    for row in range(shown):
        print(f"row {row}: {data.train.describe(row)}")
        print(_mark_supervised(data.tokenizer, batch.inputs[row].tolist(), batch.targets[row].tolist()) + "\n")
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


def _mark_supervised(tokenizer: AnyTokenizer, inputs: list[int], targets: list[int]) -> str:
    """The row as text without its padding. Tokens that are targets are green on a terminal, in [brackets] elsewhere."""
    out, tty = [tokenizer.decode(inputs[:1])], sys.stdout.isatty()
    last = max(i for i, target in enumerate(targets) if target != IGNORE_INDEX)
    inputs, targets = inputs[: last + 1], targets[: last + 1]
    following = inputs[1:] + targets[-1:]
    for token, target in zip(following, targets, strict=True):
        if target == IGNORE_INDEX:
            out.append(tokenizer.decode([token]) if token != IGNORE_INDEX else "")
        else:
            text = tokenizer.decode([target])
            out.append(f"\033[32m{text}\033[0m" if tty else f"[{text}]")
            if token != target:  # isolated documents: the next one begins, and its first token is no target
                out.append(tokenizer.decode([token]))
    return "".join(out)
