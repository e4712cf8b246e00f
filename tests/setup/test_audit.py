"""The audit of the data: each silent mistake is planted through what a user can write, and refused or warned of at the start."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import chattrain
from chattrain.chat import native
from chattrain.errors import RunFailed, UserError
from chattrain.tasks import generated
from tests.helpers import TINY, train, write_talk

CODE = """
import numpy as np
import torch
from chattrain.data.collators import BestFit, Collator, Packed, Padded

def anew(batch, targets, **changes):
    indices = torch.nonzero(targets.flatten() >= 0).flatten()
    weights = None if batch.weights is None else batch.weights.where(targets >= 0, 0)
    count = int((targets >= 0).sum()) if weights is None else int((weights == 1).sum())
    total = None if weights is None else float(weights.sum())
    return batch._replace(**{**dict(targets=targets, target_indices=indices, num_supervised=count, weights=weights,
                                    sum_of_weights=total), **changes})

def following(batch):
    return torch.cat([batch.inputs[:, 1:], batch.inputs[:, -1:]], dim=1)

class AllTargets(BestFit):
    def batch(self, rows):
        batch = super().batch(rows)
        return anew(batch, following(batch), weights=None, sum_of_weights=None, num_supervised=batch.targets.numel())

class NoEnds(Padded):
    def batch(self, rows):
        batch = super().batch(rows)
        return anew(batch, batch.targets.masked_fill(batch.targets == self.pad_id, -1))

class Nothing(Padded):
    def batch(self, rows):
        batch = super().batch(rows)
        return anew(batch, torch.full_like(batch.targets, -1))

class SilentlyNothing(Padded):
    def batch(self, rows):
        batch = super().batch(rows)
        return batch._replace(targets=torch.full_like(batch.targets, -1), target_indices=torch.empty(0, dtype=torch.int64))

class Shifted(Padded):
    def batch(self, rows):
        batch = super().batch(rows)
        return anew(batch, batch.inputs.where(batch.targets >= 0, -1))

class TrainedPadding(Padded):
    def batch(self, rows):
        batch = super().batch(rows)
        return anew(batch, batch.targets.where(batch.inputs != self.pad_id, self.pad_id))

class WrongDivisor(Padded):
    def batch(self, rows):
        batch = super().batch(rows)
        return batch._replace(num_supervised=batch.num_tokens)

class Halved(Padded):
    follows_loss_keys = False
    def batch(self, rows):
        batch = super().batch(rows)
        weights = (batch.targets >= 0) * 0.5
        return batch._replace(weights=weights, num_supervised=0, sum_of_weights=float(weights.sum()))

class Own(Collator):
    '''Says nothing of its documents, which it puts into rows as Padded does.'''
    trains_all = False

    def __init__(self, mixture, seq_len, pad_id, last_epoch=None):
        self.inner = Padded(mixture, seq_len, pad_id, last_epoch)
        self.mixture, self.seq_len, self.counts = self.inner.mixture, seq_len, self.inner.counts

    def rows_in(self, epochs):
        return self.inner.rows_in(epochs)

    def batch(self, rows):
        batch = self.inner.batch(rows)
        if not self.trains_all:
            return batch
        return anew(batch, following(batch).where(batch.inputs != self.inner.pad_id, -1))

    def describe(self, row):
        return "a row of its own kind"

    def split_micro_batches(self, rows, limits, world_size):
        return self.inner.split_micro_batches(rows, limits, world_size)

class Reversed(Own):
    def batch(self, rows):
        batch = self.inner.batch(rows)
        return batch._replace(inputs=batch.inputs.flip(1))

class OwnLost(Own):
    trains_all = True
"""
RUN = ["init.from=scratch", "train.max_steps=2"]


@pytest.fixture
def place(workplace, monkeypatch):
    """Conversations in talk.jsonl, and a collator for each class of CODE."""
    (workplace / "faulty.py").write_text(CODE)
    for line in CODE.splitlines():
        if line.startswith("class "):
            name = line.removeprefix("class ").partition("(")[0]
            (workplace / "my/collator").mkdir(parents=True, exist_ok=True)
            (workplace / f"my/collator/{name}.yaml").write_text(f"_target_: faulty.{name}\n")
    write_talk(workplace)
    monkeypatch.syspath_prepend(workplace)
    sys.modules.pop("faulty", None)
    return workplace


def start(place: Path, *overrides: str) -> dict:
    """The summary of a run of two steps with the user's own folder of choices."""
    return train("sft", "audited", f"hydra.searchpath=[file://{place}/my]", *RUN, *overrides)


