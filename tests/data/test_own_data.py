"""data=local through the command: what a user types, what is trained on, and what the log says of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import chattrain
from chattrain.config.compose import compose
from chattrain.config.words import Schema
from chattrain.errors import UserError
from tests.helpers import TINY, train, write_talk

SHARED = [o for o in TINY if not o.startswith("data.train_path")]


def local(*typed: str):
    return compose(["stage=sft", "data=local", *typed]).data


def inspect(*typed: str) -> dict:
    return chattrain.run(["command=inspect", "stage=sft", *SHARED, "inspect.rows=2", *typed])


def lines(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_path_that_is_listed_twice_counts_twice_however_it_is_spelt(workplace):
    write_talk(workplace, "a.jsonl", count=40)
    write_talk(workplace, "b.jsonl", count=100)
    for again in ("a.jsonl", "./a.jsonl", str(workplace / "a.jsonl")):
        sources = local(f"data.train_path=[a.jsonl,{again},b.jsonl]").mixture("sft").train
        assert len(sources) == 3 and [Path(s.path).name for s in sources.values()] == ["a.jsonl", "a.jsonl", "b.jsonl"]
        assert inspect(f"data.train_path=[a.jsonl,{again},b.jsonl]")["documents_an_epoch"] == 2 * 38 + 95
    assert inspect("data.train_path=[a.jsonl,a.jsonl,a.jsonl]")["documents_an_epoch"] == 3 * 38


def test_the_columns_of_each_file_tell_its_schema_and_the_log_says_it_once(workplace, caplog):
    write_talk(workplace, "talk.jsonl")
    lines(workplace / "al.jsonl", [{"instruction": f"Say {i}", "input": "", "output": f"{i}"} for i in range(40)])
    caplog.set_level("INFO", logger="chattrain")
    summary = train("sft", "told", "data.train_path=[talk.jsonl,al.jsonl]", "init.from=scratch", "train.max_steps=1")
    assert summary["data"]["documents"] == 57 + 38
    for name, schema in (("talk.jsonl", "messages"), ("al.jsonl", "alpaca")):
        said = [m for m in caplog.messages if name in m and f"data.schema={schema}" in m]
        assert len(said) == 1


def test_the_schema_of_the_validation_data_may_be_another(workplace):
    lines(workplace / "v.jsonl", [{"question": "1 + 1?", "answer": "2"}])
    data = local("data.train_path=t.jsonl", "data.val_path=v.jsonl", "data.schema=messages", "data.val_schema=gsm8k")
    data.check()
    assert data.mixture("sft").train["t.jsonl"].schema == Schema.messages
    assert data.mixture("sft").val["v.jsonl"].schema == Schema.gsm8k
    both = local("data.train_path=t.jsonl", "data.val_path=[v.jsonl,w.jsonl]", "data.val_schema=[gsm8k,text]").mixture("sft")
    assert [s.schema for s in both.val.values()] == [Schema.gsm8k, Schema.text]
    assert both.train["t.jsonl"].schema == Schema.auto
    assert local("data.train_path=t", "data.val_path=v", "data.schema=text").mixture("sft").val["v"].schema == Schema.text


@pytest.mark.parametrize(
    "typed, said",
    [
        (["data.val_schema=text"], ["data.val_schema=text", "data.val_path"]),
        (["data.val_path=v", "data.val_schema=chat"], ["data.val_schema=chat", "alpaca"]),
        (["data.val_path=[v,w]", "data.schema=[text,text,text]"], ["3 entries", "1 paths"]),
        (["data.train_path=[t,u]", "data.val_path=v", "data.schema=[text,gsm8k]"], ["2 entries for 1", "data.val_schema"]),
        (["data.train_path=2024"], ["2024", 'data.train_path="2024"']),
    ],
)
def test_a_schema_or_path_that_cannot_be_is_refused(workplace, typed, said):
    with pytest.raises(UserError) as refused:
        local(*(["data.train_path=t"] if "train_path" not in typed[0] else []), *typed).mixture("sft")
    assert all(part in str(refused.value) for part in said), str(refused.value)


def test_copies_of_training_documents_in_the_validation_are_counted_with_a_warning(workplace, caplog):
    caplog.set_level("INFO", logger="chattrain")
    held = [json.loads(line) for line in write_talk(workplace, "held.jsonl", factor=5).read_text().splitlines()]
    talk = [json.loads(line) for line in write_talk(workplace).read_text().splitlines()]
    talk[7]["messages"][0]["content"] = talk[7]["messages"][0]["content"].upper()
    settings = ["data.train_path=talk.jsonl", "data.val_path=held.jsonl", "init.from=scratch", "train.max_steps=1"]
    for copies in ([], talk[5:9]):
        caplog.clear()
        lines(workplace / "held.jsonl", held[20:40] + copies)
        train("sft", f"copies{len(copies)}", *settings)
        assert any(f"validation: {20 + len(copies)} documents" in m for m in caplog.messages)
        said = [r for r in caplog.records if "validation documents are in the training data" in r.getMessage()]
        assert [r.levelname for r in said] == ["WARNING"] * bool(copies)
        assert all("4 of 24" in r.getMessage() and "4 copies" in r.getMessage() for r in said)


def test_the_command_of_the_readme_warns_of_nothing_that_was_not_asked_for(workplace, caplog):
    write_talk(workplace)
    write_talk(workplace, "held.jsonl", count=10, factor=5)
    typed = [o for o in TINY if not o.startswith("eval=")]
    more = ["data.val_path=held.jsonl", "init.from=scratch", "train.max_steps=1"]
    for run, asked in (("default", []), ("asked", ["eval=mmlu_arc"])):
        caplog.clear()
        chattrain.run(["stage=sft", *typed, *more, f"run.name={run}", *asked])
        warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        assert bool([m for m in warned if "question set" in m]) == bool(asked)


def test_rows_that_are_left_out_are_in_the_log_and_the_summary_and_places_in_inspect(workplace, caplog, capsys):
    file = write_talk(workplace)
    file.write_text("\n" + file.read_text() + "null\n{\n{\n")
    with pytest.raises(UserError, match=r"talk.jsonl line 62: null"):
        inspect("data.train_path=talk.jsonl")
    settings = ["data.train_path=talk.jsonl", "data.val_path=talk.jsonl", "data.on_malformed=skip"]
    summary = train("sft", "left", *settings, "init.from=scratch", "train.max_steps=1")
    assert summary["data"]["malformed"] == {"talk.jsonl": {"not JSON": 2, "null instead of an object": 1}}
    assert any("3 of 63 rows left out: 2 not JSON (first: line 63)" in m for m in caplog.messages)
    capsys.readouterr()
    inspect(*settings)
    first = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("row 0: "))
    number = int(first.removeprefix("row 0: talk.jsonl line "))
    assert json.loads(file.read_text().splitlines()[number - 1])["messages"]


@pytest.mark.parametrize("folder", ["ü", "a=b", "c[1]", "it's", "x,y", "trailing ", "~t", "$HOME", "100%"])
def test_a_folder_of_any_name_is_trained_on(workplace, folder):
    (workplace / folder).mkdir()
    write_talk(workplace / folder)
    assert inspect(f"data.train_path={folder}/talk.jsonl")["documents_an_epoch"] == 57
