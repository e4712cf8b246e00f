"""Rendered and tokenised once: documents of one source as memory-mapped arrays under a key of all that decides them.

A cache folder is whole or absent: it is written beside its place and renamed. Two processes may prepare the same one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from mmap import MADV_DONTNEED, mmap
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from chattrain.chat import Malformed, chat_format
from chattrain.config.data import SourceConfig
from chattrain.data.sources import identity, open_records
from chattrain.errors import UserError
from chattrain.storage.files import make_folder
from chattrain.tasks import document
from chattrain.tokenizer import Tokenizer

FORMAT_VERSION = 2
ARRAYS = ("tokens", "loss_mask", "offsets", "supervised", "rows")
CHUNK_ROWS = 512  # rows a unit of work
PARALLEL_ROWS = 32 * CHUNK_ROWS  # fewer rows are rendered in the two seconds or so that processes take to start


@dataclass(frozen=True)
class TokenizedSource:
    """Tokenised documents of one source, memory-mapped. Document i is tokens[offsets[i]:offsets[i + 1]]."""

    name: str
    tokens: np.ndarray  # (tokens,) uint16 or uint32
    loss_mask: np.ndarray  # (tokens,) uint8, 1 where supervised
    offsets: np.ndarray  # (documents + 1,) int64
    supervised: np.ndarray  # (documents,) int64, supervised tokens of each
    rows: np.ndarray  # (documents,) int64, row number in the source, for messages
    skipped: int  # malformed rows left out
    content_hash: str  # of tokens, mask and offsets

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        where = slice(self.offsets[i], self.offsets[i + 1])
        return self.tokens[where], self.loss_mask[where]

    def release(self) -> None:
        """Unmap what was read: it stays in the system's page cache, and this process does not grow with what it has seen."""
        for array in (self.tokens, self.loss_mask):
            if isinstance(array.base, mmap):
                array.base.madvise(MADV_DONTNEED)


def default_cache_dir() -> Path:
    """$CHATTRAIN_CACHE, or ~/.cache/chattrain."""
    return Path(os.environ.get("CHATTRAIN_CACHE", "~/.cache/chattrain")).expanduser()


def load_or_tokenize(
    name: str,
    source: SourceConfig,
    tokenizer: Tokenizer,
    cache_dir: Path,
    skip_malformed: bool = False,
    workers: int | None = None,
) -> TokenizedSource:
    """TokenizedSource of the source, from the cache or made now.

    Raises UserError with source, row and reason for a malformed row (or leaves it out, counted, with skip_malformed),
    and for a source with no usable row.
    """
    key = _key(identity(name, source, cache_dir), source, tokenizer, skip_malformed)
    folder = cache_dir / "tokens" / key
    if not (folder / "meta.json").is_file():
        rows = open_records(name, source, cache_dir)
        chunks = render_all(name, source, rows, tokenizer, cache_dir, skip_malformed, workers)
        make_folder(folder, lambda scratch: _write(scratch, name, source, chunks, _token_dtype(tokenizer)))
    return _open(name, folder)


def _key(rows: list, source: SourceConfig, tokenizer: Tokenizer, skip_malformed: bool) -> str:
    decides = [
        FORMAT_VERSION,
        chat_format(tokenizer).version,
        rows,
        source.schema.name,
        source.limit,
        source.part,
        tokenizer.fingerprint(),
        skip_malformed,
    ]
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:24]


def _open(name: str, folder: Path) -> TokenizedSource:
    meta = json.loads((folder / "meta.json").read_text())
    arrays = {f: np.load(folder / f"{f}.npy", mmap_mode="r") for f in ARRAYS}
    return TokenizedSource(name=name, skipped=meta["skipped"], content_hash=meta["content_hash"], **arrays)