def refused(place: Path, *overrides: str) -> str:
    """The message with which such a run is refused, before anything is written for it."""
    with pytest.raises(UserError) as error:
        start(place, *overrides)
    assert not Path("runs").exists()
    return str(error.value)


def findings(summary: dict) -> dict[str, dict]:
    return {finding["name"]: finding for finding in summary["data"]["audit"]["findings"]}


def lines(file: str, rows: list[dict]) -> None:
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))


def conversation(*texts: str) -> dict:
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]}


@pytest.mark.parametrize("collator", ["masked", "packed", "best_fit"])
@pytest.mark.parametrize("loss", [[], ["loss.supervise=last_assistant"], ["loss.supervise=assistant", "loss.prompt_weight=0.3"]])
def test_nothing_is_found_where_nothing_is_wrong(place, collator, loss, caplog):
    lines("two.jsonl", [conversation("Hello", f"Hi {i}", "And you?", f"Well, {i}") for i in range(60)])
    lines("held.jsonl", [conversation("Say a number", f"That is number {i * i}") for i in range(100, 120)])
    summary = start(place, f"collator={collator}", *loss, "data.train_path=[talk.jsonl,two.jsonl]", "data.val_path=held.jsonl")
    assert findings(summary) == {} and summary["data"]["audit"]["tokens_compared"] > 100
    assert not [r for r in caplog.records if r.levelname in ("WARNING", "ERROR") and "init.from" not in r.getMessage()]


@pytest.mark.parametrize(
    "collator, said",
    [
        ("AllTargets", ["context tokens carry loss", "loss.supervise=assistant", "talk.jsonl line"]),
        ("NoEnds", ["tokens that end a reply carry no loss", "talk.jsonl line"]),
        ("Nothing", ["reply tokens carry no loss", "step 1 has no token that carries loss"]),
        ("SilentlyNothing", ["reply tokens carry no loss", "its targets weigh 0", "step 1 has no token that carries loss"]),
        ("Shifted", ["targets are not the next token"]),
        ("TrainedPadding", ["targets are padding"]),
        ("WrongDivisor", ["the loss of a batch is divided by"]),
        ("OwnLost", ["context tokens carry loss", "a row of its own kind"]),
    ],
)
def test_a_collator_that_loses_the_mask_is_refused_with_what_is_wrong(place, collator, said):
    message = refused(place, f"collator={collator}")
    assert all(part in message for part in said), message


def test_a_collator_that_says_nothing_of_its_documents_is_compared_by_their_tokens(place):
    audit = start(place, "collator=Own")["data"]["audit"]
    assert audit["findings"] == [] and audit["tokens_compared"] > 100


def test_a_collator_whose_rows_are_of_no_document_is_warned_of(place):
    assert findings(start(place, "collator=Reversed"))["not_compared"]["level"] == "warning"


def test_a_collator_may_say_that_it_weighs_tokens_in_its_own_way(place):
    found = findings(start(place, "collator=Halved"))
    assert found["own_weights"]["level"] == "note" and len(found) == 1


def test_what_a_fault_is_in_is_shown_by_inspect_which_refuses_nothing(place, capsys):
    shown = chattrain.run(
        ["command=inspect", "stage=sft", *TINY, *RUN, f"hydra.searchpath=[file://{place}/my]", "collator=NoEnds"]
    )
    assert [finding["level"] for finding in shown["audit"]["findings"]] == ["fault"]
    out = capsys.readouterr().out
    assert "fault: the collator's batches" in out and "[<|assistant_end|>]" not in out and "<|assistant_end|>" in out


def test_a_source_without_a_token_to_train_is_refused_by_name(place):
    lines("asked.jsonl", [conversation(f"What is {i}?") for i in range(60)])
    message = refused(place, "data.train_path=[talk.jsonl,asked.jsonl]")
    assert "asked.jsonl" in message and "asked.jsonl line 1" in message and "data source talk.jsonl" not in message
    assert start(place, "data.train_path=[talk.jsonl,asked.jsonl]", "loss=all")["status"] == "completed"


