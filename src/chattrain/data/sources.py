"""Where rows come from: hub names, local files and folders (through `datasets`), and the generated tasks."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from chattrain.config.data import SourceConfig
from chattrain.errors import UserError

BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".jsonl": "jsonl", ".json": "jsonl"}
GENERATE = "generate:"
HOLD_OUT_EVERY = 20  # documents, where one source serves training and validation
LIMIT_SEED = 42  # a limit takes the first rows of this shuffle, as nanochat does


class Records:
    """Rows of one source that were asked for: `len`, and `read(i, j)` gives rows i to j as (row number, dict)."""

    def __init__(self, table: Sequence, indices: np.ndarray | None = None):
        self.table = table
        self.indices = np.arange(len(table)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, start: int, stop: int) -> Iterator[tuple[int, dict]]:
        for i in self.indices[start:stop]:
            yield int(i), self.table[int(i)]


def open_records(name: str, source: SourceConfig, cache_dir: Path) -> Records:
    """Open a source. Raises UserError where it is missing, empty, of an unknown kind, or cannot be loaded."""
    if source.path.startswith(GENERATE):
        table = _generated(source)
    elif _is_local(name, source):
        table = _local(name, _files(source), cache_dir)
    else:
        table = _hub(name, source, cache_dir)
    if not len(table):
        raise UserError(f"data source {name} ({source.path}) is empty; name one with rows")
    indices = np.arange(len(table))
    if source.part is not None:  # before the limit, so that what is held out is the same whatever the limits
        held_out = np.arange(len(indices)) % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1
        indices = indices[held_out if source.part == "val" else ~held_out]
        if not len(indices):
            raise UserError(
                f"data source {name} ({source.path}) has {len(table)} rows, too few to keep every "
                f"{HOLD_OUT_EVERY}th for validation; give data.val_path"
            )
    if source.limit is not None and source.limit < len(indices) and not source.path.startswith(GENERATE):
        indices = np.random.default_rng(LIMIT_SEED).permutation(indices)[: source.limit]
    return Records(table, indices)


def identity(name: str, source: SourceConfig, cache_dir: Path) -> list:
    """What tells this source's rows from any other's, without reading them: part of the cache's key."""
    if source.path.startswith(GENERATE):
        from chattrain.tasks.generated import GENERATOR_VERSION

        words = _stamps([_word_list(source)]) if source.words else None
        return [source.path, source.split, GENERATOR_VERSION, words, list(sys.version_info[:3])]
    if _is_local(name, source):
        return _stamps(_files(source))
    files = [Path(f["filename"]) for f in _hub(name, source, cache_dir).cache_files]
    return [source.path, source.subset, source.split, _stamps(files)]


def _stamps(files: list[Path]) -> list:
    return [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files]


def _is_local(name: str, source: SourceConfig) -> bool:
    """Raises UserError for what looks like a path and is not there."""
    path = Path(source.path).expanduser()
    if path.exists():
        return True
    if path.suffix in BUILDERS or source.path.startswith(("/", ".", "~")) or source.path.count("/") > 1:
        raise UserError(f"data source {name}: no file or folder {source.path}; the path is looked up from {Path.cwd()}")
    return False


def _files(source: SourceConfig) -> list[Path]:
    path = Path(source.path).expanduser()
    if _is_saved(path):
        return sorted(f for f in path.iterdir() if f.is_file())
    return [path] if path.is_file() else find_split(path, source.subset, source.split)


def _word_list(source: SourceConfig) -> Path:
    words = Path(source.words).expanduser()
    if not words.is_file():
        raise UserError(f"no word list {source.words}; give a text file with one word a line")
    return words


def _generated(source: SourceConfig) -> Sequence:
    from chattrain.tasks import generated

    words = str(_word_list(source)) if source.words else None
    try:
        return generated.rows(source.path.removeprefix(GENERATE), source.split, source.limit, words)
    except ValueError as error:
        raise UserError(f"{source.path}: {error}") from error


def _is_saved(path: Path) -> bool:
    """A folder that `Dataset.save_to_disk` made."""
    return (path / "state.json").is_file() and (path / "dataset_info.json").is_file()


