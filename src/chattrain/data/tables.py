"""Records of Parquet and Arrow files: only the columns that the schema uses, each file by itself, memory-mapped.

Files of one source may differ in other columns, in their types and in the order of their fields.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import ipc, parquet

from chattrain.config.data import Limits
from chattrain.data.files import kind_of
from chattrain.data.limits import Unpacking, check_row
from chattrain.data.places import Places
from chattrain.errors import UserError
from chattrain.tasks.schemas import SCHEMAS, way_out

USED = {name for schema in SCHEMAS.values() for name in schema.reads}
BATCH = 1024  # records that are converted at a time, at most
BATCH_BYTES, WELL_PACKED = 1 << 28, 50  # what a batch may take, and by how much text is packed at most


class ArrowTable:
    """The records of Arrow files, by index. `paths`: the files as messages name them."""

    def __init__(self, name: str, files: list[Path], paths: list[Path], schema: str, limits: Limits):
        self.max_row_mb = limits.row_mb
        self.batches: list[pa.RecordBatch] = []
        starts, count = [], 0
        for file, path in zip(files, paths, strict=True):
            starts.append(count)
            table = _open(name, file, path, limits)
            table = table.select(_indices(name, path, table.schema.names, schema))
            self.batches += [batch for batch in table.to_batches() if len(batch)]
            count += len(table)
        self.starts = np.cumsum([0, *map(len, self.batches)])  # index of the first record of each batch, and their number
        self.places = Places([str(path) for path in paths], starts)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, i: int) -> dict:
        batch = int(np.searchsorted(self.starts, i, side="right")) - 1
        row = self.batches[batch].slice(i - int(self.starts[batch]), 1)
        check_row(row.nbytes, self.max_row_mb)
        return row.to_pylist()[0]


def first_record(name: str, path: Path, limits: Limits) -> dict[str, Any]:
    """The columns of a file, those that a schema uses with the values of the first record, the others with an empty text.

    A column without a type, whose values are all null, is None.
    """
    if kind_of(path) == "parquet":
        file = _parquet(name, path, limits)
        schema = file.schema_arrow
        batches = file.iter_batches(1, columns=[name for name in schema.names if name in USED])
    else:
        whole = _open(name, path, path, limits)
        schema, batches = whole.schema, iter(whole.slice(0, 1).to_batches())
    record: dict[str, Any] = {field.name: None if pa.types.is_null(field.type) else "" for field in schema}
    try:
        first = next((batch for batch in batches if len(batch)), None)
    except (pa.ArrowException, OSError) as error:
        raise _broken(name, path, error) from error
    values = {} if first is None else dict(zip(first.schema.names, first.columns, strict=True))
    used = sorted(name for name in values.keys() & USED if record[name] is not None)
    if first is None or sum(values[name].nbytes for name in used) > limits.row_mb * 2**20:
        return record
    try:
        return record | {name: values[name][0].as_py() or "" for name in used}
    except (pa.ArrowException, ValueError) as error:  # no UTF-8
        raise _broken(name, path, error) from error


def to_arrow(name: str, path: Path, schema: str, out: Path, limits: Limits) -> None:
    """Copy the columns of a Parquet file that the schema uses to an Arrow file, which gives a record without decoding others."""
    file, unpacked = _parquet(name, path, limits), Unpacking(name, path, limits.unpacked)
    names = [file.schema_arrow.names[i] for i in _indices(name, path, file.schema_arrow.names, schema)]
    fields = pa.schema([file.schema_arrow.field(n) for n in names])
    try:
        with ipc.new_file(str(out), fields) as sink:
            for batch in file.iter_batches(_batch_size(file.metadata), columns=names):
                unpacked.add(batch.nbytes)
                batch.validate(full=True)
                sink.write_batch(batch.select(names))
    except (pa.ArrowException, OSError) as error:
        raise _broken(name, path, error) from error


def _batch_size(metadata: parquet.FileMetaData) -> int:
    """Records that are converted at a time: fewer where a file is packed so well that each may be a text that is stored once."""
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    columns = [group.column(j) for group in groups for j in range(group.num_columns)]
    suspects = [c.total_uncompressed_size for c in columns if c.total_uncompressed_size > WELL_PACKED * c.total_compressed_size]
    return min(max(BATCH_BYTES // max([1, *suspects]), 1), BATCH)


def _open(name: str, file: Path, path: Path, limits: Limits) -> pa.Table:
    """An Arrow file, memory-mapped, in either of the two formats."""
    try:
        source, unpacked = pa.memory_map(str(file)), Unpacking(name, path, limits.unpacked)
        try:
            reader = ipc.open_file(source)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        except pa.ArrowInvalid:
            source.seek(0)
            reader = batches = ipc.open_stream(source)
        found = []
        for batch in batches:
            if file == path:  # not of our own making: offsets may point outside the file, where pyarrow would follow them
                batch.validate(full=True)
                unpacked.add(batch.nbytes)
            found.append(batch)
        return pa.Table.from_batches(found, reader.schema)
    except (pa.ArrowException, OSError) as error:
        raise _broken(name, path, error) from error


def _parquet(name: str, path: Path, limits: Limits) -> parquet.ParquetFile:
    """Raises UserError for a file that cannot be read, and for one that says that it unpacks to more than it may."""
    try:
        file = parquet.ParquetFile(path, memory_map=True)
        unpacked = Unpacking(name, path, limits.unpacked)
        for group in range(file.metadata.num_row_groups):
            unpacked.add(max(file.metadata.row_group(group).total_byte_size, 0))
        return file
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