def test_a_step_without_a_token_to_train_is_refused_before_the_first(place):
    lines("long.jsonl", [conversation("word " * 2000, "Yes.") for _ in range(40)])
    packed = ["data.train_path=long.jsonl", "collator=packed", "loss=assistant", "train.rows_per_step=1", "eval=none"]
    message = refused(place, *packed, "train.device_batch_size=1")
    assert "has no token that carries loss in its 1 rows" in message and "long.jsonl line" in message


def mark(kinds: dict[str, str], monkeypatch) -> None:
    """Break the chat format: the special tokens are marked as others are."""
    for name, like in kinds.items():
        monkeypatch.setitem(native.TARGET_TOKENS, name, native.CONTEXT_TOKENS[like])


def test_turns_whose_end_is_never_trained_are_refused_with_their_lines(place, monkeypatch):
    mark({"<|assistant_end|>": "<|assistant_end|>"}, monkeypatch)
    message = refused(place, f"data.cache_dir={place}/cache")
    assert "57 replies are trained without the token that ends them" in message and "line 1, line 2, line 3" in message
    assert start(place, f"data.cache_dir={place}/cache", "loss=all")["status"] == "completed"  # there, every token is trained


@pytest.mark.parametrize(
    "kind, said", [(1, "mark tokens of the prompt to be trained"), (0, "do not mark the last reply to be trained")]
)
def test_a_chat_format_that_loses_the_mask_is_refused(place, monkeypatch, kind, said):
    encode = native.NativeFormat.encode

    def without_mask(self, documents):
        return [encoded._replace(kinds=[kind] * len(encoded.kinds)) for encoded in encode(self, documents)]

    monkeypatch.setattr(native.NativeFormat, "encode", without_mask)
    message = refused(place, f"data.cache_dir={place}/cache", "eval=none", *(["loss=assistant", "collator=packed"]))
    assert said in message and "talk.jsonl" in message


def test_conversations_that_are_cut_are_warned_of_with_counts_and_lines(place, caplog):
    rows = [conversation(f"What is {i}?", f"It is {i}.") for i in range(60)]
    rows[3] = conversation("word " * 200, "Never seen.")
    rows[5] = conversation("What is 5?", "It is five. " * 60)
    rows[7] = conversation("No answer?")
    lines("cut.jsonl", rows)
    summary = start(place, "data.train_path=cut.jsonl", "data.val_path=talk.jsonl")
    found = findings(summary)
    assert {name: (f["level"], f["count"]) for name, f in found.items()} == {
        "truncated": ("warning", 1),
        "left_out": ("warning", 2),
    }
    assert "cut.jsonl line 6" in found["truncated"]["message"]
    assert "1 are cut before their first reply, 1 have none" in found["left_out"]["message"]
    warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert all(finding["message"] in warned for finding in found.values())
    report = Path(summary["run_dir"], "report.html").read_text()
    assert "cut.jsonl line 6" in report and "Audit of the data" in report
    weighed = ["data.train_path=cut.jsonl", "data.val_path=talk.jsonl", "loss.prompt_weight=0.1", "run.name=weighed"]
    prompts = findings(start(place, *weighed))
    assert prompts["cut_before_reply"]["count"] == 1 and "left_out" not in prompts


def test_a_source_whose_replies_are_all_beyond_the_row_is_warned_of_by_name(place):
    lines("long.jsonl", [conversation("word " * 200, "Yes.") for _ in range(40)])
    found = findings(start(place, "data.train_path=[talk.jsonl,long.jsonl]"))
    assert found["no_supervised_token"]["level"] == "warning" and "long.jsonl" in found["no_supervised_token"]["message"]


def test_data_audit_refuse_ends_a_training_for_a_warning_and_says_the_way_out(place):
    assert "data.audit=warn" in refused(place, "data.val_path=talk.jsonl", "data.audit=refuse")
    summary = start(place, "data.val_path=talk.jsonl")
    assert findings(summary)["validation_copies"]["count"] == 60 and summary["status"] == "completed"
    lines("held.jsonl", [conversation("Say a number", f"That is number {i * i}") for i in range(100, 120)])
    clean = ["data.val_path=held.jsonl", "data.audit=refuse", "run.name=clean"]
    assert start(place, *clean)["status"] == "completed"


