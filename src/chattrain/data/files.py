"""Which files a local source consists of: a file, a folder in the hub's layout, or one that just holds files."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

from chattrain.config.data import SourceConfig
from chattrain.errors import UserError
from chattrain.storage.files import make_folder

KINDS = {".parquet": "parquet", ".arrow": "arrow", ".jsonl": "json", ".json": "json"}
COMPRESSED = (".gz", ".zst")  # of JSON only: tables are compressed inside
KNOWN = ".parquet, .arrow, .jsonl and .json, the last two also as .gz or .zst"
OF_DATASETS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # what `datasets` notes beside data


def kind_of(file: Path) -> str | None:
    """How a file is read, by its name; None: it is not.

    >>> [kind_of(Path(name)) for name in ("a.parquet", "a.JSONL", "a.json.gz", "a.csv", "a.parquet.gz", "state.json", ".a.json")]
    ['parquet', 'json', 'json', None, None, None, None]
    """
    name = file.name.lower()
    if name in OF_DATASETS or name.startswith("."):
        return None
    inner = next((name.removesuffix(end) for end in COMPRESSED if name.endswith(end)), name)
    kind = KINDS.get(Path(inner).suffix)
    return kind if inner == name or kind == "json" else None


def local_path(text: str) -> Path:
    """A path as typed, or with its `~` expanded where nothing has that name."""
    path = Path(text)
    if text.startswith("~") and not path.exists():
        path = Path(os.path.expanduser(text))  # Path.expanduser raises where there is no such user
    return path


def is_local(name: str, source: SourceConfig) -> bool:
    """Whether `path` exists on this machine; else it is a name on the hub. Raises UserError if it looks like a path and does
    not exist."""
    path = local_path(source.path)
    if path.exists():
        return True
    if path.suffix in (*KINDS, *COMPRESSED) or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", source.path, re.ASCII):
        raise UserError(f"data source {name}: no file or folder {source.path}; the path is looked up from {Path.cwd()}")
    return False


def files_of(name: str, source: SourceConfig) -> list[Path]:
    """The files of a local source, all of one kind. Raises UserError if a folder has none for the split, or several kinds."""
    path = local_path(source.path)
    if is_saved_dataset(path):
        return sorted(f for f in path.iterdir() if f.is_file())
    files = [path] if path.is_file() else find_split(path, source.subset, source.split)
    kinds = {kind_of(file) for file in files}
    if None in kinds:
        raise UserError(f"data source {name}: {files[0]} cannot be read; known formats are {KNOWN}")
    if len(kinds) > 1:
        ends = sorted({file.suffix for file in files})
        some = [str(next(file for file in files if kind_of(file) == kind)) for kind in sorted(map(str, kinds))]
        raise UserError(
            f"data source {name}: {path} holds {' and '.join(ends)} files, which are not mixed (one kind a source); "
            f"name the files instead of the folder: {some[0]}, or several in a list: [{','.join(some)}]"
        )
    return files


def is_saved_dataset(path: Path) -> bool:
    """Whether the folder was written by `Dataset.save_to_disk`."""
    return (path / "state.json").is_file() and (path / "dataset_info.json").is_file()


def check_whole(name: str, file: Path) -> None:
    """Raises UserError for a file that cannot be opened, for one without content, and for one that only points to its content."""
    try:
        with file.open("rb") as stream:
            head = stream.read(64)
    except OSError as error:
        raise UserError(f"data source {name} ({file}) cannot be read: {error.strerror}") from error
    if not head:
        raise UserError(f"data source {name} ({file}) is empty (0 bytes); fetch it again or take it out of the folder")
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"data source {name} ({file}) is a pointer of Git LFS, not the data; `git lfs pull` fetches it")


def prepared(file: Path, use: list[str], cache_dir: Path, make: Callable[[Path], None]) -> Path:
    """A copy of a file in the cache, made if it is not there. `use`: what it depends on, besides the file."""
    folder = cache_dir / "files" / hashlib.sha256(json.dumps([stamps([file]), use]).encode()).hexdigest()[:24]
    if not folder.is_dir():
        make_folder(folder, lambda scratch: make(scratch / file.stem))
    return folder / file.stem


def stamps(files: list[Path]) -> list:
    """[path, bytes, time of the last change in ns] of each file."""
    return [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files]


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
    files = sorted(f for f in folder.iterdir() if kind_of(f))
    named_after_split = [f for f in files if f.name.startswith(("train", "test", "val", "dev"))]
    if split == "train" and files and not named_after_split:
        return files
    name_it = "Name the file itself" if files else f"Known formats are {KNOWN}"
    raise UserError(f"{folder} has no {split} split; it holds {_listing(folder)}. {name_it}")


def _files_of_split(root: Path, split: str) -> list[Path]:
    for pattern in (f"{split}.*", f"{split}-*", f"data/{split}[.-]*", f"{split}/*"):
        if files := sorted(f for f in root.glob(pattern) if kind_of(f)):
            return files
    return []


def _listing(folder: Path) -> str:
    return ", ".join(sorted(f.name for f in folder.iterdir())[:12]) or "nothing"
