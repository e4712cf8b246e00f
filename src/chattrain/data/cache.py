"""The token cache: each source is rendered and tokenised once, and kept as memory-mapped arrays.

The folder's name is a hash of everything that the tokens depend on: source, limit, schema, tokenizer, renderer. It is complete
or absent: it is written under a temporary name and then renamed. Two processes may fill the same cache at the same time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from mmap import MADV_DONTNEED, mmap
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
    Fault,
    Faults,
    count_empty_replies,
    count_open_turns,
    count_tokens,
    misplaced_mask,
)
from chattrain.data.malformed import MalformedRows
from chattrain.data.places import Places
from chattrain.data.records import Records
from chattrain.data.sources import LIMITS, identity, open_records, with_schema
from chattrain.storage.files import make_folder
from chattrain.tasks import record_to_document, record_to_segments
from chattrain.tokenizer import AnyTokenizer, Tokenizer

FORMAT_VERSION = 7
# Field of TokenizedSource -> name of its .npy file.
ARRAYS = {
    "tokens": "tokens",
    "kinds": "kinds",
    "turns": "turns",
    "offsets": "offsets",
    "num_assistant": "assistant",
    "num_last_assistant": "last_assistant",
    "num_off": "off",
    "first_reply": "first_reply",
    "record_indices": "rows",
}
MAX_TURN = (1 << 16) - 1  # turns are kept as uint16: those beyond are one
CHUNK_RECORDS = 512  # records that a process renders at a time
PARALLEL_RECORDS = 32 * CHUNK_RECORDS  # with fewer records, starting the processes (about 2 s) takes longer than rendering


@dataclass(frozen=True)
class TokenizedSource:
    """The tokenised documents of one source, memory-mapped. Document i is tokens[offsets[i] : offsets[i + 1]]."""

    name: str
    tokens: np.ndarray  # (tokens,) uint16 or uint32
    kinds: np.ndarray  # (tokens,) uint8, chat.Kind of each
    turns: np.ndarray  # (tokens,) uint16, turn of each in its document
    offsets: np.ndarray  # (documents + 1,) int64
    num_assistant: np.ndarray  # (documents,) int64, tokens of the kind ASSISTANT in each document
    num_last_assistant: np.ndarray  # (documents,) int64, of these, those of its last reply
    num_off: np.ndarray  # (documents,) int64, tokens that are flagged off
    first_reply: np.ndarray  # (documents,) int64, index of its first token of the kind ASSISTANT; its length if it has none
    record_indices: np.ndarray  # (documents,) int64, index of each document's record in the source, for messages
    skipped: int  # malformed records left out
    content_hash: str  # of tokens, kinds and offsets
    left_out: dict[str, int] = field(default_factory=dict)  # times: fields of data.ignore; what a chat template drops by design
    malformed: MalformedRows = field(default_factory=MalformedRows)  # what was skipped, by reason
    places: Places = field(default_factory=Places)  # of all records of the source, for messages
    faults: Faults = field(default_factory=Faults)  # of the marks of what the model must generate

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(tokens, kinds, turns) of document i."""
        span = slice(self.offsets[i], self.offsets[i + 1])
        return self.tokens[span], self.kinds[span], self.turns[span]

    def release(self) -> None:
        """Drop the pages that were read from this process's memory, so that it does not grow. The system's page cache keeps
        them, so reading them again costs no disk access."""
        for array in (self.tokens, self.kinds, self.turns):
            if isinstance(array.base, mmap):
                array.base.madvise(MADV_DONTNEED)


def default_cache_dir() -> Path:
    """$CHATTRAIN_CACHE, or ~/.cache/chattrain."""
    return Path(os.environ.get("CHATTRAIN_CACHE", "~/.cache/chattrain")).expanduser()


def load_or_tokenize(
    name: str,
    source: SourceConfig,
    tokenizer: AnyTokenizer,
    cache_dir: Path,
    skip_malformed: bool = False,
    workers: int | None = None,
    ignore: Sequence[str] = (),
    limits: Limits = LIMITS,
) -> TokenizedSource:
    """The source's documents, from the cache if it holds them; otherwise they are rendered, tokenised and cached first.

    `workers`: processes that tokenise; None: one a core. `ignore`: fields of messages, or `tools`, to leave out. Raises UserError
    for a malformed record, with its source, number and reason (with skip_malformed the record is left out and counted instead),
    and for a source without a usable record.
    """
    source = with_schema(name, source, cache_dir, limits)
    key = _key(identity(name, source, cache_dir), source, tokenizer, skip_malformed, ignore, limits)
    folder = cache_dir / "tokens" / key
    if not (folder / "meta.json").is_file():
        records = open_records(name, source, cache_dir, limits)
        chunks = render_all(name, source, records, tokenizer, cache_dir, skip_malformed, workers, ignore, limits)
        make_folder(folder, lambda scratch: _write(scratch, records, chunks, _token_dtype(tokenizer)))
    return _open(name, folder)


