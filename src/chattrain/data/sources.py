"""Sources of records: names on the Hugging Face hub, local files and folders, generated tasks.

A record is what a source holds, as a dict: a conversation, a question, a text. Messages for users call it a row.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from chattrain.config.data import SourceConfig
from chattrain.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".jsonl": "jsonl", ".json": "jsonl"}
GENERATE = "generate:"
HOLD_OUT_EVERY = 20  # every 20th record is held out for validation where one source serves both (`part`)
LIMIT_SEED = 42  # seed of the shuffle whose first records a limit takes, as in nanochat


class Table(Protocol):
    """All records of a source, by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> dict: ...


class Records:
    """The selected records of one source. `indices` (records,) int64: their indices in the table; None: all of it."""

    def __init__(self, table: Table, indices: np.ndarray | None = None):
        self.table = table
        self.indices = np.arange(len(table)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, start: int, stop: int) -> Iterator[tuple[int, dict]]:
        """Selected records start to stop, each as (index in the table, record)."""
        for i in self.indices[start:stop]:
            yield int(i), self.table[int(i)]


def open_records(name: str, source: SourceConfig, cache_dir: Path) -> Records:
    """Open a source and select its `part` and `limit`. Raises UserError if it is missing, empty, of an unknown format, or
    cannot be loaded."""
    if source.path.startswith(GENERATE):
        table = _generate(source)
    elif _is_local(name, source):
        table = _load_local(name, _files(source), cache_dir)
    else:
        table = _load_from_hub(name, source, cache_dir)
    if not len(table):
        raise UserError(f"data source {name} ({source.path}) is empty; name one with rows")
    indices = np.arange(len(table))
    if source.part is not None:  # before the limit, so that the limit does not change which records are held out
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
    """What the source's records depend on, without reading them: paths, sizes and times of its files. Part of the cache key."""
    if source.path.startswith(GENERATE):
        from chattrain.tasks.generated import GENERATOR_VERSION

        words = _stamps([_word_list(source.words)]) if source.words else None
        return [source.path, source.split, GENERATOR_VERSION, words, list(sys.version_info[:3])]
    if _is_local(name, source):
        return _stamps(_files(source))
    files = [Path(f["filename"]) for f in _load_from_hub(name, source, cache_dir).cache_files]
    return [source.path, source.subset, source.split, _stamps(files)]


def _stamps(files: list[Path]) -> list:
    """[path, bytes, time of the last change in ns] of each file."""
    return [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files]


def _is_local(name: str, source: SourceConfig) -> bool:
    """Whether `path` exists on this machine; else it is a name on the hub. Raises UserError if it looks like a path and does
    not exist."""
    path = Path(source.path).expanduser()
    if path.exists():
        return True
    if path.suffix in BUILDERS or source.path.startswith(("/", ".", "~")) or source.path.count("/") > 1:
        raise UserError(f"data source {name}: no file or folder {source.path}; the path is looked up from {Path.cwd()}")
    return False


def _files(source: SourceConfig) -> list[Path]:
    """The files of a local source. Raises UserError if a folder has none for the split."""
    path = Path(source.path).expanduser()
    if _is_saved_dataset(path):
        return sorted(f for f in path.iterdir() if f.is_file())
    return [path] if path.is_file() else find_split(path, source.subset, source.split)


def _word_list(words: str) -> Path:
    file = Path(words).expanduser()
    if not file.is_file():
        raise UserError(f"no word list {words}; give a text file with one word a line")
    return file


def _generate(source: SourceConfig) -> list[dict]:
    from chattrain.tasks import generated

    words = str(_word_list(source.words)) if source.words else None
    try:
        return generated.records(source.path.removeprefix(GENERATE), source.split, source.limit, words)
    except ValueError as error:
        raise UserError(f"{source.path}: {error}") from error


def _is_saved_dataset(path: Path) -> bool:
    """Whether the folder was written by `Dataset.save_to_disk`."""
    return (path / "state.json").is_file() and (path / "dataset_info.json").is_file()


