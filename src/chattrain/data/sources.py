"""Sources of records: names on the Hugging Face hub, local files and folders, generated tasks, functions of the user's own.

A record is what a source holds, as a dict: a conversation, a question, a text. Messages for users call it a row.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from chattrain.chat import Malformed
from chattrain.config.data import Limits, SourceConfig
from chattrain.config.words import Schema
from chattrain.data import hub
from chattrain.data.files import check_whole, files_of, is_local, is_saved_dataset, kind_of, local_path, prepared, stamps
from chattrain.data.json_files import JsonTable, first_records, is_compressed, unpack
from chattrain.data.own_source import as_file
from chattrain.data.places import Places
from chattrain.data.records import Records, Table
from chattrain.errors import UserError
from chattrain.tasks.schemas import SCHEMAS, no_schema, told_by

if TYPE_CHECKING:
    from datasets import Dataset

GENERATE = "generate:"
LIMITS = Limits()  # those of the keys' defaults
HOLD_OUT_EVERY = 20  # every 20th record is held out for validation where one source serves both (`part`)
LIMIT_SEED = 42  # seed of the shuffle whose first records a limit takes, as in nanochat
FIRST = 100  # records at most that are looked at for the columns of a source


def open_records(name: str, source: SourceConfig, cache_dir: Path, limits: Limits = LIMITS) -> Records:
    """Open a source and select its `part` and `limit`. Raises UserError if it is missing, empty, of an unknown format, or
    cannot be loaded, and where its columns tell no schema (schema=auto)."""
    source = with_schema(name, source, cache_dir, limits)
    table, places = _open_table(name, source, cache_dir, limits)
    if not len(table):
        raise _empty(name, source)
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
    return Records(table, indices, f"data source {name}", source.path, source.schema.name, places)


def _empty(name: str, source: SourceConfig) -> UserError:
    return UserError(f"data source {name} ({source.path}) is empty; name one with rows")


def identity(name: str, source: SourceConfig, cache_dir: Path) -> list:
    """What the source's records depend on, without reading them: paths, sizes and times of its files. Part of the cache key."""
    source = as_file(name, source, cache_dir)
    if source.path.startswith(GENERATE):
        from chattrain.tasks.generated import GENERATOR_VERSION

        words = stamps([_word_list(source.words)]) if source.words else None
        return [source.path, source.split, GENERATOR_VERSION, words, list(sys.version_info[:3])]
    if is_local(name, source):
        return stamps(files_of(name, source))
    files = [Path(f["filename"]) for f in hub.load(name, source, cache_dir).cache_files]
    return [source.path, source.subset, source.split, stamps(files)]


def with_schema(name: str, source: SourceConfig, cache_dir: Path, limits: Limits = LIMITS) -> SourceConfig:
    """The source with the schema that its columns tell, if it is to be told; a function of the user's own as the file of what it
    returns. Raises UserError where they tell none."""
    source = as_file(name, source, cache_dir)
    if source.schema != Schema.auto:
        return source
    rows = _first_rows(name, source, cache_dir, limits)
    told = next((told for row in rows if (told := told_by(row))), None)
    if told is None:
        raise UserError(f"data source {name} ({source.path}): {_rows_within(name, rows, source) or no_schema(rows[0])}")
    return replace(source, schema=Schema[told])


def _rows_within(name: str, rows: list[dict], source: SourceConfig) -> str | None:
    """The way out for a file whose only record holds the rows in a column; None: it is another file."""
    for column, value in rows[0].items() if len(rows) == 1 else []:
        if isinstance(value, list) and value and isinstance(value[0], dict) and told_by(value[0]):
            file = files_of(name, source)[0]
            path, out = (shlex.quote(str(p)) for p in (file, file.with_suffix(".rows.jsonl")))
            key = f".{column}" if re.fullmatch(r"[A-Za-z_]\w*", column, re.ASCII) else f".[{json.dumps(column)}]"
            unpack = {".gz": f"gunzip -c {path} | ", ".zst": f"zstd -dc {path} | "}.get(file.suffix.lower(), "")
            command = f"{unpack}jq -c {shlex.quote(f'{key}[]')}{'' if unpack else f' {path}'} > {out}"
            return f"its rows are inside the column {column}; `{command}` makes a file of them"
    return None


def _first_rows(name: str, source: SourceConfig, cache_dir: Path, limits: Limits) -> list[dict[str, Any]]:
    """The first records of a source, one at least, without reading the others; of a table the first one, with all its columns."""
    if source.path.startswith(GENERATE):
        return _generate(replace(source, limit=1))
    if not is_local(name, source):
        return [_first_of(hub.load(name, source, cache_dir))]
    if is_saved_dataset(local_path(source.path)):
        return [_first_of(hub.load_saved(name, local_path(source.path)))]
    file = files_of(name, source)[0]
    check_whole(name, file)
    if kind_of(file) != "json":
        from chattrain.data import tables

        return [tables.first_record(name, file, limits)]
    try:
        rows = first_records(_of_lines(name, file, cache_dir, limits), FIRST, limits.row_mb)
    except Malformed as error:
        raise UserError(
            f"data source {name}, {file} {error}; no other of the first {FIRST} rows can be read: check it"
        ) from error
    if not rows:
        raise _empty(name, source)
    return rows


def _first_of(dataset: Dataset) -> dict[str, Any]:
    first = dataset[0] if len(dataset) else {}
    return {column: first.get(column) or "" for column in dataset.column_names}


def _open_table(name: str, source: SourceConfig, cache_dir: Path, limits: Limits) -> tuple[Table, Places]:
    if source.path.startswith(GENERATE):
        return _generate(source), Places()
    if not is_local(name, source):
        return _of_datasets(name, source, hub.load(name, source, cache_dir)), Places()
    if is_saved_dataset(local_path(source.path)):
        return _of_datasets(name, source, hub.load_saved(name, local_path(source.path))), Places()
    files = files_of(name, source)
    for file in files:
        check_whole(name, file)
    if kind_of(files[0]) == "json":
        table = JsonTable([_of_lines(name, file, cache_dir, limits) for file in files], files, limits.row_mb)
    else:
        from chattrain.data import tables

        schema = source.schema.name
        arrow = [_as_arrow(name, file, schema, cache_dir, limits) for file in files]
        table = tables.ArrowTable(name, arrow, files, schema, limits)
    return table, table.places


def _of_datasets(name: str, source: SourceConfig, dataset: Dataset) -> Table:
    from chattrain.data import tables

    schema = source.schema.name
    tables.check_columns(name, source.path, dataset.column_names, schema)
    return cast(Table, dataset.select_columns([c for c in dataset.column_names if c in SCHEMAS[schema].reads]))


def _of_lines(name: str, file: Path, cache_dir: Path, limits: Limits) -> Path:
    """A JSON file, or its unpacked copy in the cache: in a compressed file no record could be found by its offset."""
    return prepared(file, [], cache_dir, lambda copy: unpack(name, file, copy, limits.unpacked)) if is_compressed(file) else file


def _as_arrow(name: str, file: Path, schema: str, cache_dir: Path, limits: Limits) -> Path:
    """An Arrow file, or of a Parquet file a copy in the cache: in Parquet a record costs the decoding of all before it."""
    from chattrain.data import tables

    if kind_of(file) == "arrow":
        return file
    columns = sorted(SCHEMAS[schema].reads)
    return prepared(file, columns, cache_dir, lambda copy: tables.to_arrow(name, file, schema, copy, limits))


def _word_list(words: str) -> Path:
    file = local_path(words)
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
