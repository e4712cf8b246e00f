"""Rows of files and folders in the hub's layouts; whatever cannot be read is a user's mistake with a way out."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from chattrain.config.data import SourceConfig
from chattrain.config.words import Schema
from chattrain.data.sources import identity, open_records
from chattrain.errors import UserError
from tests.conftest import SHARED_DATA


def texts(*names: str) -> list[dict]:
    return [{"text": name} for name in names]


def put(path: Path, rows: list[dict]) -> Path:
    """Rows into a file of the kind that its suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".jsonl", ".json"):
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows, pa.schema([("text", pa.string())])), path)
    else:
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    return path


def rows_of(path, cache: Path, **source) -> list[dict]:
    rows = open_records("mine", SourceConfig(path=str(path), schema=Schema.text, **source), cache)
    return [row for _, row in rows.read(0, len(rows))]


def numbers_of(path, cache: Path, **source) -> list[int]:
    rows = open_records("mine", SourceConfig(path=str(path), schema=Schema.text, **source), cache)
    return [number for number, _ in rows.read(0, len(rows))]


def refusal(path, cache: Path, **source) -> str:
    with pytest.raises(UserError) as raised:
        rows_of(path, cache, **source)
    return str(raised.value)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".json", ".arrow"])
def test_every_kind_of_file_gives_its_rows_in_order(tmp_path, cache, suffix):
    rows = texts("eins", "zwei", "drei 東京 🙂", "\u2028 vier\n")
    assert rows_of(put(tmp_path / f"any{suffix}", rows), cache) == rows


def test_a_stretch_of_rows_is_numbered_as_in_the_source(tmp_path, cache):
    rows = open_records("mine", SourceConfig(path=str(put(tmp_path / "a.jsonl", texts(*"abcdef")))), cache)
    assert len(rows) == 6
    assert list(rows.read(2, 4)) == [(2, {"text": "c"}), (3, {"text": "d"})]
    assert [number for number, _ in rows.read(4, 99)] == [4, 5]


def test_json_lines_hold_text_in_one_row_and_parts_in_the_next_and_bare_message_lists(tmp_path, cache):
    user = {"role": "user", "content": "Hi"}
    first = [user, {"role": "assistant", "content": "Yo"}]
    second = [user, {"role": "assistant", "content": [{"type": "python", "text": "1"}]}]
    lines = [json.dumps({"messages": first, "id": 1}), "", json.dumps(second), "   "]
    (tmp_path / "talk.jsonl").write_bytes("\r\n".join(lines).encode())
    assert rows_of(tmp_path / "talk.jsonl", cache) == [{"messages": first, "id": 1}, {"messages": second}]


@pytest.mark.parametrize(
    "files, asked, expected",
    [
        ({"train-00000-of-00001.parquet": "ab"}, {}, "ab"),
        ({"train-00001-of-00002.parquet": "cd", "train-00000-of-00002.parquet": "ab"}, {}, "abcd"),
        ({"data/train-00000-of-00001.parquet": "ab", "data/test-00000-of-00001.parquet": "c"}, {"split": "test"}, "c"),
        ({"main/train-00000-of-00001.parquet": "a", "socratic/train-00000-of-00001.parquet": "b"}, {"subset": "main"}, "a"),
        (
            {"all/test-00000-of-00001.parquet": "a", "law/test-00000-of-00001.parquet": "b"},
            {"subset": "all", "split": "test"},
            "a",
        ),
        ({"ARC-Easy/test.parquet": "a", "ARC-Hard/test.parquet": "b"}, {"subset": "ARC-Hard", "split": "test"}, "b"),
        ({"test.parquet": "a"}, {"subset": "all", "split": "test"}, "a"),
        ({"main/train.parquet": "a"}, {}, "a"),
        ({"train/one.jsonl": "a", "train/two.jsonl": "b", "test/one.jsonl": "c"}, {}, "ab"),
        ({"train.jsonl": "a", "test.jsonl": "b", "README.md": ""}, {"split": "test"}, "b"),
        ({"one.jsonl": "a", "two.jsonl": "b", "notes.txt": ""}, {}, "ab"),
    ],
)
def test_a_folder_is_read_in_the_layouts_of_the_hub(tmp_path, cache, files, asked, expected):
    for name, letters in files.items():
        put(tmp_path / name, texts(*letters)) if letters else (tmp_path / name).write_text("read me")
    assert [row["text"] for row in rows_of(tmp_path, cache, **asked)] == list(expected)


