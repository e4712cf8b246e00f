"""Parquet and Arrow: only the columns of the schema are read, each file by itself; a broken file is named with its reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import ipc, parquet

from chattrain.config.data import SourceConfig
from chattrain.config.words import Schema
from chattrain.data.sources import open_records, with_schema
from chattrain.errors import UserError

LARGE = pa.large_list(pa.struct([("role", pa.string()), ("content", pa.large_string())]))
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]


def write(path: Path, table: pa.Table, row_group_size: int | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=row_group_size)
    else:
        new = ipc.new_stream if "stream" in path.name else ipc.new_file
        with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=row_group_size)
    return path


def rows_of(path: Path, cache: Path, schema: Schema = Schema.auto, **source) -> list[dict]:
    records = open_records("mine", SourceConfig(str(path), schema=schema, **source), cache)
    return [row for _, row in records.read(0, len(records))]


def refusal(path: Path, cache: Path, schema: Schema = Schema.auto) -> str:
    with pytest.raises(UserError) as refused:
        rows_of(path, cache, schema)
    return str(refused.value)


def talks(n: int, **more) -> pa.Table:
    return pa.table({"messages": [TALK] * n} | {name: pa.array([value] * n) for name, value in more.items()})


FILES = ["a.parquet", "a.arrow", "stream.arrow"]


@pytest.mark.parametrize("name", FILES)
def test_any_record_is_found_whatever_the_row_groups(tmp_path, cache, name):
    texts = [f"text {i}" for i in range(2500)]
    for size in (None, 1, 700, 1024):
        if size == 1:
            continue
        path = write(tmp_path / str(size) / name, pa.table({"text": texts, "id": range(2500)}), size)
        records = open_records("mine", SourceConfig(str(path), schema=Schema.auto), cache)
        assert len(records) == 2500
        assert [records.table[i] for i in (2499, 0, 1023, 1024, 1700)] == [
            {"text": texts[i]} for i in (2499, 0, 1023, 1024, 1700)
        ]
    assert [row["text"] for row in rows_of(path, cache)] == texts
    limited = open_records("mine", SourceConfig(str(path), schema=Schema.text, limit=9), cache)
    assert [row["text"] for _, row in limited.read(0, 9)] == [texts[i] for i in limited.indices]


@pytest.mark.parametrize("end", [".parquet", ".arrow"])
@pytest.mark.parametrize(
    "first, second",
    [
        (talks(2), talks(2, lang="en")),
        (talks(2, source=None), talks(2, source="web")),
        (talks(2, id=1), talks(2, id="x")),
        (talks(2), pa.table({"messages": [[dict(reversed(m.items())) for m in TALK]] * 2})),
        (talks(2), pa.table({"messages": [[{**m, "name": None} for m in TALK]] * 2})),
        (talks(2, a=1, b=2), talks(2, b=2, a=1)),
        (talks(2), pa.table({"messages": [{"role": ["user", "assistant"], "content": ["Hi", "Yo"]}] * 2})),
        (pa.table({"messages": pa.array([TALK] * 2, LARGE)}), talks(2)),
    ],
    ids=["one more", "null type", "other type", "order of fields", "null padding", "order", "struct of lists", "large types"],
)  # fmt: skip
def test_shards_may_differ_in_what_the_schema_does_not_use(tmp_path, cache, first, second, end):
    write(tmp_path / f"train-00000-of-00002{end}", first)
    write(tmp_path / f"train-00001-of-00002{end}", second)
    rows = rows_of(tmp_path, cache)
    assert len(rows) == 4
    for row in rows:
        assert set(row) == {"messages"}
        if isinstance(row["messages"], list):
            assert [{"role": m["role"], "content": m["content"]} for m in row["messages"]] == TALK


@pytest.mark.parametrize("end", [".parquet", ".arrow"])
def test_a_name_that_two_columns_have_matters_only_where_it_is_used(tmp_path, cache, end):
    twice = pa.Table.from_arrays([pa.array([1]), pa.array(["x"]), pa.array([TALK])], names=["id", "id", "messages"])
    assert rows_of(write(tmp_path / f"a{end}", twice), cache) == [{"messages": TALK}]
    used = pa.Table.from_arrays([pa.array(["y"]), pa.array(["x"])], names=["text", "text"])
    assert "two columns text" in refusal(write(tmp_path / f"b{end}", used), cache)


def test_a_column_of_nulls_alone_tells_no_schema(tmp_path, cache):
    table = pa.table({"messages": pa.nulls(2), "text": ["a", "b"]})
    assert rows_of(write(tmp_path / "a.parquet", table), cache) == [{"text": "a"}, {"text": "b"}]
    nothing = refusal(write(tmp_path / "c.parquet", pa.table({"messages": pa.nulls(2)})), cache)
    assert "its columns (messages) fit no schema" in nothing and "hold no values" in nothing
    late = pa.table({"messages": [None, TALK], "id": [1, 2]})
    assert rows_of(write(tmp_path / "b.parquet", late), cache) == [{"messages": None}, {"messages": TALK}]


@pytest.mark.parametrize("end", [".parquet", ".arrow"])
def test_a_shard_without_the_columns_is_named_with_those_it_has(tmp_path, cache, end):
    write(tmp_path / f"train-0{end}", talks(1))
    write(tmp_path / f"train-1{end}", pa.table({"conversations": [[{"from": "human", "value": "Hi"}]]}))
    message = refusal(tmp_path, cache)
    assert f"train-1{end}" in message and "no column messages (it has conversations)" in message
    assert "data.schema=sharegpt" in message and "on_malformed" not in message


def test_columns_of_no_schema_are_said_with_those_that_there_are(tmp_path, cache):
    message = refusal(write(tmp_path / "a.parquet", pa.table({"prompt": ["a"], "response": ["b"]})), cache)
    assert "(prompt, response)" in message and "prompt_completion, without completion" in message
    assert "on_malformed" not in message


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


@pytest.mark.parametrize("end", [".parquet", ".arrow", ".jsonl"])
@pytest.mark.parametrize(
    "content, reason", [(LFS, "Git LFS"), (b"", "empty"), (None, "cannot be read")], ids=["lfs", "empty", "cut"]
)
@pytest.mark.parametrize("broken", [0, 1])
def test_a_broken_shard_is_named_with_its_reason(tmp_path, cache, end, content, reason, broken):
    for n in (0, 1):
        path = tmp_path / f"train-0000{n}-of-00002{end}"
        if end == ".jsonl":
            path.write_text('{"text": "a"}\n' * 3)
        else:
            write(path, pa.table({"text": np.arange(2000).astype(str)}))
        if n == broken:
            if content is None and end == ".jsonl":
                return  # a cut line is a malformed row
            path.write_bytes(content if content is not None else path.read_bytes()[: path.stat().st_size // 2])
    message = refusal(tmp_path, cache)
    assert f"train-0000{broken}-of-00002{end}" in message and reason in message and "network" not in message
    assert f"train-0000{1 - broken}-of" not in message


@pytest.mark.parametrize("end", [".parquet", ".arrow"])
def test_a_file_without_rows_among_others_gives_none(tmp_path, cache, end):
    write(tmp_path / f"train-0{end}", talks(2))
    write(tmp_path / f"train-1{end}", talks(2).slice(0, 0))
    assert len(rows_of(tmp_path, cache)) == 2


def test_a_file_that_has_changed_is_copied_anew(tmp_path, cache):
    source = SourceConfig(str(tmp_path / "a.parquet"), schema=Schema.auto)
    for table, schema in ((pa.table({"text": ["a"]}), Schema.text), (talks(2), Schema.messages)):
        write(tmp_path / "a.parquet", table)
        assert with_schema("mine", source, cache).schema == schema
        assert len(open_records("mine", source, cache)) == len(table)


def test_questions_that_are_wrapped_once_more_are_told_and_read(tmp_path, cache):
    question = {"question": "?", "choices": ["a", "b"], "answer": 1, "subject": ""}
    path = write(tmp_path / "a.parquet", pa.table({"train": [question]}))
    assert rows_of(path, cache) == [{"train": question}]