def _write(folder: Path, name: str, source: SourceConfig, chunks: Iterator[Chunk], dtype: np.dtype) -> None:
    skipped, examples, hashes = 0, [], hashlib.sha256()
    lengths, supervised, numbers = [0], [], []
    with (folder / "tokens.raw").open("wb") as tokens, (folder / "loss_mask.raw").open("wb") as masks:
        for chunk in chunks:
            tokens.write(chunk.tokens)
            masks.write(chunk.loss_mask)
            hashes.update(chunk.tokens + chunk.loss_mask)
            lengths += chunk.lengths
            supervised += chunk.supervised
            numbers += chunk.rows
            skipped += len(chunk.malformed)
            examples = (examples + chunk.malformed)[:3]
    if not numbers:
        raise UserError(
            f"data source {name} ({source.path}) has no usable row; the first reasons: "
            + "; ".join(f"row {row}: {reason}" for row, reason in examples)
        )
    offsets = np.cumsum(lengths, dtype=np.int64)
    hashes.update(offsets.tobytes())
    _raw_to_npy(folder / "tokens", dtype, int(offsets[-1]))
    _raw_to_npy(folder / "loss_mask", np.dtype(np.uint8), int(offsets[-1]))
    np.save(folder / "offsets.npy", offsets)
    np.save(folder / "supervised.npy", np.array(supervised, dtype=np.int64))
    np.save(folder / "rows.npy", np.array(numbers, dtype=np.int64))
    meta = {
        "skipped": skipped,
        "content_hash": hashes.hexdigest()[:24],
        "source": source.path,
        "documents": len(numbers),
        "tokens": int(offsets[-1]),
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))


def _raw_to_npy(stem: Path, dtype: np.dtype, length: int) -> None:
    """Put NumPy's header before the raw values, by copying: sizes are known only at the end."""
    header = np.lib.format.header_data_from_array_1_0(np.empty(0, dtype)) | {"shape": (length,)}
    with stem.with_suffix(".npy").open("wb") as out, stem.with_suffix(".raw").open("rb") as raw:
        np.lib.format.write_array_header_1_0(out, header)
        shutil.copyfileobj(raw, out, 1 << 24)
    stem.with_suffix(".raw").unlink()


def _token_dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)


@dataclass
class Chunk:
    """Rendered rows in the form that goes to disk."""

    tokens: bytes
    loss_mask: bytes
    lengths: list[int]
    supervised: list[int]
    rows: list[int]
    malformed: list[tuple[int, str]]


def render_all(
    name: str, source: SourceConfig, rows, tokenizer: Tokenizer, cache_dir: Path, skip_malformed: bool, workers: int | None
) -> Iterator[Chunk]:
    """Chunks in the order of the rows, from this process or a pool, with a progress bar on a terminal."""
    from rich.progress import track

    starts = range(0, len(rows), CHUNK_ROWS)
    processes = min(workers or os.cpu_count() or 1, len(starts))

    def shown(chunks):
        return track(
            chunks,
            f"tokenising {name}",
            total=len(starts),
            disable=not sys.stderr.isatty(),
            transient=True,
            console=_stderr_console(),
        )

    if processes == 1 or len(rows) < PARALLEL_ROWS:
        yield from shown(_render(name, source, rows.read(s, s + CHUNK_ROWS), tokenizer, skip_malformed) for s in starts)
        return
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            work = ((name, source, cache_dir, folder, s, skip_malformed) for s in starts)
            yield from shown(pool.map(_render_in_worker, work))


def _stderr_console():
    from rich.console import Console

    return Console(stderr=True)


_opened: dict[str, tuple] = {}  # of this worker: rows and tokenizer under the folder that belongs to one `load_or_tokenize`


def _render_in_worker(work: tuple) -> Chunk:
    name, source, cache_dir, folder, start, skip_malformed = work
    if folder not in _opened:
        _opened.clear()
        _opened[folder] = open_records(name, source, cache_dir), Tokenizer.load(folder)
    rows, tokenizer = _opened[folder]
    return _render(name, source, rows.read(start, start + CHUNK_ROWS), tokenizer, skip_malformed)


def _render(
    name: str, source: SourceConfig, rows: Iterator[tuple[int, dict]], tokenizer: Tokenizer, skip_malformed: bool
) -> Chunk:
    documents, numbers, malformed = [], [], []
    form = chat_format(tokenizer)
    for number, row in rows:
        try:
            documents.append(document(row, source.schema.name, form))
            numbers.append(number)
        except Malformed as error:
            if not skip_malformed:
                raise UserError(
                    f"data source {name} ({source.path}), row {number}: {error}; mend the row, choose "
                    "its schema (data.schema), or leave such rows out with data.on_malformed=skip"
                ) from None
            malformed.append((number, str(error)))
    rendered = form.encode(documents)
    dtype = _token_dtype(tokenizer)
    return Chunk(
        tokens=b"".join(np.array(r.ids, dtype=dtype).tobytes() for r in rendered),
        loss_mask=b"".join(bytes(r.loss_mask) for r in rendered),
        lengths=[len(r.ids) for r in rendered],
        supervised=[sum(r.loss_mask) for r in rendered],
        rows=numbers,
        malformed=malformed,
    )
