"""eval.prompts are answered at every evaluation, and nothing else changes for it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

import chattrain
from chattrain.errors import UserError
from chattrain.evals.replies import Reply
from chattrain.parallel.ranks import Ranks
from chattrain.setup.samples import Samples
from chattrain.setup.suites import Prompts
from chattrain.tracking.run_folder import SAMPLES, read_samples
from tests.helpers import TINY, metrics, train
from tests.tiny_hf import write_model
from tests.tracking.stores import environment

PROMPTS = ["What is 3 + 9?", "Hello!"]
ASKED = ["eval.prompts=['What is 3 + 9?','Hello!']", "eval.max_reply_tokens=12", "eval.every=2", "init.from=scratch"]
TRAINED = [*ASKED, "train.max_steps=6", "checkpoint.every=2", "checkpoint.keep=9"]


def samples(summary: dict) -> list[dict]:
    return [json.loads(line) for line in (Path(summary["run_dir"]) / "samples.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def asked(place) -> dict:
    return train("sft", "asked", *TRAINED)


def test_each_prompt_is_answered_at_every_evaluation(asked):
    rows = samples(asked)
    assert [(row["step"], row["prompt"]) for row in rows] == [(step, prompt) for step in (0, 2, 4, 6) for prompt in PROMPTS]
    assert all(isinstance(row["reply"], str) and isinstance(row["ended"], bool) for row in rows)


def test_the_last_reply_is_that_of_a_chat_with_the_checkpoint(asked):
    typed = [f"init.from={asked['checkpoint']}", "chat.prompt=['What is 3 + 9?','Hello!']", "chat.max_tokens=12"]
    said = chattrain.run(["command=chat", "stage=sft", "train.device=cpu", "train.dtype=fp32", *typed])
    assert said["replies"] == [row["reply"] for row in samples(asked) if row["step"] == 6]


def test_fractions_of_the_replies_are_metrics(asked):
    for row in metrics(asked["run_dir"]):
        if "samples/ended" in row:
            now = [sample for sample in samples(asked) if sample["step"] == row["step"]]
            assert row["samples/ended"] == sum(sample["ended"] for sample in now) / 2
            assert row["samples/repeating"] == sum(sample["repeating"] for sample in now) / 2
            assert row["samples/empty"] == sum(not sample["reply"].strip() for sample in now) / 2
    assert [row["step"] for row in metrics(asked["run_dir"]) if "samples/ended" in row] == [0, 2, 4, 6]


def numbers(summary: dict) -> list[dict]:
    keep = ("train/loss", "train/grad_norm", "val/", "step")
    return [{k: v for k, v in row.items() if k.startswith(keep)} for row in metrics(summary["run_dir"])]


def test_a_training_that_is_asked_is_the_same_training_to_the_bit(asked):
    unasked = train("sft", "unasked", *TRAINED, "eval.prompts=[]")
    assert numbers(unasked) == numbers(asked)
    assert not (Path(unasked["run_dir"]) / "samples.jsonl").exists()
    weights = [load_file(Path(summary["checkpoint"]) / "model.safetensors") for summary in (asked, unasked)]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("lost", [0, 1, 2, 3])
def test_a_resumed_run_has_each_reply_once(asked, lost):
    """`lost` checkpoints are gone, so as many evaluations are made again; a line was cut off."""
    folder = Path(asked["run_dir"]).with_name(f"resumed{lost}")
    shutil.copytree(asked["run_dir"], folder)
    (folder / "summary.json").unlink()
    for step in [6, 4, 2][:lost]:
        shutil.rmtree(folder / f"checkpoints/step_{step:06d}")
    with (folder / "samples.jsonl").open("a") as file:
        file.write('{"step": 6, "prompt": "Hel')
    resumed = train("sft", folder.name, *TRAINED)
    assert samples(resumed) == samples(asked)


def test_the_report_shows_how_the_replies_change(asked):
    html = (Path(asked["run_dir"]) / "report.html").read_text()
    table = html[html.index("Replies to eval.prompts") :]
    for words in (*PROMPTS, "step 0", "step 6"):
        assert words in table


def test_what_a_model_says_is_escaped_in_the_report(asked):
    from chattrain.tracking.report import write_report

    folder = Path(asked["run_dir"]).with_name("hostile")
    shutil.copytree(asked["run_dir"], folder)
    row = {"step": 0, "prompt": "<script>alert(1)</script>", "reply": "<img src=x>", "ended": True, "repeating": False}
    (folder / "samples.jsonl").write_text(json.dumps(row) + "\n")
    html = write_report(folder).read_text()
    assert "<script>alert" not in html and "<img src=x>" not in html and "&lt;img src=x&gt;" in html


def test_what_a_model_says_moves_no_cursor(tokenizer, tmp_path, caplog):
    ids = tokenizer.encode("a\x1b[2Jb\r")
    caplog.set_level("INFO", "chattrain")
    asked = Prompts(["Hi"], [[1]], set())
    Samples(asked, lambda _: [Reply(ids, True)], tokenizer, Ranks(), tmp_path, 0)(0)  # type: ignore
    assert "[2Jb" in caplog.text and "\x1b" not in caplog.text
    assert read_samples(tmp_path / SAMPLES)[0]["reply"] == "a\x1b[2Jb\r"


def test_prompts_of_a_file_are_its_lines(place):
    (place / "prompts.txt").write_text("What is 3 + 9?\n\nHello!\n")
    summary = train("mid", "lines", "eval.prompts=prompts.txt", *ASKED[1:], "train.max_steps=1")
    assert [row["prompt"] for row in samples(summary) if row["step"] == 0] == PROMPTS
    (place / "prompts.txt").unlink()  # an evaluation asks none, so it needs no file
    assert chattrain.run(["command=evaluate", f"init.from={summary['run_dir']}", "tracking=none"])["metrics"]


@pytest.mark.parametrize(
    "value, message",
    [
        ("nowhere.txt", r"eval\.prompts=nowhere\.txt cannot be read.*one prompt a line"),
        ("['Hi',' ']", r"holds an empty text"),
        ("7", r"eval\.prompts=7 must be a list of texts, or a file"),
    ],
)
def test_prompts_that_cannot_be_asked_are_refused_before_there_is_a_run(place, value, message):
    with pytest.raises(UserError, match=message):
        train("sft", "refused", f"eval.prompts={value}", *ASKED[1:], "train.max_steps=1")
    assert not (place / "runs/sft/refused").exists()


def test_a_base_model_goes_on_with_the_text(place):
    (place / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"Once upon a time there were {i}."}) + "\n" for i in range(60))
    )
    typed = ["data.train_path=text.jsonl", "data.schema=text", "eval.prompts=['Once upon a']", "optimizer.lr_scale=3"]
    summary = train("base", "goes_on", *ASKED[1:], *typed, "train.max_steps=60", "eval.every=60")
    first, last = (row["reply"] for row in samples(summary))
    assert last.startswith(" time") and not first.startswith(" time")


def test_the_demo_has_prompts_for_each_stage_and_eval_none_asks_nothing(place):
    tiny = [o for o in TINY if not o.startswith(("data", "eval"))]
    for stage, prompt in (("base", "The function returns"), ("mid", "Hello!")):
        typed = [f"stage={stage}", "data=demo", *tiny, "train.max_steps=1", "init.from=scratch", "eval.max_reply_tokens=4"]
        summary = chattrain.run([*typed, f"run.name=demo_{stage}", "eval=bpb", "eval.max_tokens=64"])
        assert samples(summary)[0]["prompt"] == prompt
    silent = chattrain.run([*typed, "run.name=silent", "eval=none"])
    assert not (Path(silent["run_dir"]) / "samples.jsonl").exists()


def test_a_hugging_face_model_is_asked_in_its_own_chat_template(place):
    pytest.importorskip("transformers")
    write_model(place / "llama")
    rest = [o for o in TINY if not o.startswith("model.")]
    typed = [*rest, "stage=sft", "model=hf", "init.from=llama", "run.name=llama", "train.max_steps=1", *ASKED[:2]]
    summary = chattrain.run([*typed, "optimizer=adamw"])
    replies = [row["reply"] for row in samples(summary) if row["step"] == 0]
    said = chattrain.run(
        [
            "command=chat",
            "model=hf",
            "init.from=llama",
            "train.device=cpu",
            "train.dtype=fp32",
            f"chat.prompt={PROMPTS}",
            "chat.max_tokens=12",
        ]
    )
    assert [re.sub(r"<\|\w+\|>", "", reply) for reply in said["replies"]] == replies  # without special tokens


def test_a_run_goes_on_with_other_prompts(asked):
    folder = Path(asked["run_dir"]).with_name("other_prompts")
    shutil.copytree(asked["run_dir"], folder)
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "checkpoints/step_000006")
    resumed = train("sft", folder.name, *TRAINED, "eval.prompts=[New]")
    assert [row["prompt"] for row in samples(resumed)] == [*PROMPTS * 3, "New"]


def test_replies_are_a_table_in_mlflow(place):
    import mlflow

    rest = [o for o in TINY if not o.startswith("tracking")]
    with environment(MLFLOW_RUN_ID="", MLFLOW_TRACKING_URI=f"sqlite:///{place}/store.db", MLFLOW_EXPERIMENT_NAME="chattrain"):
        typed = ["stage=sft", *rest, *ASKED, "train.max_steps=4", "run.name=tracked", "tracking=mlflow"]
        summary = chattrain.run(typed)
        table = mlflow.load_table("samples.json", run_ids=[summary["mlflow_run_id"]])
    assert list(table["step"]) == [0, 0, 2, 2, 4, 4] and list(table["prompt"]) == PROMPTS * 3
    assert list(table["reply"]) == [row["reply"] for row in samples(summary)]
