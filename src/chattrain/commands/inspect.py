"""command=inspect: rows of the first step as the model will see them, with the loss weight of each token marked."""

from __future__ import annotations

import sys

import numpy as np

from chattrain.config import Config
from chattrain.data.batch import Batch
from chattrain.data.packing import IGNORE_INDEX
from chattrain.parallel import launch
from chattrain.setup.data import describe_sources, open_data
from chattrain.setup.start import find_start
from chattrain.setup.tokenizer import choose_tokenizer
from chattrain.tokenizer import AnyTokenizer
from chattrain.tracking.console import setup_logging


def main(cfg: Config) -> dict:
    """Print inspect.rows rows with the loss weights of their tokens marked, and the counts of the mixture. Starts no training."""
    close_log = setup_logging(None, console=True, resume=False)
    start = find_start(cfg)
    world_size = launch.processes_here(cfg.distributed.nproc, cfg.train.device)
    cfg.eval.validation = cfg.eval.multiple_choice = False  # only training rows are shown
    data = open_data(cfg, choose_tokenizer(cfg, start.checkpoint), world_size)
    shown = min(cfg.inspect.rows, data.rows_per_step)
    batch = data.train.batch(np.arange(shown))
    print(_legend(data.train.mixture.weights.prompt_weight) + "\n")
    for row in range(shown):
        print(f"row {row}: {data.train.describe(row)}")
        print(_mark_weights(data.tokenizer, batch, row) + "\n")
    facts = {
        "documents_an_epoch": data.train.counts.documents,
        "rows_per_step": data.rows_per_step,
        "num_steps": data.num_steps,
        "truncated": data.train.counts.truncated,
        "left_out": data.train.counts.left_out,
        "tokens_shown": batch.num_tokens,
        "supervised_shown": batch.num_supervised,
        "loss_weight_shown": batch.loss_weight,
    }
    for name, value in facts.items():
        print(f"{name:20s} {value:,.8g}")
    print("\nan epoch holds")
    for line in describe_sources(data.train):
        print(f"  {line}")
    close_log()
    return facts


def _legend(prompt_weight: float) -> str:
    supervised, weighed = ("green", "yellow") if sys.stdout.isatty() else ("in [brackets]", "in (parentheses)")
    between = f" Those of loss weight {prompt_weight:g} are {weighed}." if prompt_weight else ""
    return f"Supervised tokens, of loss weight 1, are {supervised}.{between} Padding is left out."


def _mark_weights(tokenizer: AnyTokenizer, batch: Batch, row: int) -> str:
    """The row as text without its padding, each token marked by its weight as a target."""
    inputs, targets = batch.inputs[row].tolist(), batch.targets[row].tolist()
    weights = (batch.targets[row] != IGNORE_INDEX).tolist() if batch.weights is None else batch.weights[row].tolist()
    last = max((i for i, weight in enumerate(weights) if weight), default=-1)
    out, following = [tokenizer.decode(inputs[:1])], inputs[1:] + targets[-1:]
    for token, target, weight in list(zip(following, targets, weights, strict=True))[: last + 1]:
        if not weight:
            out.append(tokenizer.decode([token]) if token != IGNORE_INDEX else "")
            continue
        out.append(_marked(tokenizer.decode([target]), weight))
        if token != target:  # isolated documents: the next one begins, and its first token is no target
            out.append(tokenizer.decode([token]))
    return "".join(out)


def _marked(text: str, weight: float) -> str:
    if sys.stdout.isatty():
        return f"\033[{32 if weight == 1 else 33}m{text}\033[0m"
    return f"[{text}]" if weight == 1 else f"({text})"
