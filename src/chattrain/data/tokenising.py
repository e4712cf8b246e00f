"""The records of a source rendered and tokenised, chunk by chunk, by one process or several: what the token cache is made of."""

from __future__ import annotations

import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from chattrain.chat import Kind, Segment, chat_format
from chattrain.chat.fields import without_fields
from chattrain.config.data import Limits, SourceConfig
from chattrain.config.words import Schema
from chattrain.data.counting import (
    EMPTY_REPLIES,
    OPEN_TURNS,
    SAMPLED,
    Faults,
    count_empty_replies,
    count_open_turns,
    count_tokens,
    misplaced_mask,
)
from chattrain.data.malformed import MalformedRows
from chattrain.data.records import Records
from chattrain.data.sources import LIMITS, open_records
from chattrain.tasks import record_to_document, record_to_segments
from chattrain.tokenizer import AnyTokenizer, Tokenizer

MAX_TURN = (1 << 16) - 1  # turns are kept as uint16: those beyond are one
CHUNK_RECORDS = 512  # records that a process renders at a time
PARALLEL_RECORDS = 32 * CHUNK_RECORDS  # with fewer records, starting the processes (about 2 s) takes longer than rendering


def token_dtype(tokenizer: AnyTokenizer) -> np.dtype:
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)


@dataclass
class Chunk:
    """The documents of up to CHUNK_RECORDS records, in the form that goes to disk."""

    tokens: bytes
    kinds: bytes
    turns: bytes
    lengths: list[int]  # tokens of each document
    counts: list[tuple[int, int, int, int]]  # `count_tokens` of each document
    record_indices: list[int]
    malformed: MalformedRows
    faults: Faults
    left_out: Counter[str]

    @property
    def loss_mask(self) -> bytes:
        """1 for each token of the kind ASSISTANT."""
        return (np.frombuffer(self.kinds, np.uint8) == Kind.ASSISTANT).astype(np.uint8).tobytes()


def render_all(
    name: str,
    source: SourceConfig,
    records: Records,
    tokenizer: AnyTokenizer,
    cache_dir: Path,
    skip_malformed: bool,
    workers: int | None,
    ignore: Sequence[str] = (),
    limits: Limits = LIMITS,
) -> Iterator[Chunk]:
    """Chunks in the order of the records, made by this process or a pool of them. Shows a progress bar on a terminal."""
    from rich.progress import track

    starts = range(0, len(records), CHUNK_RECORDS)
    processes = min(workers or os.cpu_count() or 1, len(starts))

    def with_progress_bar(chunks: Iterator[Chunk]) -> Iterable[Chunk]:
        return track(
            chunks,
            f"tokenising {name}",
            total=len(starts),
            disable=not sys.stderr.isatty(),
            transient=True,
            console=_stderr_console(),
        )

    if processes == 1 or len(records) < PARALLEL_RECORDS:
        yield from with_progress_bar(_render(source, records, s, tokenizer, skip_malformed, ignore) for s in starts)
        return
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            work = ((name, source, cache_dir, folder, s, skip_malformed, ignore, limits) for s in starts)
            yield from with_progress_bar(pool.map(_render_in_worker, work))


def _stderr_console():
    from rich.console import Console

    return Console(stderr=True)


# In a worker: the open records and the tokenizer, by the temporary folder of the `load_or_tokenize` that they belong to.
_opened: dict[str, tuple[Records, AnyTokenizer]] = {}


def _render_in_worker(work: tuple[str, SourceConfig, Path, str, int, bool, Sequence[str], Limits]) -> Chunk:
    name, source, cache_dir, folder, start, skip_malformed, ignore, limits = work
    if folder not in _opened:
        _opened.clear()
        _opened[folder] = open_records(name, source, cache_dir, limits), Tokenizer.load(folder)
    records, tokenizer = _opened[folder]
    return _render(source, records, start, tokenizer, skip_malformed, ignore)


def _render(
    source: SourceConfig, records: Records, start: int, tokenizer: AnyTokenizer, skip_malformed: bool, ignore: Sequence[str]
) -> Chunk:
    documents, record_indices, malformed = [], [], MalformedRows()
    left_out: Counter[str] = Counter()
    form = chat_format(tokenizer)

    def segments_of(record: dict) -> tuple[list[Segment], Counter[str]]:
        of_record: Counter[str] = Counter()
        return record_to_segments(record, source.schema.name, form, ignore, of_record), of_record

    refused = malformed if skip_malformed else None
    for i, (segments, of_record) in records.convert(segments_of, start, start + CHUNK_RECORDS, refused):
        documents.append(segments)
        record_indices.append(i)
        left_out += of_record
    rendered = form.encode(documents)
    dtype, faults = token_dtype(tokenizer), Faults()
    if source.schema != Schema.text:  # a text has neither turns nor a prompt
        for i, document in zip(record_indices, rendered, strict=True):
            faults.add(OPEN_TURNS, i, count_open_turns(document, form.stop_ids))
            faults.add(EMPTY_REPLIES, i, count_empty_replies(document, form.stop_ids))
        for i, document in list(zip(record_indices, rendered, strict=True))[:SAMPLED]:
            given = without_fields(record_to_document(records.table[i], source.schema.name), ignore, Counter())
            for kind in misplaced_mask(given, document, form):
                faults.add(kind, i)
    return Chunk(
        tokens=b"".join(np.array(r.ids, dtype=dtype).tobytes() for r in rendered),
        kinds=b"".join(bytes(r.kinds) for r in rendered),
        turns=b"".join(np.array(r.turns, dtype=np.int64).clip(max=MAX_TURN).astype(np.uint16).tobytes() for r in rendered),
        lengths=[len(r.ids) for r in rendered],
        counts=[count_tokens(r) for r in rendered],
        record_indices=record_indices,
        malformed=malformed,
        faults=faults,
        left_out=left_out,
    )
