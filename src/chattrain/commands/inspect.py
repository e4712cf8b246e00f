"""command=inspect: rows of the first step as the model will see them, with the loss weight of each token marked."""

from __future__ import annotations

import sys

import numpy as np

from chattrain.config import Config
from chattrain.config.commands import InspectConfig
from chattrain.data.batch import Batch
from chattrain.data.packing import IGNORE_INDEX
from chattrain.errors import UserError
from chattrain.parallel import launch
from chattrain.setup.data import RunData, open_data
from chattrain.setup.report_data import describe_left_out, describe_sources, report_notes
from chattrain.setup.start import find_start
from chattrain.setup.tokenizer import choose_tokenizer
from chattrain.tokenizer import AnyTokenizer


def main(cfg: Config) -> dict:
    """Print inspect.rows rows with the loss weights of their tokens marked, and the counts of the mixture. Starts no training."""
    start = find_start(cfg)
    world_size = launch.processes_here(cfg.distributed.nproc, cfg.train.device)
    cfg.eval.validation = cfg.eval.multiple_choice = False  # only training rows are shown
    data = open_data(cfg, choose_tokenizer(cfg, start.checkpoint), world_size)
    report_notes(data)
    rows = _rows(cfg.inspect, data)
    batch = data.train.batch(rows)
    print(_legend(data.train.mixture.weights.prompt_weight) + "\n")
    first = (cfg.inspect.step - 1) * data.rows_per_step
    for i, row in enumerate(rows.tolist()):
        print(f"row {row - first}: {data.train.describe(row)}")
        print(_mark_weights(data.tokenizer, batch, i) + "\n")
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
    for line in describe_left_out(data.train):
        print(line)
    return facts


def _rows(config: InspectConfig, data: RunData) -> np.ndarray:
    """The row indices to show. Raises UserError for a step or a row beyond the end, and for a source that no row has."""
    if config.step > data.num_steps:
        raise UserError(f"inspect.step={config.step} is beyond the run's {data.num_steps} steps")
    if config.row is not None and config.row >= data.rows_per_step:
        raise UserError(f"inspect.row={config.row} is beyond the {data.rows_per_step} rows of a step, which count from 0")
    rows = np.arange(data.rows_per_step) + (config.step - 1) * data.rows_per_step
    if config.row is not None:
        return rows[[config.row]]
    if config.source is not None:
        names = [cache.name for cache in data.train.mixture.caches]
        if config.source not in names:
            raise UserError(f"inspect.source={config.source} is no source of this training; it has {', '.join(names)}")
        index = names.index(config.source)
        rows = np.array([row for row in rows.tolist() if _holds(data, row, index)], dtype=np.int64)
        if not len(rows):
            raise UserError(f"step {config.step} has no row of source {config.source}; try another inspect.step")
    return rows[: config.rows]


def _holds(data: RunData, row: int, source: int) -> bool:
    """Does a target of the row come from this source?"""
    batch = data.train.batch(np.array([row]))
    return batch.sources is not None and bool(((batch.sources == source) & (batch.targets != IGNORE_INDEX)).any())


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
