"""Documents are rendered once: the cache holds what rendering gives, is found again, and is whole or absent."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiktoken

from chattrain import chat
from chattrain.chat.native import NativeFormat
from chattrain.config.data import SourceConfig
from chattrain.config.words import Schema
from chattrain.data.cache import TokenizedSource, default_cache_dir, load_or_tokenize
from chattrain.errors import UserError
from chattrain.tokenizer import SPECIAL_TOKENS, Tokenizer

BAD = {"messages": [{"role": "assistant", "content": "first"}]}


def talk(i: int) -> dict:
    messages = [
        {"role": "user", "content": f"What is {i} + 1? " * (i % 4)},
        {"role": "assistant", "content": f"{i + 1}"},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": [{"type": "python", "text": f"{i}+1"}, {"type": "python_output", "text": str(i + 1)}]},
    ]
    return {"messages": messages[: (2, 3, 4)[i % 3]]}


def put(path: Path, rows: list[dict]) -> SourceConfig:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SourceConfig(path=str(path))


def bytes_tokenizer(vocab_size: int) -> Tokenizer:
    """A token a byte, with the special tokens at the very end of a vocabulary of that size."""
    special = {name: vocab_size - 9 + i for i, name in enumerate(SPECIAL_TOKENS)}
    return Tokenizer(
        tiktoken.Encoding(
            name="bytes", pat_str=r"\s+|\S+", special_tokens=special, mergeable_ranks={bytes([b]): b for b in range(256)}
        )
    )


def same(one: TokenizedSource, two: TokenizedSource) -> bool:
    pairs = [
        (getattr(one, a), getattr(two, a)) for a in ("tokens", "kinds", "turns", "offsets", "num_assistant", "record_indices")
    ]
    return (one.content_hash, one.skipped) == (two.content_hash, two.skipped) and all(
        np.array_equal(a, b) and a.dtype == b.dtype for a, b in pairs
    )


@pytest.fixture
def no_work(monkeypatch):
    """From here on, whatever reads rows or renders them fails."""

    def refuse(*_, **__):
        raise AssertionError("done once more")

    def forbid():
        monkeypatch.setattr(NativeFormat, "encode", refuse)
        monkeypatch.setattr("chattrain.data.cache.open_records", refuse)

    return forbid


def test_the_documents_are_what_rendering_gives(tmp_path, tokenizer):
    rows = [talk(i) for i in range(600)]  # more than one unit of work
    documents = load_or_tokenize("mine", put(tmp_path / "a.jsonl", rows), tokenizer, tmp_path / "cache", workers=1)
    assert len(documents) == 600 and documents.skipped == 0 and documents.name == "mine"
    assert documents.record_indices.tolist() == list(range(600))
    for i, row in enumerate(rows):
        ids, mask = chat.render(row, tokenizer, None)
        tokens, kinds, _ = documents[i]
        assert (tokens.tolist(), (kinds == chat.Kind.ASSISTANT).tolist()) == (ids, mask)
        assert documents.num_assistant[i] == sum(mask)
    assert documents.offsets[-1] == len(documents.tokens) == len(documents.kinds)


def test_documents_of_plain_text_are_supervised_but_for_bos(tmp_path, tokenizer):
    source = put(tmp_path / "a.jsonl", [{"text": "one <|bos|>"}, {"text": "two"}])
    source.schema = Schema.text
    documents = load_or_tokenize("mine", source, tokenizer, tmp_path / "cache")
    assert [tokenizer.decode(documents[i][0]) for i in range(2)] == ["<|bos|>one <|bos|>", "<|bos|>two"]
    assert [documents[i][1].tolist()[0] for i in range(2)] == [0, 0]
    assert documents.num_assistant.tolist() == [len(documents[i][0]) - 1 for i in range(2)]


def test_the_second_call_takes_the_cache_and_reads_and_renders_nothing(tmp_path, tokenizer, no_work):
    source = put(tmp_path / "a.jsonl", [talk(i) for i in range(20)])
    first = load_or_tokenize("mine", source, tokenizer, tmp_path / "cache")
    no_work()
    assert same(load_or_tokenize("mine", source, tokenizer, tmp_path / "cache"), first)
    assert load_or_tokenize("another name", source, tokenizer, tmp_path / "cache").name == "another name"


def test_whatever_decides_the_documents_is_part_of_the_key(tmp_path, tokenizer):
    rows = [{"messages": talk(i)["messages"], "text": f"text {i}"} for i in range(60)]
    path = str(put(tmp_path / "a.jsonl", rows).path)
    sources = [
        SourceConfig(path),
        SourceConfig(path, limit=10),
        SourceConfig(path, limit=11),
        SourceConfig(path, part="val"),
        SourceConfig(path, part="train"),
        SourceConfig(path, schema=Schema.text),
    ]
    made = [load_or_tokenize("mine", source, tokenizer, tmp_path / "cache") for source in sources]
    assert [len(documents) for documents in made] == [60, 10, 11, 3, 57, 60]
    other = load_or_tokenize("mine", sources[0], bytes_tokenizer(300), tmp_path / "cache")
    assert len({documents.content_hash for documents in [*made, other]}) == 7
    assert other[3][0].tolist() == chat.render(rows[3], bytes_tokenizer(300), None).ids


def test_a_changed_file_is_rendered_anew(tmp_path, tokenizer):
    before = load_or_tokenize("mine", put(tmp_path / "a.jsonl", [talk(1), talk(2)]), tokenizer, tmp_path / "cache")
    after = load_or_tokenize("mine", put(tmp_path / "a.jsonl", [talk(1), talk(2), talk(3)]), tokenizer, tmp_path / "cache")
    assert (len(before), len(after)) == (2, 3)
    assert before.content_hash != after.content_hash


def test_two_processes_give_the_same_bytes_as_one(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("chattrain.data.tokenising.PARALLEL_RECORDS", 4096)
    rows = [talk(i) if i % 700 else BAD for i in range(4300)]
    source = put(tmp_path / "a.jsonl", rows)
    one, two = (
        load_or_tokenize("mine", source, tokenizer, tmp_path / f"cache{n}", skip_malformed=True, workers=n) for n in (1, 2)
    )
    assert same(one, two)
    assert one.skipped == 7 and len(one) == 4293
    with pytest.raises(UserError, match="line 1: message 0 is from 'assistant'"):
        load_or_tokenize("mine", source, tokenizer, tmp_path / "cache2", workers=2)


def test_a_malformed_row_is_refused_with_source_row_reason_and_way_out(tmp_path, tokenizer):
    source = put(tmp_path / "a.jsonl", [talk(0), talk(1), BAD, talk(3)])
    with pytest.raises(UserError) as refusal:
        load_or_tokenize("mine", source, tokenizer, tmp_path / "cache")
    for part in ("mine", source.path, "line 3", "message 0 is from 'assistant'", "data.on_malformed=skip"):
        assert part in str(refusal.value)


def test_malformed_rows_are_left_out_and_counted_when_asked(tmp_path, tokenizer):
    source = put(tmp_path / "a.jsonl", [talk(0), BAD, talk(2), {"text": "x"}, talk(4)])
    documents = load_or_tokenize("mine", source, tokenizer, tmp_path / "cache", skip_malformed=True)
    assert documents.skipped == 2 and documents.record_indices.tolist() == [0, 2, 4]
    assert documents[1][0].tolist() == chat.render(talk(2), tokenizer).ids
    with pytest.raises(UserError, match="line 2"):  # what was made with skip is not taken for refuse
        load_or_tokenize("mine", source, tokenizer, tmp_path / "cache")


def test_a_source_without_a_usable_row_is_refused_with_the_first_reasons(tmp_path, tokenizer):
    source = put(tmp_path / "a.jsonl", [BAD, {"text": "x"}])
    with pytest.raises(UserError) as refusal:
        load_or_tokenize("mine", source, tokenizer, tmp_path / "cache", skip_malformed=True)
    assert "no usable row" in str(refusal.value)
    assert "line 1: message 0" in str(refusal.value) and "line 2: no column 'messages'" in str(refusal.value)


@pytest.mark.parametrize("killed", [RuntimeError("killed"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
def test_what_is_killed_half_way_leaves_nothing_and_is_made_whole_later(tmp_path, tokenizer, monkeypatch, killed):
    source = put(tmp_path / "a.jsonl", [talk(i) for i in range(600)])
    calls = []

    def dies_at_the_second_unit(*arguments, whole=NativeFormat.encode, **named):
        calls.append(1)
        if len(calls) == 2:
            raise killed
        return whole(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(NativeFormat, "encode", dies_at_the_second_unit)
        with pytest.raises(type(killed)):
            load_or_tokenize("mine", source, tokenizer, tmp_path / "cache", workers=1)
    assert len(calls) == 2
    assert not list((tmp_path / "cache" / "tokens").iterdir())
    assert len(load_or_tokenize("mine", source, tokenizer, tmp_path / "cache")) == 600
    assert not list((tmp_path / "cache" / "tokens").glob(".*"))


def test_two_that_prepare_the_same_source_at_once_both_get_it(tmp_path, tokenizer, monkeypatch):
    source = put(tmp_path / "a.jsonl", [talk(i) for i in range(10)])
    others = []

    def another_is_faster(*arguments, whole=NativeFormat.encode, **named):
        monkeypatch.setattr(NativeFormat, "encode", whole)
        others.append(load_or_tokenize("other", source, tokenizer, tmp_path / "cache"))
        return whole(*arguments, **named)

    monkeypatch.setattr(NativeFormat, "encode", another_is_faster)
    assert same(load_or_tokenize("mine", source, tokenizer, tmp_path / "cache"), others[0])
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 1


@pytest.mark.parametrize("vocab_size, dtype", [(65_536, np.uint16), (65_537, np.uint32)])
def test_tokens_take_two_bytes_while_every_id_fits_and_four_beyond(tmp_path, vocab_size, dtype):
    tokenizer = bytes_tokenizer(vocab_size)
    documents = load_or_tokenize("mine", put(tmp_path / "a.jsonl", [talk(2)]), tokenizer, tmp_path / "cache")
    assert documents.tokens.dtype == dtype
    assert documents[0][0].tolist() == chat.render(talk(2), tokenizer).ids
    assert int(documents.tokens.max()) == vocab_size - 1  # <|output_end|>, the last of all


def test_the_arrays_are_mapped_and_not_read_into_memory(tmp_path, tokenizer):
    documents = load_or_tokenize("mine", put(tmp_path / "a.jsonl", [talk(0)]), tokenizer, tmp_path / "cache")
    assert isinstance(documents.tokens, np.memmap) and not documents.tokens.flags.writeable


def test_what_was_read_is_the_same_after_its_memory_was_released(tmp_path, tokenizer):
    documents = load_or_tokenize("mine", put(tmp_path / "a.jsonl", [talk(i) for i in range(50)]), tokenizer, tmp_path / "cache")
    kept = [documents[i] for i in range(50)]
    before = [[array.tolist() for array in document] for document in kept]
    documents.release()
    assert [[array.tolist() for array in document] for document in kept] == before
    assert [[array.tolist() for array in documents[i]] for i in range(50)] == before


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("CHATTRAIN_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.delenv("CHATTRAIN_CACHE")
    assert default_cache_dir() == Path("~/.cache/chattrain").expanduser()
