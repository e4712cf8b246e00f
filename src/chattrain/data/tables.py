"""Records of Parquet and Arrow files: only the columns that the schema uses, each file by itself, memory-mapped.

Files of one source may differ in other columns, in their types and in the order of their fields.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import ipc, parquet

from chattrain.data.files import kind_of
from chattrain.data.places import Places
from chattrain.errors import UserError
from chattrain.tasks.schemas import SCHEMAS, way_out

USED = {name for schema in SCHEMAS.values() for name in schema.reads}
BATCH = 1024  # records that are converted at a time


class ArrowTable:
    """The records of Arrow files, by index. `paths`: the files as messages name them."""

    def __init__(self, name: str, files: list[Path], paths: list[Path], schema: str):
        self.batches: list[pa.RecordBatch] = []
        starts, count = [], 0
        for file, path in zip(files, paths, strict=True):
            starts.append(count)
            table = _open(name, file, path)
            table = table.select(_indices(name, path, table.schema.names, schema))
            self.batches += [batch for batch in table.to_batches() if len(batch)]
            count += len(table)
        self.starts = np.cumsum([0, *map(len, self.batches)])  # index of the first record of each batch, and their number
        self.places = Places([str(path) for path in paths], starts)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, i: int) -> dict:
        batch = int(np.searchsorted(self.starts, i, side="right")) - 1
        return self.batches[batch].slice(i - int(self.starts[batch]), 1).to_pylist()[0]


def first_record(name: str, path: Path) -> dict[str, Any]:
    """The columns of a file, those that a schema uses with the values of the first record, the others with an empty text.

    A column without a type, whose values are all null, is left out.
    """
    if kind_of(path) == "parquet":
        file = _parquet(name, path)
        schema = file.schema_arrow
        batches = file.iter_batches(1, columns=[name for name in schema.names if name in USED])
    else:
        whole = _open(name, path, path)
        schema, batches = whole.schema, iter(whole.slice(0, 1).to_batches())
    record = {field.name: "" for field in schema if not pa.types.is_null(field.type)}
    try:
        first = next((batch for batch in batches if len(batch)), None)
    except (pa.ArrowException, OSError) as error:
        raise _broken(name, path, error) from error
    values = {} if first is None else dict(zip(first.schema.names, first.columns, strict=True))
    return record | {name: values[name][0].as_py() or "" for name in record.keys() & values.keys() & USED}


def to_arrow(name: str, path: Path, schema: str, out: Path) -> None:
    """Copy the columns of a Parquet file that the schema uses to an Arrow file, which gives a record without decoding others."""
    file = _parquet(name, path)
    names = [file.schema_arrow.names[i] for i in _indices(name, path, file.schema_arrow.names, schema)]
    fields = pa.schema([file.schema_arrow.field(n) for n in names])
    try:
        with ipc.new_file(str(out), fields) as sink:
            for batch in file.iter_batches(BATCH, columns=names):
                sink.write_batch(batch.select(names))
    except (pa.ArrowException, OSError) as error:
        raise _broken(name, path, error) from error


def _open(name: str, file: Path, path: Path) -> pa.Table:
    """An Arrow file, memory-mapped, in either of the two formats."""
    try:
        source = pa.memory_map(str(file))
        try:
            return ipc.open_file(source).read_all()
        except pa.ArrowInvalid:
            source.seek(0)
            return ipc.open_stream(source).read_all()
    except (pa.ArrowException, OSError) as error:
        raise _broken(name, path, error) from error


def _parquet(name: str, path: Path) -> parquet.ParquetFile:
    try:
        return parquet.ParquetFile(path, memory_map=True)
    except (pa.ArrowException, OSError) as error:
        raise _broken(name, path, error) from error


def _broken(name: str, path: Path, error: Exception) -> UserError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return UserError(f"data source {name} ({path}) cannot be read: {reason}; fetch it again or take it out of the folder")


def _indices(name: str, path: Path, columns: list[str], schema: str) -> list[int]:
    """The indices of the columns that the schema uses. Raises UserError if one is missing or there twice."""
    check_columns(name, str(path), columns, schema)
    used = [i for i, column in enumerate(columns) if column in SCHEMAS[schema].reads]
    if twice := {columns[i] for i in used if columns.count(columns[i]) > 1}:
        raise UserError(f"data source {name}: {path} has two columns {', '.join(twice)}; leave one of each")
    return used


def check_columns(name: str, path: str, columns: list[str], schema: str) -> None:
    """Raises UserError if a table does not have the columns that each row of the schema needs."""
    if lacking := SCHEMAS[schema].lacks(columns):
        raise UserError(
            f"data source {name}: {path} has no column {', '.join(lacking)} (it has {', '.join(columns) or 'none'}), which "
            f"schema {schema} needs; {way_out(dict.fromkeys(columns, ''), schema)}"
        )
