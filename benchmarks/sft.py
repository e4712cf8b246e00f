"""Supervised tokens a second of sft on conversations, masked and best_fit, against batches padded in random order.

d6, rows of up to 512 tokens. The reference pads 8 random conversations to the longest, computes all logits and the mean loss of
each micro-batch, uncompiled because its widths vary (as in nanochat's chat_sft), and steps torch.optim.Muon and torch.optim.AdamW
after 32 conversations. If BENCHMARK_DATA names a folder with sgd/ and gsm8k/main/ (Parquet, the hub's columns), the conversations
are real, otherwise generated and short.

    python -m benchmarks.sft [vocabulary]

The vocabulary defaults to nanochat's 65,536 tokens; data may yield fewer (those two sets yield 23,970).
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.mid import MODEL, stock_optimizers
from benchmarks.timing import show
from chattrain import loop
from chattrain.config.compose import compose
from chattrain.device import autocast, meters, pick_device, use_bf16
from chattrain.model.gpt import GPT
from chattrain.parallel.ranks import Ranks
from chattrain.parallel.signals import Signals
from chattrain.setup.build import build_components
from chattrain.setup.plan import setup_run
from chattrain.tracking.tracker import NullTracker

ROWS, SEQ_LEN, CONVERSATIONS, SECONDS = 8, 512, 32, 15.0
VOCAB_SIZE = 65_536


def measure(vocab_size: int = VOCAB_SIZE) -> list[dict]:
    """Runs all in alternation, each for the same time, after warm-up steps that compile."""
    with tempfile.TemporaryDirectory() as folder:
        runs = {collator: Ours(collator, folder, vocab_size) for collator in ("masked", "best_fit")}
        reference = Reference(runs["masked"].cfg, runs["masked"].data)
        cases = {**runs, "reference": reference}
        rates = {name: [] for name in cases}
        for run in cases.values():
            run.warm_up()
        for _ in range(3):
            for name, run in cases.items():
                rates[name].append(_rate(run.step, SECONDS / 3))
        for run in runs.values():
            run.components.loader.close()
    medians = {name: float(np.median(values)) for name, values in rates.items()}
    tokens = runs["masked"].data.tokenizer.vocab_size
    return [
        {
            "case": f"sft, d6, vocabulary {tokens:,}, {name}",
            "unit": "supervised/s",
            "ours": medians[name],
            "reference": medians["reference"],
            "ratio": medians[name] / medians["reference"],
        }
        for name in runs
    ]


def _rate(step, seconds: float) -> float:
    """Supervised tokens a second, from steps over about this many seconds."""
    begun, tokens = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        tokens += step()
    return tokens / (time.perf_counter() - begun)


def data_overrides(vocab_size: int) -> list[str]:
    folder = os.environ.get("BENCHMARK_DATA")
    if folder is None:
        return ["data=demo", f"tokenizer.vocab_size={vocab_size}"]
    paths = [Path(folder).resolve() / name for name in ("sgd/train.parquet", "gsm8k/main/train.parquet")]
    return [
        "data=local",
        f"data.train_path=[{paths[0]},{paths[1]}]",
        "data.schema=[messages,gsm8k]",
        f"tokenizer.vocab_size={vocab_size}",
    ]


class Ours:
    def __init__(self, collator: str, folder: str, vocab_size: int):
        rows = CONVERSATIONS if collator == "masked" else 2 * ROWS  # about as many tokens a step
        self.cfg = compose(
            [
                "stage=sft",
                "init.from=scratch",
                f"run.root={folder}/{collator}",
                "eval=none",
                "tracking=none",
                *MODEL,
                f"collator={collator}",
                f"train.seq_len={SEQ_LEN}",
                f"train.device_batch_size={ROWS}",
                "train.max_steps=100000",
                "train.compile=true",
                f"train.rows_per_step={rows}",
                *data_overrides(vocab_size),
            ]
        )
        setup, self.data = setup_run(self.cfg, world_size=1)
        self.components, _ = build_components(self.cfg, setup, Ranks(), self.data, NullTracker(), Signals(), None)
        self.number = 0

    def step(self) -> int:
        result = loop.train_step(self.components, self.components.loader.step(self.number), self.number)
        self.number += 1
        return result.num_supervised

    def warm_up(self) -> None:
        """Step until three steps in a row compile nothing."""
        read, quiet = meters(pick_device(self.cfg.train.device)), 0
        while quiet < 3:
            self.step()
            quiet = 0 if read()["train/compilations"] else quiet + 1


class Reference:
    """What a careful user would write with stock parts."""

    def __init__(self, cfg, data):
        self.device = pick_device(cfg.train.device)
        self.autocast = autocast(use_bf16(cfg.train.dtype, self.device), self.device)
        self.documents, self.pad_id = data.train.mixture, data.tokenizer.pad_id
        self.model = GPT(data.tokenizer.vocab_size, n_layer=6, n_embd=384, n_head=3)
        self.model.init_weights(torch.Generator().manual_seed(0))
        self.model.to(self.device)
        self.optimizers = stock_optimizers(self.model)
        self.order, self.cursor = self.documents.order(0), 0

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        taken = [self.documents.document(int(i)) for i in self.order[self.cursor : self.cursor + ROWS]]
        self.cursor = (self.cursor + ROWS) % (len(self.order) - ROWS)
        width = max(min(len(ids), SEQ_LEN + 1) for ids, _ in taken) - 1
        inputs, targets = torch.full((ROWS, width), self.pad_id), torch.full((ROWS, width), -1)
        for row, (ids, mask) in enumerate(taken):
            ids, mask = torch.from_numpy(ids[: SEQ_LEN + 1].astype(np.int64)), torch.from_numpy(mask[: SEQ_LEN + 1].copy())
            inputs[row, : len(ids) - 1] = ids[:-1]
            targets[row, : len(ids) - 1] = ids[1:].masked_fill(mask[1:] == 0, -1)
        return inputs.to(self.device), targets.to(self.device)

    def step(self) -> int:
        supervised = 0
        for _ in range(CONVERSATIONS // ROWS):
            inputs, targets = self.batch()
            with self.autocast:
                logits = self.model(inputs)
                loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1) * ROWS / CONVERSATIONS
            loss.backward()
            supervised += int((targets >= 0).sum())
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return supervised

    def warm_up(self) -> None:
        for _ in range(3):
            self.step()


if __name__ == "__main__":
    show(measure(*map(int, sys.argv[1:])))