def test_questions_that_are_trained_on_are_counted(place):
    demo = ["data=demo", "eval=full", "eval.max_problems=40", "train.seq_len=128", "eval.max_tokens=512"]
    shared = [o for o in TINY if not o.startswith(("data", "eval"))]
    for split, exact in (("train", 40), ("val", 0)):
        chosen = [f"data.multiple_choice.demo.split={split}"]
        summary = chattrain.run(["stage=sft", *shared, *RUN, *demo, *chosen, f"run.name={split}"])
        found = findings(summary).get("questions/demo", {"count": 0, "level": "warning"})
        assert (found["count"], found["level"]) == (exact, "warning")


def test_problems_whose_answers_the_model_writes_are_looked_for_too(place):
    leaked = generated.records("arithmetic", "val", 100)
    leaked = [conversation(row["messages"][0]["content"].upper(), "I know that one.") for row in leaked]
    lines("leaked.jsonl", leaked)
    write_talk(place, "other.jsonl", factor=5)
    asked = [
        "data.val_path=other.jsonl",
        "eval=gsm8k",
        "eval.gsm8k_path=generate:arithmetic",
        "eval.max_problems=40",
        "eval.max_reply_tokens=4",
    ]
    for file, count in (("leaked.jsonl", 40), ("talk.jsonl", 0)):
        found = findings(start(place, *asked, f"data.train_path={file}", f"run.name={file[:4]}"))
        assert found.get("questions/arithmetic", {"count": 0})["count"] == count


def test_the_demo_is_warned_of_nothing(workplace, caplog):
    shared = [o for o in TINY if not o.startswith(("data", "eval", "train.seq_len"))]
    for stage in ("base", "mid", "sft"):
        rows = ["train.seq_len=256", "eval.max_problems=40", "eval.max_tokens=512"]
        summary = chattrain.run([f"stage={stage}", "experiment=quickstart", *shared, *RUN, *rows, "init.strict=false"])
        assert {finding["level"] for finding in summary["data"]["audit"]["findings"]} <= {"note"}
    said = [r.getMessage() for r in caplog.records if r.levelname in ("WARNING", "ERROR")]
    assert not [message for message in said if "documents" in message or "questions" in message]


def test_empty_replies_are_warned_of_with_their_lines(place, caplog):
    lines(
        "empty.jsonl",
        [conversation("Hello", "" if i == 6 else f"Hi {i}", "And you?", "" if i == 9 else "Well.") for i in range(30)],
    )
    found = start(place, "data.train_path=empty.jsonl", "data.val_path=talk.jsonl")["data"]["audit"]["findings"]
    (empty,) = [finding for finding in found if finding["name"] == "empty_replies"]
    assert (empty["level"], empty["count"]) == ("warning", 2) and "line 7, line 10" in empty["message"]


def test_a_second_start_counts_nothing_anew(place, monkeypatch):
    first = start(place)["data"]["audit"]

    def counted_again(*arguments):
        raise AssertionError("counted again")

    for name in ("chattrain.data.cache.render_all", "chattrain.setup.data.overlap", "chattrain.setup.data.question_overlap"):
        monkeypatch.setattr(name, counted_again)
    assert start(place, "run.name=again")["data"]["audit"] == first


def test_a_template_that_moves_the_end_of_a_turn_is_refused(place):
    pytest.importorskip("transformers")
    from tests import tiny_hf

    said = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    moved = {
        "before the next message": "{% for m in messages %}{{ '<|im_end|>\n' if not loop.first }}" + said + "{% endfor %}",
        "at the end alone": "{% for m in messages %}" + said + "{{ '<|im_end|>\n' if loop.last }}{% endfor %}",
    }
    lines("two.jsonl", [conversation("Hello", f"Hi {i}", "And you?", f"Well, {i}") for i in range(60)])
    for name, template in moved.items():
        folder = tiny_hf.write_model(place / name.replace(" ", "_"), template=template)
        typed = ["model=hf", f"init.from={folder}", "data.train_path=two.jsonl", "train.max_steps=2"]
        settings = [o for o in TINY if not o.startswith(("model.", "tokenizer.", "data.train_path"))]
        with pytest.raises(UserError, match=r"never stop|not learn to stop"):
            chattrain.run(["stage=sft", *settings, *typed])
    assert not Path("runs").exists()


def test_a_step_without_a_loss_never_reports_one(place, monkeypatch):
    """Past the audit too, the loop ends the run instead of logging a loss of 0."""
    monkeypatch.setattr("chattrain.setup.plan.refuse", lambda *arguments: None)
    with pytest.raises(RunFailed, match="no token that carries loss"):
        start(place, "collator=Nothing", "eval=none")
