"""A source that is a function of the user's own: `data.train_path=python:<module>.<function>`.

The function takes the split, `train`, `val` or `test`, and returns or yields records (dicts, as a line of JSON Lines holds one).
It is called once a process, and what it returns is kept in the cache as a file, under the hash of its content: the rest of the
program reads that file like any other, and tokens are made anew only where a record has changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from chattrain.config.data import SourceConfig
from chattrain.config.own import import_target
from chattrain.config.trusted import PYTHON
from chattrain.errors import UserError


def as_file(name: str, source: SourceConfig, cache_dir: Path) -> SourceConfig:
    """The source as a JSON Lines file, where its path names a function; itself otherwise.

    Raises UserError where the function cannot be imported, fails, or returns what is no record.
    """
    if not source.path.startswith(PYTHON):
        return source
    function = import_target(f"data source {name}: {source.path}", source.path.removeprefix(PYTHON))
    return replace(source, path=str(_file_of(name, source.path, function, source.split, cache_dir)))


@lru_cache
def _file_of(name: str, path: str, function: Callable[[str], Iterable[dict]], split: str, cache_dir: Path) -> Path:
    folder = cache_dir / "files"
    folder.mkdir(parents=True, exist_ok=True)
    digest, number = hashlib.sha256(), 0
    descriptor, scratch = tempfile.mkstemp(prefix=".python-", suffix=".jsonl", dir=folder)
    try:
        with os.fdopen(descriptor, "wb") as out:
            for number, record in enumerate(_records(name, path, function, split)):
                if not isinstance(record, dict):
                    raise UserError(f"data source {name}: record {number} of {path} is a {type(record).__name__}, not a dict")
                line = json.dumps(record).encode() + b"\n"
                digest.update(line)
                out.write(line)
        file = folder / f"python-{digest.hexdigest()[:24]}.jsonl"
        if not file.exists():  # its time is a part of what the tokens are kept under
            os.replace(scratch, file)
        return file
    except (TypeError, ValueError) as error:
        raise UserError(f"data source {name}: record {number} of {path} cannot be written as JSON: {error}") from error
    finally:
        Path(scratch).unlink(missing_ok=True)


def _records(name: str, path: str, function: Callable[[str], Iterable[dict]], split: str) -> Iterable[dict]:
    try:
        yield from function(split)
    except Exception as error:
        raise UserError(f"data source {name}: {path}({split!r}) failed: {type(error).__name__}: {error}") from error
