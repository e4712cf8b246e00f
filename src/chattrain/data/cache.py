"""The token cache: each source is rendered and tokenised once, and kept as memory-mapped arrays.

The folder's name is a hash of everything that the tokens depend on: source, limit, schema, tokenizer, renderer. It is complete
or absent: it is written under a temporary name and then renamed. Two processes may fill the same cache at the same time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from mmap import MADV_DONTNEED, mmap
from pathlib import Path

import numpy as np

from chattrain.chat import chat_format
from chattrain.config.data import Limits, SourceConfig
from chattrain.data.counting import Fault, Faults
from chattrain.data.malformed import MalformedRows
from chattrain.data.places import Places
from chattrain.data.records import Records
from chattrain.data.sources import LIMITS, identity, open_records, with_schema
from chattrain.data.tokenising import Chunk, render_all, token_dtype
from chattrain.storage.files import make_folder
from chattrain.tokenizer import AnyTokenizer

FORMAT_VERSION = 8
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
        make_folder(folder, lambda scratch: _write(scratch, records, chunks, token_dtype(tokenizer)))
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