def test_a_folder_that_datasets_has_saved_is_read(tmp_path, cache):
    import datasets

    datasets.Dataset.from_list(texts("a", "b")).save_to_disk(str(tmp_path / "saved"))
    assert rows_of(tmp_path / "saved", cache) == texts("a", "b")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:100])
    assert "saved) cannot be read" in refusal(tmp_path / "saved", cache)
    file.unlink()
    assert file.name in refusal(tmp_path / "saved", cache)


def test_a_missing_split_or_subset_is_said_with_what_there_is(tmp_path, cache):
    put(tmp_path / "main" / "train.parquet", texts("a"))
    assert "no val split; it holds main" in refusal(tmp_path, cache, split="val")
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables/a.csv").write_text("a,b\n")
    assert "it holds a.csv. Known formats are .parquet" in refusal(tmp_path / "tables", cache)
    assert "no folder socratic; it holds main" in refusal(tmp_path, cache, subset="socratic")


def test_a_folder_of_several_subsets_is_not_read_by_guessing(tmp_path, cache):
    for subset in ("ARC-Easy", "ARC-Challenge"):
        put(tmp_path / subset / "test.parquet", texts(subset))
    message = refusal(tmp_path, cache, split="test")
    assert "ARC-Easy" in message and "ARC-Challenge" in message


def test_a_limit_takes_the_first_rows_of_one_fixed_shuffle(tmp_path, cache):
    path = put(tmp_path / "a.jsonl", texts(*map(str, range(100))))
    ten, twenty = (numbers_of(path, cache, limit=n) for n in (10, 20))
    assert len(set(twenty)) == 20 and twenty[:10] == ten
    assert ten != sorted(ten) and max(twenty) > 20
    assert numbers_of(path, cache, limit=10) == ten
    assert [row["text"] for row in rows_of(path, cache, limit=10)] == [str(n) for n in ten]
    assert numbers_of(path, cache, limit=100) == numbers_of(path, cache, limit=999) == list(range(100))


def test_the_parts_for_training_and_validation_share_nothing_and_leave_nothing_out(tmp_path, cache):
    path = put(tmp_path / "a.jsonl", texts(*map(str, range(105))))
    train, val = (numbers_of(path, cache, part=part) for part in ("train", "val"))
    whole = numbers_of(path, cache)
    assert len(val) == len(whole) // 20
    assert not set(train) & set(val)
    assert sorted(train + val) == sorted(whole)


def test_a_source_too_small_to_keep_some_for_validation_is_refused(tmp_path, cache):
    path = put(tmp_path / "a.jsonl", texts(*"abc"))
    assert "data.val_path" in refusal(path, cache, part="val")
    assert len(rows_of(path, cache, part="train")) == 3


def test_a_changed_file_is_another_source(tmp_path, cache):
    path = tmp_path / "a.jsonl"
    source = SourceConfig(path=str(path), schema=Schema.text)
    put(path, texts("a"))
    before = identity("mine", source, cache)
    assert identity("another name", source, cache) == before
    put(path, texts("a", "b"))
    assert identity("mine", source, cache) != before


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_source_without_rows_is_refused(tmp_path, cache, name):
    assert f"mine ({put(tmp_path / name, [])}) is empty" in refusal(tmp_path / name, cache)


@pytest.mark.parametrize("path", ["not-there.jsonl", "/not/there", "./not-there", "some/deep/folder/rows.parquet"])
def test_a_missing_file_is_refused_with_the_place_it_was_looked_for_in(workplace, cache, path):
    message = refusal(path, cache)
    assert path in message and str(workplace) in message


@pytest.mark.parametrize("name", ["rows.csv", "rows"])
def test_a_file_of_unknown_kind_is_refused_with_the_kinds_that_are_known(tmp_path, cache, name):
    (tmp_path / name).write_text("text\na\n")
    message = refusal(tmp_path / name, cache)
    assert name in message and ".parquet" in message and ".jsonl" in message


def test_files_of_two_kinds_are_not_mixed(tmp_path, cache):
    put(tmp_path / "train-0.jsonl", texts("a"))
    put(tmp_path / "train-1.parquet", texts("b"))
    assert "one kind" in refusal(tmp_path, cache)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_damaged_file_is_refused_by_its_name(tmp_path, cache, name):
    (tmp_path / name).write_bytes(b"this is no table")
    message = refusal(tmp_path / name, cache)
    assert str(tmp_path / name) in message
    assert "An error occurred" not in message  # the reason, not that there is one


