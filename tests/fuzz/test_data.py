"""Rows and data files, mutated: each record is a document, is refused by its place, or is counted as left out."""

from __future__ import annotations

import gzip
import json
from itertools import count as numbers
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import ipc, parquet

from chattrain.chat import render
from chattrain.config.data import Limits, SourceConfig
from chattrain.config.words import Schema
from chattrain.data.cache import load_or_tokenize
from chattrain.data.sources import open_records
from chattrain.errors import UserError
from chattrain.tokenizer import Tokenizer
from tests.fuzz.inputs import HANG_S, dumps, for_all, forms, mutated_bytes, mutated_values, no_hang, refusal
from tests.tiny_hf import ARGUMENTS, TOOLS, write_tokenizer

CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "x"}}}
TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}},
}
ROWS = {
    "messages": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
            {"role": "assistant", "content": "Yo", "weight": 1},
            {"role": "user", "content": "1 + 1?"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c1", "content": "2"},
            {"role": "assistant", "content": "2"},
        ],
        "tools": [TOOL],
    },
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": "Hi"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "3"},
        ],
        "system": "Be brief.",
    },
    "alpaca": {"instruction": "Add.", "input": "1 2", "output": "3", "history": [["a", "b"]]},
    "prompt_completion": {"prompt": "a", "completion": "b"},
    "multiple_choice": {"question": "q", "choices": ["a", "b"], "answer": 1},
    "gsm8k": {"question": "q", "answer": "x <<1+1=2>>2\n#### 2"},
    "text": {"text": "some text"},
}
TALKS = [
    {"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"It is {i}."}]}
    for i in range(4)
]


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory) -> Tokenizer:
    pytest.importorskip("transformers")
    template = TOOLS.replace("ARGUMENTS", ARGUMENTS["either"])
    return Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("hf"), template))  # type: ignore[return-value]


def check_file(file: Path, content: bytes, tokenizer, cache: Path) -> None:
    """Left out or refused, no record is lost: with on_malformed=skip documents and rows left out add up to the records."""
    file.write_bytes(content)
    source = SourceConfig(str(file))

    def skip() -> None:
        documents = load_or_tokenize("mine", source, tokenizer, cache, skip_malformed=True, workers=1)
        assert len(documents) + documents.skipped == len(open_records("mine", source, cache))

    def refuse() -> None:
        documents = load_or_tokenize("mine", source, tokenizer, cache, workers=1)
        assert len(documents) == len(open_records("mine", source, cache))

    for act in (skip, refuse):
        said = refusal(act)
        assert said is None or "mine" in said or file.name in said, said


@forms(12, 120)
@pytest.mark.parametrize("schema", ROWS)
@pytest.mark.parametrize("kind", ["native", "hugging face"])
def test_a_mutated_row_is_a_document_or_refused_by_its_line_or_counted(tmp_path, request, tokenizer, schema, kind, count):
    chosen = tokenizer if kind == "native" else request.getfixturevalue("hugging_face")
    whole, names = dumps(ROWS[schema]), numbers()

    def check(row) -> None:
        file = tmp_path / f"{next(names)}.jsonl"
        file.write_text("\n".join([whole, dumps(row), whole]) + "\n")
        source = SourceConfig(str(file), Schema[schema])
        documents = load_or_tokenize("mine", source, chosen, tmp_path / "cache", skip_malformed=True)
        assert len(documents) + documents.skipped == 3
        said = refusal(lambda: load_or_tokenize("mine", source, chosen, tmp_path / "cache"))
        assert (said is None) == (documents.skipped == 0)
        assert said is None or f"{file} line 2: " in said

    for_all(count, mutated_values(ROWS[schema]), check)


def files(folder: Path) -> dict[str, bytes]:
    lines = "\n".join(map(json.dumps, TALKS)).encode() + b"\n"
    table = pa.table({"messages": [talk["messages"] for talk in TALKS]})
    parquet.write_table(table, folder / "t.parquet")
    with ipc.new_file(str(folder / "t.arrow"), table.schema) as sink:
        sink.write_table(table)
    return {
        "a.jsonl": lines,
        "a.json": json.dumps(TALKS, indent=1).encode(),
        "a.jsonl.gz": gzip.compress(lines),
        "a.jsonl.zst": bytes(pa.compress(lines, "zstd", asbytes=True)),
        "a.parquet": (folder / "t.parquet").read_bytes(),
        "a.arrow": (folder / "t.arrow").read_bytes(),
    }


@forms(15, 150)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.arrow"])
def test_a_mutated_file_gives_its_records_or_is_refused(tmp_path, tokenizer, name, count):
    names = numbers()
    for_all(
        count,
        mutated_bytes(files(tmp_path)[name]),
        lambda content: check_file(tmp_path / f"{next(names)}{name}", content, tokenizer, tmp_path / "cache"),
    )


