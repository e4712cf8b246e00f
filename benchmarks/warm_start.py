"""Time from the end of imports to the first batch, on an existing token cache, and the memory that stays resident.

Each case is a process of its own: load_or_tokenize -> Mixture -> collator -> Loader.step(0), rows of 2,048 tokens. The cache is
synthetic: 200 MB (WARM_START_MB sets another size) of tokens and masks in documents of 500 tokens on average. The references are
goals, not measurements: 0.5 s at 1 GB, and for memory the size of the cache, which reading all of it would take. Each case is
measured the second time, because best_fit packs an epoch before its first row and stores the result for later runs.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.timing import show
from chattrain.config.data import SourceConfig
from chattrain.data import cache, tokenising
from chattrain.data.collators import BestFit, Packed, Padded
from chattrain.data.loader import Loader
from chattrain.data.mixture import Mixture
from chattrain.data.passes import PassLimits
from chattrain.tokenizer import Tokenizer

COLLATORS = {"packed": Packed, "masked": Padded, "best_fit": BestFit}
SEQ_LEN, ROWS_PER_STEP, ROWS, MEAN_TOKENS, CHUNK = 2048, 32, 8, 500, 10_000
BYTES_A_TOKEN = 3  # uint16 and its mask
GOAL_S = 0.5


def measure() -> list[dict]:
    megabytes, rows = int(os.environ.get("WARM_START_MB", 200)), []
    with tempfile.TemporaryDirectory() as folder:
        _make(Path(folder), megabytes)
        for name in COLLATORS:
            for _ in range(2):  # the first packs best_fit's rows
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                    seconds, resident = process.submit(_first_batch, folder, name).result()
            case = f"{name}, {megabytes} MB"
            rows.append(
                {
                    "case": f"first batch, {case} (goal)",
                    "unit": "s",
                    "ours": seconds,
                    "reference": GOAL_S,
                    "ratio": GOAL_S / seconds,
                }
            )
            rows.append(
                {
                    "case": f"resident, {case} (the cache)",
                    "unit": "MB",
                    "ours": resident,
                    "reference": float(megabytes),
                    "ratio": megabytes / resident,
                }
            )
    return rows


def _make(folder: Path, megabytes: int) -> None:
    """A token cache of that size as `load_or_tokenize` writes it, with its tokenizer and source."""
    Tokenizer.train(["a few words"], 300).save(folder / "tokenizer")
    (folder / "rows.jsonl").write_text(json.dumps({"messages": []}) + "\n")
    documents = megabytes * 1_000_000 // (BYTES_A_TOKEN * MEAN_TOKENS)
    with patch.object(cache, "render_all", lambda *_: _chunks(documents)):
        _open(folder)


def _chunks(documents: int) -> Iterator[tokenising.Chunk]:
    """Documents of at least 20 tokens with exponential lengths, in which every other 50 tokens are supervised."""
    rng = np.random.default_rng(0)
    for first in range(0, documents, CHUNK):
        lengths = 20 + rng.exponential(MEAN_TOKENS - 20, min(CHUNK, documents - first)).astype(np.int64)
        tokens = rng.integers(0, 256, int(lengths.sum()), dtype=np.uint16)
        mask = (np.arange(len(tokens)) // 50 % 2).astype(np.uint8)
        supervised = np.add.reduceat(mask, np.cumsum(lengths) - lengths, dtype=np.int64)
        yield tokenising.Chunk(
            tokens.tobytes(), mask.tobytes(), lengths.tolist(), supervised.tolist(), list(range(first, first + len(lengths))), []
        )


def _open(folder: Path) -> cache.TokenizedSource:
    source = SourceConfig(str(folder / "rows.jsonl"))
    return cache.load_or_tokenize("synthetic", source, Tokenizer.load(folder / "tokenizer"), folder / "cache")


def _first_batch(folder: str, name: str) -> tuple[float, float]:
    """(seconds until the first step's batches are ready, megabytes that became resident)."""
    before, begun = _resident(), time.perf_counter()
    documents = Mixture([_open(Path(folder))], [SourceConfig("synthetic")], seed=1, folder=Path(folder) / "rows")
    collator = COLLATORS[name](documents, SEQ_LEN, pad_id=0)
    collator.steps_in(1, ROWS_PER_STEP)
    loader = Loader(collator, ROWS_PER_STEP, PassLimits(ROWS, ROWS * SEQ_LEN, "cpu"), torch.device("cpu"))
    loader.step(0)
    seconds = time.perf_counter() - begun
    resident = _resident() - before
    loader.close()
    return seconds, resident


def _resident() -> float:
    """Resident megabytes of this process (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


if __name__ == "__main__":
    show(measure())