@pytest.mark.parametrize(
    "line, reason",
    [
        (b'{"text": "b"', "not JSON"),
        (b'"b"', "a text instead of an object"),
        (b"7", "a number instead of an object"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b"null", "null instead of an object"),
    ],
)
def test_a_bad_line_is_refused_by_file_and_line(tmp_path, cache, line, reason):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n\n' + line + b"\n")
    message = refusal(tmp_path / "a.jsonl", cache)
    assert f"{tmp_path / 'a.jsonl'} line 3" in message and reason in message


def test_a_hub_name_without_network_is_refused_with_the_name(workplace, cache):
    message = refusal("someone/not-cached", cache)
    assert "someone/not-cached" in message and "local file or folder" in message


def test_an_unknown_generated_task_is_refused_with_the_near_miss(cache):
    assert "spell_word" in refusal("generate:spell_wort", cache)


@pytest.mark.parametrize(
    "path, asked, rows, column",
    [
        ("mmlu", {"subset": "all", "split": "test"}, 11_250, "choices"),
        ("arc", {"subset": "ARC-Easy", "split": "test"}, 1_901, "answerKey"),
        ("arc", {"subset": "ARC-Challenge", "split": "test"}, 938, "answerKey"),
        ("gsm8k", {"subset": "main", "split": "train"}, 7_473, "answer"),
        ("sgd", {"split": "dev"}, 2_098, "messages"),
        ("text/tinyshakespeare.parquet", {}, 498, "text"),
    ],
)
def test_real_data_in_the_hubs_layout_opens_whole(cache, path, asked, rows, column):
    if not (SHARED_DATA / path).exists():
        pytest.skip(f"shared/data/{path} is not here")
    opened = open_records(path, SourceConfig(path=str(SHARED_DATA / path), schema=Schema.auto, **asked), cache)
    assert len(opened) == rows
    assert all(row[column] for _, row in opened.read(0, 50))


def test_what_is_held_out_is_never_trained_on_whatever_the_limits(tmp_path, cache):
    path = put(tmp_path / "all.jsonl", texts(*map(str, range(400))))
    held_out = set(numbers_of(path, cache, part="val"))
    assert len(held_out) == 20
    for limit in (5, 100, 300):
        assert set(numbers_of(path, cache, part="val", limit=limit)) <= held_out
        assert not held_out & set(numbers_of(path, cache, part="train", limit=limit))


# --- functions of the user's own -------------------------------------------------------------------------------------

OWN = """
calls = []
rows = ["eins", "zwei"]

def texts(split):
    calls.append(split)
    yield from ({"text": f"{split} {row}"} for row in rows)

def nothing(split):
    return []

def broken(split):
    yield {"text": "one"}
    raise KeyError("no file")

def strange(split):
    return [{"text": "one"}, "two"]

def unwritable(split):
    return [{"text": object()}]
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "ownsource.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("ownsource", None)
    return importlib.import_module("ownsource")


def test_a_function_of_the_users_own_is_a_source(own, cache):
    assert rows_of("python:ownsource.texts", cache) == texts("train eins", "train zwei")
    assert rows_of("python:ownsource.texts", cache, split="test") == texts("test eins", "test zwei")
    assert rows_of("python:ownsource.texts", cache) == texts("train eins", "train zwei")
    assert own.calls == ["train", "test"]  # once a process


def test_other_records_of_a_function_are_another_source(own, cache):
    source = SourceConfig(path="python:ownsource.texts", schema=Schema.text)
    before = identity("mine", source, cache)
    again = importlib.reload(own)
    assert identity("mine", source, cache) == before
    importlib.reload(again).rows.append("drei")
    assert identity("mine", source, cache) != before


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("nothing", "is empty"),
        ("broken", "python:ownsource.broken('train') failed: KeyError: 'no file'"),
        ("strange", "record 1 of python:ownsource.strange is a str, not a dict"),
        ("unwritable", "record 0 of python:ownsource.unwritable cannot be written as JSON"),
        ("missing", "has no attribute 'missing'"),
    ],
)
def test_a_function_that_gives_no_records_is_refused_by_name(own, cache, function, said):
    assert said in refusal(f"python:ownsource.{function}", cache)
    assert not [file for file in (cache / "files").glob(".*")]