N = 200_000


@pytest.mark.parametrize("content", [b"[" * N + b"}" * N, b'{"a": "' + b'\\"' * 2 * N, b'{["' * N + b"}" * N])
def test_brackets_and_quotes_without_end_take_no_time(tmp_path, tokenizer, content):
    with no_hang():
        check_file(tmp_path / "a.json", b"[\n" + content, tokenizer, tmp_path / "cache")


def test_a_row_above_the_limit_is_refused_with_the_key_that_raises_it(tmp_path, tokenizer):
    rows = [{"text": "small"}, {"text": "x y " * 300_000}, {"text": "small"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    parquet.write_table(pa.table({"text": [row["text"] for row in rows]}), tmp_path / "a.parquet")
    for name, place in (("a.jsonl", "line 2"), ("a.parquet", "row 1")):
        source = SourceConfig(str(tmp_path / name), Schema.text)
        with pytest.raises(UserError, match=rf"{place}.* MiB.*data.max_row_mb"):
            load_or_tokenize("mine", source, tokenizer, tmp_path / "cache", limits=Limits(row_mb=1))
        skipped = load_or_tokenize("mine", source, tokenizer, tmp_path / "cache", skip_malformed=True, limits=Limits(row_mb=1))
        assert (len(skipped), skipped.skipped) == (2, 1)
        assert len(load_or_tokenize("mine", source, tokenizer, tmp_path / "cache", limits=Limits(row_mb=2))) == 3


def test_a_small_file_that_unpacks_to_gigabytes_is_refused_before_it_does(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("chattrain.data.limits.ALWAYS_MB", 4)
    parquet.write_table(pa.table({"text": ["x" * 100_000] * 1000}), tmp_path / "dictionary.parquet")
    parquet.write_table(
        pa.table({"text": ["x" * 10_000_000]}), tmp_path / "page.parquet", use_dictionary=False, compression="zstd"
    )
    table = pa.table({"text": ["x" * 10_000_000]})
    with ipc.new_file(str(tmp_path / "a.arrow"), table.schema, options=ipc.IpcWriteOptions(compression="zstd")) as sink:
        sink.write_table(table)
    lines = b'{"text": "x"}\n' * 1_000_000
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "a.jsonl.zst").write_bytes(bytes(pa.compress(lines, "zstd", asbytes=True)))
    for name in ("dictionary.parquet", "page.parquet", "a.arrow", "a.jsonl.gz", "a.jsonl.zst"):
        with pytest.raises(UserError, match=f"{name}.* times its size.*data.max_unpacked"):
            load_or_tokenize("mine", SourceConfig(str(tmp_path / name), Schema.text), tokenizer, tmp_path / "cache")
        assert not list((tmp_path / "cache").rglob("*.jsonl"))


def conversations(count: int) -> dict[str, list[dict]]:
    calls = [{"id": f"c{i}", "function": {"name": "f", "arguments": {}}} for i in range(count)]
    results = [{"role": "tool", "tool_call_id": f"c{i}", "content": "r"} for i in range(count)]
    callers = [{"role": "assistant", "content": "", "tool_calls": [call]} for call in calls]
    hi = {"role": "user", "content": "Hi"}
    return {
        "turns": [hi, {"role": "assistant", "content": "Yo"}] * count,
        "calls of one message": [hi, {"role": "assistant", "content": "", "tool_calls": calls}, *results],
        "calls one after the other": [hi, *(m for pair in zip(callers, results, strict=True) for m in pair)],
    }


@pytest.mark.parametrize("kind", ["turns", "calls of one message", "calls one after the other"])
@pytest.mark.parametrize("size", [20_000, pytest.param(500_000, marks=pytest.mark.slow)])
def test_a_conversation_of_any_length_is_rendered_in_time_that_grows_with_it(tokenizer, size, kind):
    """Half a million pairs are a million messages. What grows with the square of their number hangs at this size."""
    with no_hang(600 if size > 20_000 else HANG_S):
        rendered = render({"messages": conversations(size)[kind]}, tokenizer, None)
    assert len(rendered.ids) == len(rendered.loss_mask) > size


@pytest.mark.parametrize("size", [5_000, pytest.param(500_000, marks=pytest.mark.slow)])
def test_a_long_conversation_is_rendered_by_a_template(hugging_face, size):
    with no_hang(600 if size > 5_000 else HANG_S):
        rendered = render({"messages": conversations(size)["turns"]}, hugging_face, None)
    assert sum(rendered.loss_mask) > size
