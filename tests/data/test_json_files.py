"""JSON as people write it: a record a line, an array, pretty-printed, compressed; what is wrong in one record hides no other."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
from pathlib import Path

import pyarrow as pa
import pytest

from chattrain.chat import Malformed
from chattrain.config.data import SourceConfig
from chattrain.config.words import Schema
from chattrain.data.malformed import MalformedRows
from chattrain.data.sources import open_records, with_schema
from chattrain.errors import UserError

ROWS = [{"text": 'one "quoted" {x} [y], \\'}, {"text": "zwei ü 東京 🙂", "more": {"a": [1, {"b": "]}"}]}}, {"text": "three\n\n"}]
BOM = b"\xef\xbb\xbf"


def dumps(row: dict, **how) -> str:
    return json.dumps(row, ensure_ascii=False, **how)


LINES = "\n".join(dumps(row) for row in ROWS)
ARRAYS = {
    "pretty": json.dumps(ROWS, indent=2, ensure_ascii=False),
    "on one line": dumps(ROWS),  # type: ignore[arg-type]
    "a record a line": "[\n" + ",\n".join(dumps(row) for row in ROWS) + "\n]\n",
    "a comma too many": "[" + ",".join(dumps(row) for row in ROWS) + ",]",
    "no array around": "\n".join(json.dumps(row, indent=1, ensure_ascii=False) for row in ROWS),
    "commas but no array": ",\n".join(json.dumps(row, indent=1, ensure_ascii=False) for row in ROWS),
}


def opened(path: Path, content: bytes | str, **source):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return open_records("mine", SourceConfig(str(path), schema=Schema.text, **source), path.parent / "cache")


def read(path: Path, content: bytes | str) -> list[dict]:
    return [row for _, row in opened(path, content).read(0, 99)]


def usable(path: Path, content: bytes | str) -> tuple[list[dict], MalformedRows]:
    malformed = MalformedRows()
    return [row for _, row in opened(path, content).convert(lambda row: row, malformed=malformed)], malformed


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "A.JSONL"])
@pytest.mark.parametrize(
    "content", [LINES, LINES + "\n", LINES.replace("\n", "\r\n"), "\n \n" + LINES.replace("\n", "\n\n") + "\n\n"]
)
@pytest.mark.parametrize("begin", [b"", BOM])
def test_lines_may_have_a_byte_order_mark_carriage_returns_and_blanks_between(tmp_path, name, content, begin):
    assert read(tmp_path / name, begin + content.encode()) == ROWS


@pytest.mark.parametrize("shape", ARRAYS)
@pytest.mark.parametrize("begin", [b"", BOM, b"\n  "])
def test_an_array_and_values_over_several_lines_give_their_records(tmp_path, shape, begin):
    assert read(tmp_path / "a.json", begin + ARRAYS[shape].encode()) == ROWS


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize("shape", ["pretty", "on one line", "a record a line"])
def test_an_array_is_known_by_its_content_and_not_by_its_name(tmp_path, name, shape):
    assert read(tmp_path / name, ARRAYS[shape]) == ROWS


def test_lists_of_messages_are_conversations_a_line_or_an_element_each(tmp_path):
    talks = [[{"role": "user", "content": f"Hi {i}"}, {"role": "assistant", "content": "Yo"}] for i in range(3)]
    expected = [{"messages": talk} for talk in talks]
    for n in (1, 3):
        assert read(tmp_path / "a.jsonl", "\n".join(map(json.dumps, talks[:n]))) == expected[:n]
    assert read(tmp_path / "a.json", json.dumps(talks)) == expected
    assert read(tmp_path / "a.json", json.dumps(talks, indent=1)) == expected


@pytest.mark.parametrize("content", [LINES, *ARRAYS.values()])
def test_compressed_files_are_read_as_what_they_hold(tmp_path, content):
    end = ".jsonl" if content is LINES else ".json"
    half = len(content.encode()) // 2
    two_members = b"".join(gzip.compress(part) for part in (content.encode()[:half], content.encode()[half:]))
    assert read(tmp_path / f"a{end}.gz", two_members) == ROWS
    assert read(tmp_path / f"b{end}.zst", bytes(pa.compress(content.encode(), "zstd", asbytes=True))) == ROWS


@pytest.mark.parametrize("end", [".gz", ".zst"])
def test_a_compressed_file_that_is_cut_or_none_is_refused_by_its_name(tmp_path, end):
    whole = gzip.compress(LINES.encode()) if end == ".gz" else bytes(pa.compress(LINES.encode() * 99, "zstd", asbytes=True))
    for content in (whole[: len(whole) // 2], b"no such thing"):
        with pytest.raises(UserError, match=f"a.jsonl{end}.* cannot be unpacked"):
            read(tmp_path / f"a.jsonl{end}", content)


BAD = {
    b'{"text": "b"': "not JSON",
    b'{"text": "b"},': "not JSON",
    b"{'text': 'b'}": "not JSON",
    b'{"text": "b" ': "not JSON",
    b"nothing": "not JSON",
    b"\0\0\0\0": "not JSON",
    b'{"text": "a\0b"}': "not JSON",
    b"[" * 100_000: "not JSON",
    b'{"n": ' + b"9" * 5_000 + b"}": "not JSON",
    b'{"text": "b", "text": "c"}': "the key 'text' is there twice, with different values",
    b'{"text": "\xfc"}': "not UTF-8",
    b'\xff\xfe{"text": "b"}': "not UTF-8",
    b'"b"': "a text instead of an object",
    b"7.5": "a number instead of an object",
    b"true": "true instead of an object",
    b"null": "null instead of an object",
}


@pytest.mark.parametrize("line", BAD, ids=range(len(BAD)))
def test_a_bad_line_is_refused_by_file_and_line_or_left_out_and_counted(tmp_path, line):
    content = b'{"text": "a"}\n\n' + line + b'\n{"text": "c"}\n'
    with pytest.raises(UserError) as refused:
        read(tmp_path / "a.jsonl", content)
    for part in (f"{tmp_path / 'a.jsonl'} line 3: {BAD[line]}", "data.on_malformed=skip"):
        assert part in str(refused.value)
    rows, malformed = usable(tmp_path / "a.jsonl", content)
    assert rows == [{"text": "a"}, {"text": "c"}]
    assert malformed.by_reason() == {BAD[line]: 1} and "line 3" in str(malformed)


def test_a_last_line_that_is_cut_is_said_to_be(tmp_path):
    with pytest.raises(UserError, match=r"line 2: not JSON: .*was it cut"):
        read(tmp_path / "a.jsonl", b'{"text": "a"}\n{"text": "b')
    with pytest.raises(UserError) as refused:
        read(tmp_path / "a.jsonl", b'{"text": "a"}\n{"text": "b"},\n')
    assert "was it cut" not in str(refused.value)


def test_a_key_that_is_there_twice_with_one_value_is_there_once(tmp_path):
    assert read(tmp_path / "a.jsonl", b'{"text": "a", "text": "a"}\n') == [{"text": "a"}]


@pytest.mark.parametrize("content", ["[]", "[]\n", "[\n]\n"])
def test_an_array_without_records_is_empty(tmp_path, content):
    with pytest.raises(UserError, match="is empty"):
        read(tmp_path / "a.json", content)


@pytest.mark.parametrize(
    "element, reason",
    [
        ('{"text": "b",}', "not JSON"),
        ('{"text": "b}', "not JSON"),
        ('{"text": ["b"}', "not JSON"),
        ('{"text": "b"]}', "not JSON"),
        ('{"text" "b"}', "not JSON"),
        ("null", "null instead of an object"),
        ("5", "a number instead of an object"),
    ],
)
def test_a_bad_element_of_an_array_hides_no_other(tmp_path, element, reason):
    content = f'[\n{{"text": "a"}},\n{element}\n,\n{{"text": "c"}}\n]'
    with pytest.raises(UserError, match=r"a\.json row 1 \(counted from 0\): " + reason):
        read(tmp_path / "a.json", content)
    rows, malformed = usable(tmp_path / "a.json", content)
    assert rows == [{"text": "a"}, {"text": "c"}] and malformed.count == 1


@pytest.mark.parametrize("end", ["", ",", ", {", ', {"text": "b', ', {"text": "b"'])
def test_an_array_that_is_cut_keeps_what_is_whole_and_counts_the_rest(tmp_path, end):
    content = '[{"text": "a"}, {"text": "a2"}' + end
    rows, malformed = usable(tmp_path / "a.json", content)
    assert rows == [{"text": "a"}, {"text": "a2"}] and malformed.count == 1
    with pytest.raises(UserError, match="not JSON"):
        read(tmp_path / "a.json", content)
    assert [row for _, row in opened(tmp_path / "a.json", content).read(0, 2)] == rows


def test_what_follows_an_array_is_no_part_of_it(tmp_path):
    rows, malformed = usable(tmp_path / "a.json", '[{"text": "a"},\n{"text": "b"}]\nnonsense')
    assert len(rows) == 2 and malformed.count == 1


@pytest.mark.parametrize("encoding", ["UTF-16", "UTF-32"])
def test_wide_characters_are_refused_with_the_command_that_converts_them(tmp_path, encoding):
    with pytest.raises(UserError) as refused:
        read(tmp_path / "a b.jsonl", LINES.encode(encoding))
    command = str(refused.value).split("`")[1]
    assert f"iconv -f {encoding} -t UTF-8 '{tmp_path / 'a b.jsonl'}'" in command
    if shutil.which("iconv"):
        subprocess.run(command, shell=True, check=True)
        assert read(tmp_path / "c.jsonl", (tmp_path / "a b.utf8.jsonl").read_bytes()) == ROWS


def test_the_schema_is_told_by_the_first_record_that_can_be_read(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'broken\nnull\n{"id": 1}\n{"instruction": "a", "output": "b"}\n{"text": "c"}\n')
    source = SourceConfig(str(tmp_path / "a.jsonl"), schema=Schema.auto)
    assert with_schema("mine", source, tmp_path / "cache").schema == Schema.alpaca
    (tmp_path / "a.jsonl").write_bytes(b"broken\n" * 5)
    with pytest.raises(UserError, match=r"a.jsonl line 1: not JSON: .* no other"):
        with_schema("mine", source, tmp_path / "cache")
    (tmp_path / "a.jsonl").write_text("\n \n")
    with pytest.raises(UserError, match="is empty"):
        with_schema("mine", source, tmp_path / "cache")


def test_rows_inside_an_object_are_refused_with_the_command_that_takes_them_out(tmp_path):
    (tmp_path / "a b.json").write_text(json.dumps({"version": 1, "data": ROWS}, indent=1))
    with pytest.raises(UserError, match=r"jq -c '.data\[\]' '.*a b.json' > '.*a b.rows.jsonl'"):
        with_schema("mine", SourceConfig(str(tmp_path / "a b.json"), schema=Schema.auto), tmp_path / "cache")


def test_that_command_fits_a_column_with_blanks_a_folder_and_a_packed_file(tmp_path):
    def refusal(path: Path) -> str:
        with pytest.raises(UserError) as refused:
            with_schema("mine", SourceConfig(str(path), schema=Schema.auto), tmp_path / "cache")
        return str(refused.value)

    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/a.json").write_text(json.dumps({"my data": ROWS}))
    assert f"""jq -c '.["my data"][]' {tmp_path}/folder/a.json > {tmp_path}/folder/a.rows.jsonl""" in refusal(tmp_path / "folder")
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(json.dumps({"train": ROWS, "test": ROWS}).encode()))
    assert f"`gunzip -c {tmp_path}/b.json.gz | jq -c '.train[]' > " in refusal(tmp_path / "b.json.gz")


def test_records_are_found_by_their_number_in_several_files(tmp_path):
    for n, name in enumerate(("a.jsonl", "b.jsonl.gz", "c.jsonl")):
        lines = "".join(f'{{"text": "{n}{i}"}}\n\n' for i in range(3)).encode()
        (tmp_path / name).write_bytes(gzip.compress(lines) if name.endswith("gz") else lines)
    records = open_records("mine", SourceConfig(str(tmp_path), schema=Schema.text), tmp_path / "cache")
    assert [records.table[i]["text"] for i in (8, 0, 4, 3)] == ["22", "00", "11", "10"]
    assert records.places.full(4) == f"{tmp_path / 'b.jsonl.gz'} line 3"
    assert records.places.short(8) == "c.jsonl line 5"


def test_a_reason_stands_in_the_exception_of_the_table(tmp_path):
    with pytest.raises(Malformed, match=r"not UTF-8: 0xfc .byte 11"):
        opened(tmp_path / "a.jsonl", b'{"text": "\xfc"}\n').table[0]
