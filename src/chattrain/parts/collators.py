"""The check of collators, on conversations that are made for it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from chattrain.chat import chat_format
from chattrain.config.data import SourceConfig
from chattrain.data.batch import Batch
from chattrain.data.cache import load_or_tokenize
from chattrain.data.collators import EMPTY, Collator
from chattrain.data.mask_check import Policy, compare
from chattrain.data.mixture import Mixture
from chattrain.data.packing import IGNORE_INDEX
from chattrain.data.passes import PassLimits
from chattrain.parts.contracts import BuildsCollator, require
from chattrain.tokenizer import Tokenizer
from chattrain.tokenizer.special_tokens import SPECIAL_TOKENS

SEQ_LEN = 96
CONVERSATIONS = 40
BYTES = 256 + len(SPECIAL_TOKENS)  # a tokenizer without merges


def check_collator(build: BuildsCollator) -> None:
    """Raises ContractBroken unless rows are the same at every call and in every batch, batches are within seq_len and consistent,
    their targets carry the loss that `supervises` says of their documents, and passes hold each row of a step once, on any number
    of ranks."""
    with _mixture() as (mixture, tokenizer):
        collator = build(mixture, SEQ_LEN, tokenizer.pad_id, last_epoch=None)
        require(isinstance(collator, Collator), f"it is a {type(collator).__name__}, not a Collator")
        num_rows = collator.rows_in(1)
        require(isinstance(num_rows, int) and num_rows >= 1, f"rows_in(1) is {num_rows!r}, not a number of rows")
        require(collator.rows_in(2) >= num_rows, "two epochs have fewer rows than one")
        rows = np.arange(min(num_rows, 12))
        batch = collator.batch(rows)
        _check_batch(batch, len(rows))
        _check_masks(collator, rows, tokenizer)
        _check_rows(collator, rows, batch)
        _check_passes(collator)
        last = build(mixture, SEQ_LEN, tokenizer.pad_id, last_epoch=0)
        after = last.batch(np.array([EMPTY, num_rows + 1000]))
        require(
            not after.num_supervised and not after.num_tokens, "EMPTY rows, and with last_epoch=0 those behind it, have tokens"
        )


@contextmanager
def _mixture() -> Iterator[tuple[Mixture, Tokenizer]]:
    """Conversations of one and more turns, of which some are longer than a row, and some turns are flagged off."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        file, tokenizer = Path(folder) / "talk.jsonl", Tokenizer.train([], BYTES)
        lines = []
        for i in range(CONVERSATIONS):
            messages = []
            for turn in range(int(rng.integers(1, 4))):
                messages.append({"role": "user", "content": f"{i}.{turn} " + "q" * int(rng.integers(1, 12))})
                reply = {"role": "assistant", "content": "r" * int(rng.integers(1, 40)) + f" {i}"}
                messages.append(reply | ({"weight": 0} if turn and i % 5 == 0 else {}))
            lines.append(json.dumps({"messages": messages}))
        file.write_text("\n".join(lines))
        source = SourceConfig(str(file))
        cache = load_or_tokenize("talk", source, tokenizer, Path(folder) / "cache", workers=1)
        yield Mixture([cache], [source], seed=0), tokenizer


def _check_batch(batch: Batch, num_rows: int) -> None:
    require(isinstance(batch, Batch), f"batch returns a {type(batch).__name__}, not a Batch")
    shape = tuple(batch.inputs.shape)
    require(batch.inputs.dtype == batch.targets.dtype == torch.int64, "inputs and targets of a batch must be int64")
    require(tuple(batch.targets.shape) == shape, f"inputs are {shape} and targets {tuple(batch.targets.shape)}")
    require(shape[0] == num_rows and shape[1] <= SEQ_LEN, f"{num_rows} rows of at most {SEQ_LEN} tokens are a batch of {shape}")
    chosen = batch.targets != IGNORE_INDEX
    weights = chosen.float() if batch.weights is None else batch.weights
    require(not bool((weights[~chosen] != 0).any()), "targets that are ignored have a weight")


def _check_rows(collator: Collator, rows: np.ndarray, batch: Batch) -> None:
    again = collator.batch(rows)
    same = torch.equal(again.inputs, batch.inputs) and torch.equal(again.targets, batch.targets)
    require(same, "the same rows are another batch when asked again: a resumed run would differ")
    tokens, supervised = 0, 0
    for b, row in enumerate(rows):
        one = collator.batch(np.array([row]))
        width = min(one.targets.size(1), batch.targets.size(1))
        same = torch.equal(one.targets[0, :width], batch.targets[b, :width])
        rest = torch.cat([one.targets[0, width:], batch.targets[b, width:]])
        require(same and bool((rest == IGNORE_INDEX).all()), f"row {row} has other targets alone than beside other rows")
        require(bool(collator.describe(int(row))), f"describe({row}) says nothing")
        require(
            collator.count(np.array([row])) == (one.num_tokens, one.num_supervised),
            f"count of row {row} is {collator.count(np.array([row]))}, its batch has {(one.num_tokens, one.num_supervised)}",
        )
        tokens, supervised = tokens + one.num_tokens, supervised + one.num_supervised
    require((tokens, supervised) == (batch.num_tokens, batch.num_supervised), "rows alone have other counts than in one batch")


def _check_masks(collator: Collator, rows: np.ndarray, tokenizer: Tokenizer) -> None:
    found = compare(collator, [rows], Policy(collator.supervises, 0.0), chat_format(tokenizer).stop_ids)
    wrong = ", ".join([*(f"{count} {what}" for what, count in found.wrong.items()), *found.batches])
    where = f" (rows: {'; '.join(found.rows)})" if found.rows else ""
    require(not wrong, f"its targets are not those of supervises={collator.supervises.name}: {wrong}{where}")
    require(found.tokens > 0, "no document of the mixture can be found in its rows; say what they are made of in `pieces`")


def _check_passes(collator: Collator) -> None:
    for world_size in (1, 2, 3):
        for limits in (PassLimits(2, 2 * SEQ_LEN, "cpu"), PassLimits(4, 4 * SEQ_LEN, "cuda")):
            rows = np.arange(6 * world_size)
            passes = collator.split_micro_batches(rows, limits, world_size)
            shapes = {part.shape for part in passes}
            require(
                all(part.ndim == 2 and len(part) == world_size for part in passes), f"passes of {world_size} ranks are {shapes}"
            )
            given = np.concatenate([part.ravel() for part in passes])
            require(
                sorted(given[given != EMPTY].tolist()) == rows.tolist(),
                f"the passes of {world_size} ranks do not hold each row of the step once",
            )
