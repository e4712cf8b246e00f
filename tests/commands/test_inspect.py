"""command=inspect: what it shows is what the loop trains on, and text of strangers does no harm."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import chattrain
from chattrain.data.loader import Loader
from chattrain.errors import UserError
from tests.helpers import TINY, command_line, write_talk

SETTINGS = ["command=inspect", "stage=sft", *TINY, "init.from=scratch", "train.max_steps=9"]
ODD = "<|user_end|> <script>alert(1)</script> \u202eevil\u202c שלום\tcell\x1b[31m 東京 🙂"


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def place(workplace):
    write_talk(workplace)
    return workplace


def inspect(*overrides: str) -> dict:
    return chattrain.run([*SETTINGS, *overrides])


def write_odd(folder: Path, count: int = 40) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"{i} {ODD}"}, {"role": "assistant", "content": f"{i}\n<|assistant_end|> ok"}]}
        for i in range(count)
    ]
    (folder / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("collator", ["masked", "best_fit", "packed"])
@pytest.mark.parametrize("loss", [[], ["loss.supervise=assistant", "loss.prompt_weight=0.25"]])
def test_each_row_of_a_step_is_what_the_loop_trains_on(place, monkeypatch, collator, loss):
    trained: list = []

    def fit(trainer, state, cadence):
        trained.extend(trainer.loader.step(3))
        return state

    typed = [f"collator={collator}", *loss]
    with monkeypatch.context() as patch:
        patch.setattr("chattrain.loop.fit", fit)
        chattrain.run(["stage=sft", *TINY, "init.from=scratch", "train.max_steps=9", "run.name=spied", *typed])
    shown = inspect(*typed, "inspect.step=4", "inspect.rows=4")["rows"]
    rows = []
    for batch in trained:
        weights = (batch.targets >= 0).float() if batch.weights is None else batch.weights
        for inputs, carried in zip(batch.inputs, weights, strict=True):
            rows.append((inputs.tolist(), float(carried.sum())))
    assert len(shown) == 4
    for row in shown:
        inputs = [i for i, is_input in zip(row["id"], row["is_input"], strict=True) if is_input]
        padded, weight = next((held, weight) for held, weight in rows if held[: len(inputs)] == inputs)
        assert len(padded) == len(inputs) + row["padding"] and sum(row["weight"]) == pytest.approx(weight)


def test_a_row_can_be_read_back_as_its_document(place):
    (row,) = inspect("inspect.row=2", "inspect.rows=1")["rows"]
    line = int(row["documents"][0].removeprefix("talk.jsonl line "))
    messages = json.loads((place / "talk.jsonl").read_text().splitlines()[line - 1])["messages"]
    page = Page(Path(inspect("inspect.row=2", "inspect.html=row.html")["html"]).read_text())
    assert f"<|user_start|>{messages[0]['content']}<|user_end|><|assistant_start|>{messages[1]['content']}" in page.text
    assert row["position"] == list(range(len(row["id"]))) and set(row["document"]) == {0}


def test_ids_positions_and_documents_are_shown_on_demand(place, capsys):
    shown = inspect("inspect.ids=true", "inspect.rows=1", "collator=best_fit")
    (row,) = shown["rows"]
    lines = re.findall(r"^ *(\d+)(\+?) +(\d+) +(\d+) +(\d+) +(\S+)  ", capsys.readouterr().out, re.MULTILINE)
    assert [int(line[4]) for line in lines] == row["id"] and [int(line[2]) for line in lines] == row["document"]
    assert [int(line[3]) for line in lines] == row["position"] and [float(line[5]) for line in lines] == row["weight"]
    assert len(row["documents"]) >= 2 and "ids" in Page(Path(shown["html"]).read_text()).text


def test_the_page_tells_all_of_a_token_and_needs_no_network(place, capsys):
    shown = inspect("inspect.html=a/b/page.html", "inspect.rows=2")
    assert Path(shown["html"]).samefile("a/b/page.html") and shown["html"] in capsys.readouterr().out
    page = Page(Path("a/b/page.html").read_text())
    assert not [attributes for _, attributes in page.tags if {"src", "href"} & set(attributes)]
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe", "img")]
    tokens = [attributes for tag, attributes in page.tags if tag == "bdi"]
    assert len(tokens) == sum(len(row["id"]) for row in shown["rows"])
    ids, weights = ([value for row in shown["rows"] for value in row[name]] for name in ("id", "weight"))
    for attributes, token, weight in zip(tokens, ids, weights, strict=True):
        lines = attributes["title"].splitlines()
        assert lines[0].startswith(f"id {token}") and lines[-1] == f"weight {weight:g}" and "source talk.jsonl" in lines
        assert ("w1" in attributes.get("class", "").split()) == (weight == 1)


def test_the_page_goes_to_the_cache_by_default_and_a_folder_is_refused(place, cache):
    assert Path(inspect()["html"]).is_relative_to(cache)
    with pytest.raises(UserError, match=r"inspect.html=\. is a folder"):
        inspect("inspect.html=.")
    Path("file").write_text("")
    with pytest.raises(UserError, match=r"inspect\.html"):
        inspect("inspect.html=file/rows.html")


def test_text_of_strangers_is_shown_and_does_nothing(workplace, capsys):
    write_odd(workplace)
    shown = inspect("data.train_path=odd.jsonl", "inspect.html=odd.html", "train.seq_len=256", "loss=assistant")
    out, text = capsys.readouterr().out, Path("odd.html").read_text()
    page = Page(text)
    for written in (out, text, page.text):
        assert not {"\x1b", "\u202e", "\u202c", "\t"} & set(written)
    assert "<script" not in text.lower() and "<script>alert(1)</script>" in page.text
    for seen in (r"\u202e", "⇥", "␛", "⏎", "東京 🙂", "שלום"):
        assert seen in out and seen in page.text
    special = [attributes for tag, attributes in page.tags if tag == "bdi" and "sp" in attributes.get("class", "").split()]
    names = [i for row in shown["rows"] for i in row["id"]]
    assert 0 < len(special) < len(names) and out.count("\\<|user_end|>") == len(shown["rows"])


def test_a_character_of_several_tokens_is_shown_once_and_whole(workplace, capsys):
    rows = [{"messages": [{"role": "user", "content": "Say it"}, {"role": "assistant", "content": f"{i} ཀ་"}]} for i in range(40)]
    Path("odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_talk(workplace)
    inspect("data.train_path=[talk.jsonl,odd.jsonl]", "inspect.source=odd.jsonl", "inspect.rows=1", "tokenizer.vocab_size=266")
    out = capsys.readouterr().out
    assert "[ཀ]" in out and "[་]" in out and "\ufffd" not in out


def test_the_mixture_is_counted_by_source(workplace, capsys):
    write_talk(workplace)
    other = write_talk(workplace, "other.jsonl", count=40, factor=5)
    long = {"messages": [{"role": "user", "content": "word " * 100}, {"role": "assistant", "content": "Yes."}]}
    other.write_text(other.read_text() + json.dumps(long) + "\n{\nnull\n")
    typed = ["data.train_path=[talk.jsonl,other.jsonl]", "data.val_path=talk.jsonl", "data.on_malformed=skip"]
    shown = inspect(*typed)
    talk, counted = shown["sources"]["talk.jsonl"], shown["sources"]["other.jsonl"]
    assert (counted["records"], counted["documents"], counted["left_out"], counted["cut_before_reply"]) == (43, 40, 1, 1)
    assert sum(counted["skipped"].values()) == 2 and (talk["records"], talk["documents"]) == (60, 60)
    assert counted["longest"] > 64 >= talk["longest"] and 0 < talk["share"] < 1
    assert sum(shown["lengths"].values()) == 101
    out = capsys.readouterr().out
    assert re.search(r"^ +other\.jsonl +43 +2 \(.+\) +40 ", out, re.MULTILINE) and re.search(r"^ +all +103 ", out, re.MULTILINE)
    assert "60 of 60 validation documents" in out  # the audit


@pytest.mark.parametrize("collator, full", [("packed", True), ("masked", False)])
def test_packing_efficiency_is_the_share_of_real_tokens(place, monkeypatch, collator, full):
    seen: list = []
    collate = Loader._collate

    def spy(self, step):
        batches, event = collate(self, step)
        seen.append((step, batches))
        return batches, event

    with monkeypatch.context() as patch:
        patch.setattr(Loader, "_collate", spy)
        chattrain.run(["stage=sft", *TINY, "init.from=scratch", "train.max_steps=1", f"collator={collator}", "run.name=real"])
    batches = next(batches for step, batches in seen if step == 0)
    share = sum(batch.num_tokens for batch in batches) / sum(batch.inputs.numel() for batch in batches)
    shown = inspect(f"collator={collator}", "train.max_steps=1")
    assert shown["packing_efficiency"] == pytest.approx(share) and (share == 1) == full


def test_on_a_terminal_it_is_coloured_and_paged(place):
    """In a process of its own: pty.spawn selects, which takes no descriptor over 1,023, and a process of tests has many open."""
    spawn = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
    done = subprocess.run(
        [sys.executable, "-c", spawn, sys.executable, "-m", "chattrain", *SETTINGS, "inspect.rows=1"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env={**os.environ, "PAGER": "sed 's/^/page: /'", "TERM": "xterm", "OMP_NUM_THREADS": "1"},
    )
    said = done.stdout.decode().replace("\r\n", "\n")
    assert done.returncode == 0, said
    assert re.search(r"^page: row 0: talk.jsonl line \d+$", said, re.MULTILINE)
    assert re.search(r"\x1b\[[\d;]*32m[^\x1b]*= [^\x1b]*\d", said) and "[<|assistant_end|>]" not in said


def test_the_command_line_prints_plain_marks(place, capsys):
    done = command_line(capsys, *SETTINGS, "inspect.rows=1")
    assert done.status == 0 and "\x1b" not in done.out and "[<|assistant_end|>]" in done.out


def test_rows_of_other_ranks_are_shown_too(place, capsys):
    shown = inspect("distributed.nproc=2", "train.device_batch_size=2", "inspect.rows=4")
    assert len(shown["rows"]) == 4
    assert {"rank 0", "rank 1"} == set(re.findall(r"rank \d", capsys.readouterr().out))