def _key(
    source_identity: list,
    source: SourceConfig,
    tokenizer: AnyTokenizer,
    skip_malformed: bool,
    ignore: Sequence[str],
    limits: Limits,
) -> str:
    inputs = [
        FORMAT_VERSION,
        chat_format(tokenizer).version,
        source_identity,
        source.schema.name,
        source.limit,
        source.part,
        tokenizer.fingerprint(),
        skip_malformed,
        *([limits.row_mb] if limits.row_mb != LIMITS.row_mb else []),
        *([sorted(ignore)] if ignore else []),  # so that caches of data without it keep their keys
    ]
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:24]


def _open(name: str, folder: Path) -> TokenizedSource:
    meta = json.loads((folder / "meta.json").read_text())
    arrays = {field: np.load(folder / f"{file}.npy", mmap_mode="r") for field, file in ARRAYS.items()}
    malformed, places = MalformedRows(meta["malformed"]), Places.load(folder)
    noted = {"left_out": meta["left_out"], "malformed": malformed, "skipped": malformed.count, "places": places}
    faults = Faults({kind: Fault(**fault) for kind, fault in meta["faults"].items()})
    return TokenizedSource(name=name, content_hash=meta["content_hash"], faults=faults, **noted, **arrays)


def _write(folder: Path, records: Records, chunks: Iterator[Chunk], dtype: np.dtype) -> None:
    """Write a cache folder. What there is of each token goes to disk chunk by chunk, so that memory does not grow with the
    source."""
    malformed, faults, content_hash = MalformedRows(), Faults(), hashlib.sha256()
    left_out: Counter[str] = Counter()
    lengths, counts, record_indices = [0], [], []
    files = {name: (folder / f"{name}.raw") for name in ("tokens", "kinds", "turns")}
    with ExitStack() as stack:
        streams = {name: stack.enter_context(file.open("wb")) for name, file in files.items()}
        for chunk in chunks:
            for name, stream in streams.items():
                stream.write(getattr(chunk, name))
            content_hash.update(chunk.tokens + chunk.loss_mask)
            if any(off for _, _, off, _ in chunk.counts):  # so that hashes of data without flags are those of earlier versions
                content_hash.update(chunk.kinds)
            lengths += chunk.lengths
            counts += chunk.counts
            record_indices += chunk.record_indices
            malformed.merge(chunk.malformed)
            faults.merge(chunk.faults)
            left_out += chunk.left_out
    if not record_indices:
        raise records.nothing_usable(malformed)
    records.places.save(folder)
    offsets = np.cumsum(lengths, dtype=np.int64)
    content_hash.update(offsets.tobytes())
    _raw_to_npy(folder / "tokens", dtype, int(offsets[-1]))
    _raw_to_npy(folder / "kinds", np.dtype(np.uint8), int(offsets[-1]))
    _raw_to_npy(folder / "turns", np.dtype(np.uint16), int(offsets[-1]))
    np.save(folder / f"{ARRAYS['offsets']}.npy", offsets)
    columns = np.array(counts, dtype=np.int64).T
    for count, column in zip(("num_assistant", "num_last_assistant", "num_off", "first_reply"), columns, strict=True):
        np.save(folder / f"{ARRAYS[count]}.npy", column)
    np.save(folder / f"{ARRAYS['record_indices']}.npy", np.array(record_indices, dtype=np.int64))
    meta = {
        "malformed": malformed.reasons,
        "left_out": dict(left_out),
        "faults": {kind: asdict(fault) for kind, fault in faults.items()},
        "content_hash": content_hash.hexdigest()[:24],
        "source": records.path,
        "documents": len(record_indices),
        "tokens": int(offsets[-1]),
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))


def _raw_to_npy(stem: Path, dtype: np.dtype, length: int) -> None:
    """Copy raw values to a .npy file. Its header holds the length, which is known only after all values are written."""
    header = np.lib.format.header_data_from_array_1_0(np.empty(0, dtype)) | {"shape": (length,)}
    with stem.with_suffix(".npy").open("wb") as out, stem.with_suffix(".raw").open("rb") as raw:
        np.lib.format.write_array_header_1_0(out, header)
        shutil.copyfileobj(raw, out, 1 << 24)
    stem.with_suffix(".raw").unlink()


def _token_dtype(tokenizer: AnyTokenizer) -> np.dtype:
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
    dtype, faults = _token_dtype(tokenizer), Faults()
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