def _local(name: str, files: list[Path], cache_dir: Path) -> Sequence:
    if _is_saved(files[0].parent) and len(files) > 1:
        import datasets

        return datasets.load_from_disk(str(files[0].parent))
    kinds = {BUILDERS.get(f.suffix) for f in files}
    if None in kinds or len(kinds) > 1:
        raise UserError(
            f"data source {name}: {files[0]} is of no kind that can be read; known are {', '.join(BUILDERS)} (one kind a source)"
        )
    if kinds == {"jsonl"}:
        return JsonLines(files)
    if kinds == {"parquet"} and not _parquet_rows(files):
        return []
    return _load_dataset(name, kinds.pop(), cache_dir, data_files=[str(f) for f in files], split="train")


def _parquet_rows(files: list[Path]) -> int:
    """Rows in all files, or 1 where a file cannot be read: the library then says why."""
    from pyarrow import ArrowException, parquet

    try:
        return sum(parquet.ParquetFile(f).metadata.num_rows for f in files)
    except (ArrowException, OSError):
        return 1


def _hub(name: str, source: SourceConfig, cache_dir: Path):
    return _load_dataset(name, source.path, cache_dir, subset=source.subset, split=source.split)


def _load_dataset(name: str, path: str, cache_dir: Path, subset: str | None = None, **arguments):
    import datasets

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries; what they end in is said below
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(path, subset, cache_dir=str(cache_dir / "datasets"), **arguments)
    except Exception as error:  # the library raises a dozen kinds; each means that the data cannot be had
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        where = arguments.get("data_files", [path])[0]
        raise UserError(
            f"data source {name}: cannot load {where}: {reason}; check the name and the network, or give a local file or folder"
        ) from error


def find_split(folder: Path, subset: str | None, split: str) -> list[Path]:
    """Data files of one split in a folder that is laid out as on the hub, or that just holds files.

    Looked for in <folder>/<subset> and <folder>: `<split>.parquet`, `<split>-00000-of-00001.parquet`, the same in
    `data/`, any file in `<split>/`; and where no file is named after a split, all files (for `train`).
    """
    roots = [folder / subset, folder] if subset and (folder / subset).is_dir() else [folder]
    if subset and len(roots) == 1 and subset not in ("all", "main", "default"):
        raise UserError(f"{folder} has no folder {subset}; it holds {_listing(folder)}")
    for root in roots:
        if found := _files_of_split(root, split):
            return found
    inside = {r: _files_of_split(r, split) for r in sorted(folder.iterdir()) if r.is_dir() and not subset}
    inside = {r: found for r, found in inside.items() if found}
    if len(inside) == 1:
        return next(iter(inside.values()))
    if inside:
        raise UserError(f"{folder} has several data sets: {', '.join(r.name for r in inside)}; name one of these folders")
    loose = sorted(f for f in folder.iterdir() if f.suffix in BUILDERS)
    named = [f for f in loose if f.name.startswith(("train", "test", "val", "dev"))]
    if split == "train" and loose and not named:
        return loose
    raise UserError(f"{folder} has no {split} split; it holds {_listing(folder)}. Name the file itself")


def _files_of_split(root: Path, split: str) -> list[Path]:
    for pattern in (f"{split}.*", f"{split}-*", f"data/{split}[.-]*", f"{split}/*"):
        if found := sorted(f for f in root.glob(pattern) if f.suffix in BUILDERS):
            return found
    return []


def _listing(folder: Path) -> str:
    return ", ".join(sorted(f.name for f in folder.iterdir())[:12]) or "nothing"


class JsonLines:
    """Rows of JSON Lines files, read where they lie.

    Not through Arrow: a column there has one type, and a conversation's content may be a string in one row and a list
    of parts in the next. A line that is a bare list is taken as a conversation's messages.
    """

    def __init__(self, files: list[Path]):
        self.files = files
        self.lines: list[tuple[int, int, int]] = []  # (file, byte offset, line number)
        for f, file in enumerate(files):
            offset = 0
            with file.open("rb") as stream:
                for number, line in enumerate(stream, 1):
                    if line.strip():
                        self.lines.append((f, offset, number))
                    offset += len(line)

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, i: int) -> dict:
        f, offset, number = self.lines[i]
        with self.files[f].open("rb") as stream:
            stream.seek(offset)
            line = stream.readline()
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{self.files[f]} line {number} is not JSON: {error}") from error
        if isinstance(row, list):
            return {"messages": row}
        if not isinstance(row, dict):
            raise UserError(f"{self.files[f]} line {number} holds {type(row).__name__}, not an object")
        return row
