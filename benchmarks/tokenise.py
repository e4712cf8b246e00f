"""Conversations to a token cache, against tiktoken's encoding of the same texts, both on all cores.

Ours is `load_or_tokenize`: one process a core reads, renders, encodes and masks the records and writes them. The reference is
`encode_ordinary_batch` with one thread a core, on texts that are in memory already. The steady rate is that of one process a core
over the second half of the records, without the start of the processes, whose time does not depend on the data. The whole is
`load_or_tokenize` itself, which starts processes only if there are enough records. If BENCHMARK_DATA names a folder (as for
benchmarks/sft.py), the conversations are real, otherwise generated and short.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

from benchmarks.timing import row, show
from chattrain.config.data import SourceConfig
from chattrain.config.words import Schema
from chattrain.data import cache, tokenising
from chattrain.data.sources import open_records
from chattrain.tasks import record_to_segments
from chattrain.tokenizer import Tokenizer

ROUNDS, TRAINED_ON = 3, 20_000  # texts


def sources() -> dict[str, SourceConfig]:
    folder = os.environ.get("BENCHMARK_DATA")
    if folder is None:
        return {"small_talk": SourceConfig("generate:small_talk", limit=12_000)}
    paths = {name: str(Path(folder).resolve() / name) for name in ("sgd/train.parquet", "gsm8k/main/train.parquet")}
    return {
        "sgd": SourceConfig(paths["sgd/train.parquet"]),
        "gsm8k": SourceConfig(paths["gsm8k/main/train.parquet"], schema=Schema.gsm8k),
    }


def measure() -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        return [r for name, source in sources().items() for r in _measure(name, source, Path(folder))]


def _measure(name: str, source: SourceConfig, folder: Path) -> list[dict]:
    rows = open_records(name, source, folder)
    texts = [
        piece.text
        for _, found in rows.read(0, len(rows))
        for piece in record_to_segments(found, source.schema.name)
        if not piece.special
    ]
    tokenizer, cores = Tokenizer.train(texts[:TRAINED_ON], 8192), os.cpu_count() or 1
    times: dict[str, list[float]] = {"steady": [], "whole": [], "start": [], "reference": []}
    for _ in range(ROUNDS):
        start, steady = _steady(name, source, rows, tokenizer, folder)
        times["start"].append(start)
        times["steady"].append(steady)
        times["whole"].append(_seconds(lambda: cache.load_or_tokenize(name, source, tokenizer, folder)))
        shutil.rmtree(folder / "tokens")
        times["reference"].append(_seconds(lambda: tokenizer.encoding.encode_ordinary_batch(texts, num_threads=cores)))
    median = {part: statistics.median(seconds) for part, seconds in times.items()}
    characters = sum(map(len, texts))
    return [
        row(f"render {name}, {cores} processes, steady", characters, "characters", median["steady"], median["reference"]),
        row(
            f"load_or_tokenize {name} (its processes start in {median['start']:.1f} s)",
            characters,
            "characters",
            median["whole"],
            median["reference"],
        ),
    ]


def _steady(name: str, source: SourceConfig, rows, tokenizer: Tokenizer, folder: Path) -> tuple[float, float]:
    """Seconds until the first chunk, and those that all rows would take at the rate of the second half of the chunks."""
    begun = time.perf_counter()
    ends, documents = [], []
    with patch.object(cache, "PARALLEL_RECORDS", 0):
        for chunk in tokenising.render_all(name, source, rows, tokenizer, folder, skip_malformed=False, workers=None):
            ends.append(time.perf_counter())
            documents.append(len(chunk.record_indices))
    half = len(ends) // 2
    rate = sum(documents[half:]) / (ends[-1] - ends[half - 1])
    return ends[0] - begun, len(rows) / rate


def _seconds(function) -> float:
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


if __name__ == "__main__":
    show(measure())
