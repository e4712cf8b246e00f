"""Names of files as people have them, on the command line: they work as typed, or the message has the argument that works."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from chattrain.config.compose import compose
from chattrain.errors import UserError
from tests.helpers import command_line

NAMES = [
    "ü", "a=b", "c[1]", "d{e}", "h#1", "it's", "my data", "p%20", "100%", "q(1)", "star*", "x,y", "~t", "$HOME", "trailing ",
    " lead", 'say "hi"', "a&b", "a;b", "東京", "${x}", "back\\", "!", "a:b", "[x]", "(1)", "'q'", "a|b", "-x", "+x", "@x",
    "null", "1e3",
]  # fmt: skip


def path_of(typed: list[str]) -> str:
    return compose(["data=local", *typed]).data.train_path  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_is_there_is_read_as_typed(workplace, name):
    (workplace / name).mkdir()
    (workplace / name / "talk.jsonl").touch()
    assert path_of([f"data.train_path={name}/talk.jsonl"]) == f"{name}/talk.jsonl"
    if name not in ("null", "1e3"):  # which mean something by themselves
        assert path_of([f"data.train_path={name}"]) == name


@pytest.mark.parametrize("name", [name for name in NAMES if name != "${x}"])  # which is another key's value
def test_a_name_that_is_not_there_is_read_as_typed_or_the_message_has_the_argument(workplace, name):
    value = f"{name}/new.jsonl"
    try:
        found = path_of([f"data.train_path={value}"])
    except UserError as refused:
        message = str(refused)
        assert "Exception" not in message and "mismatched" not in message and "hydra.cc" not in message
        (argument,) = shlex.split(message[message.index("is typed ") + len("is typed ") :])
        found = path_of([argument])
    assert found in (value, value.strip())


def test_lists_of_such_names_and_sweeps_over_them_work_as_typed(workplace):
    assert path_of(["data.train_path=[ü/a.jsonl,my data/b=c.jsonl]"]) == ["ü/a.jsonl", "my data/b=c.jsonl"]
    for name in ("c[1].jsonl", "it's.jsonl"):
        (workplace / name).touch()
    assert path_of(["data.train_path=[c[1].jsonl,it's.jsonl]"]) == ["c[1].jsonl", "it's.jsonl"]


@pytest.mark.parametrize(
    "typed, said",
    [
        ("run.name=q(1)", "'run.name=\"q(1)\"'"),
        ("run.name=it's", "run.name="),
        ("stage=[mid", "'stage=\"[mid\"'"),
        ("träin.seq_len=5", "no key"),
        ("train.seq_len", "train.seq_len=<value>"),
        ("stage=mid,sft", "--multirun"),
        ("=5", "no key"),
    ],
)
def test_what_cannot_be_read_is_said_in_our_words(workplace, capsys, typed, said):
    refused = command_line(capsys, "data=local", "data.train_path=x.jsonl", typed)
    assert refused.status == 2 and said in refused.message
    for word in ("Exception", "mismatched", "EOF", "hydra.cc", "no viable", "EQUAL"):
        assert word not in refused.err


def test_the_argument_of_a_message_is_what_a_shell_hands_on(workplace):
    with pytest.raises(UserError) as refused:
        path_of(["data.train_path=d{e}'s/$x.jsonl"])
    (argument,) = shlex.split(str(refused.value).split("is typed ")[1])
    assert Path(path_of([argument])) == Path("d{e}'s/$x.jsonl")
