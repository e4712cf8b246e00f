"""A malformed record of any kind is met alike wherever records are read: refused by its place, or left out and counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chattrain.config.compose import compose
from chattrain.config.data import SourceConfig
from chattrain.config.words import Schema
from chattrain.data.cache import load_or_tokenize
from chattrain.data.malformed import MalformedRows
from chattrain.data.sources import open_records
from chattrain.errors import UserError
from chattrain.evals.multiple_choice import questions
from chattrain.setup.tokenizer import choose_tokenizer
from chattrain.tokenizer import Tokenizer
from tests.tiny_hf import write_tokenizer


def talk(user, reply="Yo") -> dict:
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]}


def as_line(value) -> bytes:
    return value if isinstance(value, bytes) else json.dumps(value).encode()


BAD = {
    "no JSON": b'{"messages": [',
    "another charset": json.dumps(talk("x")).encode().replace(b'"x"', b'"\xfc"'),
    "null": None,
    "a number": 5,
    "half an emoji": talk("cut \ud83d"),
    "half an emoji in a reply": talk("cut", "\ud83d"),
    "NUL": talk("a\0b"),
    "no messages": {"id": 1},
    "null messages": {"messages": None},
    "a text for messages": {"messages": "x"},
    "a number for content": talk(5),
    "a number for a reply": talk("Hi", 5),
    "no role": {"messages": [{"content": "x"}]},
    "a wrong order": {"messages": [{"role": "assistant", "content": "x"}]},
    "a message that is a text": {"messages": ["x"]},
    "a list for a role": {"messages": [{"role": ["user"], "content": "x"}]},
}


def put(path: Path, *rows) -> SourceConfig:
    path.write_bytes(b"\n".join(map(as_line, rows)) + b"\n")
    return SourceConfig(str(path))


@pytest.mark.parametrize("kind", BAD)
def test_every_kind_is_refused_with_file_line_and_way_out_or_left_out(tmp_path, tokenizer, kind):
    source = put(tmp_path / "a.jsonl", talk("one"), BAD[kind], talk("two"))
    with pytest.raises(UserError) as refused:
        load_or_tokenize("mine", source, tokenizer, tmp_path / "cache")
    for part in ("data source mine", f"{tmp_path / 'a.jsonl'} line 2: ", "data.on_malformed=skip"):
        assert part in str(refused.value)
    documents = load_or_tokenize("mine", source, tokenizer, tmp_path / "cache", skip_malformed=True)
    assert len(documents) == 2 and documents.skipped == documents.malformed.count == 1
    assert "line 2" in str(documents.malformed)
    again = load_or_tokenize("mine", source, tokenizer, tmp_path / "cache", skip_malformed=True)
    assert again.malformed == documents.malformed


@pytest.mark.parametrize("kind", BAD)
def test_every_kind_is_met_where_a_tokenizer_is_trained(workplace, kind):
    put(workplace / "a.jsonl", talk("one"), BAD[kind], talk("two"))
    typed = ["stage=sft", "data=local", "data.train_path=a.jsonl", "data.val_path=a.jsonl", "tokenizer.vocab_size=300"]
    with pytest.raises(UserError, match=r"a.jsonl line 2: .*on_malformed=skip"):
        choose_tokenizer(compose(typed), None)
    assert Tokenizer.load(choose_tokenizer(compose([*typed, "data.on_malformed=skip"]), None)).encode("one")


def question(i: int, **changed) -> dict:
    return {"question": f"{i}?", "choices": ["a", "b"], "answer": i % 2, **changed}


BAD_QUESTIONS = [b"{", None, question(1, answer=2), question(1, answer="E"), question(1, question="\ud83d"), {"id": 1}]


@pytest.mark.parametrize("bad", [*BAD_QUESTIONS, question(1, choices=None)])
def test_every_kind_is_met_where_questions_are_read(tmp_path, tokenizer, bad):
    source = put(tmp_path / "q.jsonl", question(0), bad, question(2))
    source.schema = Schema.multiple_choice
    records = open_records("quiz", source, tmp_path / "cache")
    with pytest.raises(UserError, match=r"question set quiz, .*q.jsonl line 2: .*on_malformed=skip"):
        questions("quiz", records, tokenizer)
    malformed = MalformedRows()
    assert [q.index for q in questions("quiz", records, tokenizer, malformed)] == [0, 2]
    assert malformed.count == 1
    bad_only = open_records("quiz", SourceConfig(str(put(tmp_path / "b.jsonl", bad).path), Schema.multiple_choice), tmp_path)
    with pytest.raises(UserError, match="no usable row"):
        questions("quiz", bad_only, tokenizer, MalformedRows())


def test_reasons_are_counted_with_the_first_place_of_each(tmp_path, tokenizer):
    rows = [talk("one"), b"{", talk("\ud83d"), b"{{", talk(5), BAD["a wrong order"], talk("\ud83d")]
    documents = load_or_tokenize("mine", put(tmp_path / "a.jsonl", *rows), tokenizer, tmp_path / "cache", skip_malformed=True)
    counts = documents.malformed.by_reason()
    assert counts["not JSON"] == 2 and sum(counts.values()) == 6
    assert "2 not JSON (first: line 2)" in str(documents.malformed)
    assert any("surrogate" in reason and count == 2 for reason, count in counts.items())


def test_skip_is_not_offered_where_no_row_would_be_left(tmp_path, tokenizer):
    sharegpt = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]}
    for rows, way_out in (
        ([sharegpt] * 3, "data.schema=sharegpt; data.schema=auto tells it"),
        ([{"instruction": "a", "output": "b"}] * 3, "data.schema=alpaca"),
        ([{"prompt": "a", "response": "b"}] * 3, "prompt_completion, without completion"),
        ([talk(5)] * 3, "mend the rows"),
        ([b"{"] * 3, "check the file"),
    ):
        source = put(tmp_path / "a.jsonl", *rows)
        for skip in (False, True):
            with pytest.raises(UserError) as refused:
                load_or_tokenize("mine", source, tokenizer, tmp_path / "cache", skip_malformed=skip)
            assert way_out in str(refused.value) and "on_malformed" not in str(refused.value)


def test_rows_of_a_parquet_file_are_counted_from_0(tmp_path, tokenizer):
    import pyarrow as pa
    from pyarrow import parquet

    messages = [talk("one")["messages"], [{"role": "user", "content": None}], None]
    parquet.write_table(pa.table({"messages": messages}), tmp_path / "a.parquet")
    source = SourceConfig(str(tmp_path / "a.parquet"))
    with pytest.raises(UserError, match=r"a.parquet row 1 \(counted from 0\): message 0"):
        load_or_tokenize("mine", source, tokenizer, tmp_path / "cache")
    documents = load_or_tokenize("mine", source, tokenizer, tmp_path / "cache", skip_malformed=True)
    assert documents.skipped == 2 and "row 1" in str(documents.malformed)


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    pytest.importorskip("transformers")
    return Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("hf")))


@pytest.mark.parametrize("kind", BAD)
def test_every_kind_is_met_with_a_hugging_face_tokenizer(tmp_path, hugging_face, kind):
    source = put(tmp_path / "a.jsonl", talk("one"), BAD[kind], talk("two"))
    with pytest.raises(UserError, match=r"a.jsonl line 2: "):
        load_or_tokenize("mine", source, hugging_face, tmp_path / "cache")
    documents = load_or_tokenize("mine", source, hugging_face, tmp_path / "cache", skip_malformed=True)
    assert (len(documents), documents.skipped) == (2, 1)