def _load_local(name: str, files: list[Path], cache_dir: Path) -> Table:
    if _is_saved_dataset(files[0].parent) and len(files) > 1:
        import datasets

        return cast("Dataset", datasets.load_from_disk(str(files[0].parent)))
    builders = {BUILDERS.get(f.suffix) for f in files}
    builder = builders.pop()
    if builder is None or builders:
        raise UserError(
            f"data source {name}: {files[0]} cannot be read; known formats are {', '.join(BUILDERS)} (one kind a source)"
        )
    if builder == "jsonl":
        return JsonLines(files)
    if builder == "parquet" and not _num_parquet_rows(files):
        return []
    return _load_dataset(name, builder, cache_dir, data_files=[str(f) for f in files], split="train")


def _num_parquet_rows(files: list[Path]) -> int:
    """Rows in all files; 1 if a file cannot be read, so that `datasets` opens it and its error says why."""
    from pyarrow import ArrowException, parquet

    try:
        return sum(parquet.ParquetFile(f).metadata.num_rows for f in files)
    except (ArrowException, OSError):
        return 1


def _load_from_hub(name: str, source: SourceConfig, cache_dir: Path) -> Dataset:
    return _load_dataset(name, source.path, cache_dir, subset=source.subset, split=source.split)


def _load_dataset(name: str, path: str, cache_dir: Path, subset: str | None = None, **arguments: Any) -> Dataset:
    """One split, through the library `datasets`. Raises UserError if it cannot be loaded."""
    import datasets

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # no warnings for retries; the error below says how they ended
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(path, subset, cache_dir=str(cache_dir / "datasets"), **arguments)
    except Exception as error:  # the library raises many types of error; all of them mean that the data cannot be loaded
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        first = arguments.get("data_files", [path])[0]
        raise UserError(
            f"data source {name}: cannot load {first}: {reason}; check the name and the network, or give a local file or folder"
        ) from error


def find_split(folder: Path, subset: str | None, split: str) -> list[Path]:
    """The data files of one split, in a folder with the hub's file layout or in one that just holds files.

    Searches <folder>/<subset>, then <folder>, for `<split>.parquet`, `<split>-00000-of-00001.parquet`, the same names in
    `data/`, and any file in `<split>/`. Then searches each subfolder, if no subset is given. If no file is named after a
    split, `train` takes all files. Raises UserError if there is no such split or subset, or if several subfolders have one.
    """
    roots = [folder / subset, folder] if subset and (folder / subset).is_dir() else [folder]
    if subset and len(roots) == 1 and subset not in ("all", "main", "default"):
        raise UserError(f"{folder} has no folder {subset}; it holds {_listing(folder)}")
    for root in roots:
        if files := _files_of_split(root, split):
            return files
    by_subfolder = {r: _files_of_split(r, split) for r in sorted(folder.iterdir()) if r.is_dir() and not subset}
    by_subfolder = {r: files for r, files in by_subfolder.items() if files}
    if len(by_subfolder) == 1:
        return next(iter(by_subfolder.values()))
    if by_subfolder:
        names = ", ".join(r.name for r in by_subfolder)
        raise UserError(f"{folder} has several data sets: {names}; name one of these folders")
    files = sorted(f for f in folder.iterdir() if f.suffix in BUILDERS)
    named_after_split = [f for f in files if f.name.startswith(("train", "test", "val", "dev"))]
    if split == "train" and files and not named_after_split:
        return files
    raise UserError(f"{folder} has no {split} split; it holds {_listing(folder)}. Name the file itself")


def _files_of_split(root: Path, split: str) -> list[Path]:
    for pattern in (f"{split}.*", f"{split}-*", f"data/{split}[.-]*", f"{split}/*"):
        if files := sorted(f for f in root.glob(pattern) if f.suffix in BUILDERS):
            return files
    return []


def _listing(folder: Path) -> str:
    return ", ".join(sorted(f.name for f in folder.iterdir())[:12]) or "nothing"


class JsonLines:
    """The records of JSON Lines files, read from the files on access; only byte offsets are kept in memory.

    Arrow is not used because each of its columns has one type, while a conversation's content may be a string in one record and
    a list of parts in the next. A line that is a bare list is read as the messages of a conversation.
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
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{self.files[f]} line {number} is not JSON: {error}") from error
        if isinstance(record, list):
            return {"messages": record}
        if not isinstance(record, dict):
            raise UserError(f"{self.files[f]} line {number} holds {type(record).__name__}, not an object")
        return record
