"""command=evaluate measures with the checkpoint's own settings, says what it measured and how sure that is."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

import chattrain
from chattrain.commands.evaluate import score_on_test
from chattrain.errors import UserError
from tests.helpers import TINY, command_line, metrics, standing_in, train, write_talk

QUESTIONS = [{"question": f"Is it {i}?", "choices": ["yes", "no", "maybe"], "answer": i % 3} for i in range(40)]


@pytest.fixture(scope="module")
def place(tmp_path_factory, cache):
    """A mid and an sft run on the same conversations and questions; mid is measured on all tokens, sft on replies."""
    folder = tmp_path_factory.mktemp("place")
    with standing_in(folder, cache):
        write_talk(folder)
        write_talk(folder, "held.jsonl", 20, factor=5)
        (folder / "questions").mkdir()
        (folder / "questions/test.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
        asked = ["eval=mmlu_arc", "eval.mmlu_path=questions", "data.test_path=held.jsonl", "train.device_batch_size=1"]
        train("mid", "farm", "train.max_steps=4", "init.from=scratch", *asked)
        train("sft", "farm", "train.max_steps=3", "init.from=mid/farm", "schedule.init_lr_frac=1", *asked)
        yield folder


def summary(stage: str) -> dict:
    return json.loads(Path(f"runs/{stage}/farm/summary.json").read_text())


def evaluate(*typed: str) -> dict:
    return chattrain.run(["command=evaluate", "tracking=none", *typed])


@pytest.mark.parametrize("stage", ["mid", "sft"])
def test_a_checkpoint_is_measured_as_it_was_in_training_without_a_word_about_it(place, stage):
    found = evaluate(f"init.from={stage}/farm")
    assert found["metrics"] == pytest.approx({name: summary(stage)["metrics"][name] for name in found["metrics"]})
    assert {"val/loss", "eval/mmlu_acc"} <= set(found["metrics"])
    assert (found["stage"], found["part"]) == (stage, "val")


def test_what_a_loss_is_over_is_said(place, capsys):
    for stage in ("mid", "sft"):
        measured = summary(stage)["validation"]
        assert 0 < measured["tokens"] < measured["all_tokens"] and measured["targets"] == "assistant"
        evaluate(f"init.from={stage}/farm")
        out = capsys.readouterr().out
        assert "val/loss over replies" in out and f"{measured['tokens']} tokens of {measured['rows']} rows" in out
        assert f"{measured['all_tokens']} (val/loss_all, val/bpb)" in out


def test_the_same_weights_measured_as_another_stage_are_said_to_be(place, capsys):
    as_mid = evaluate("init.from=sft/farm", "stage=mid")
    own = summary("sft")["metrics"]["val/loss"]
    assert as_mid["metrics"]["val/loss"] != own  # a reply sees the conversations before it in its row
    assert as_mid["metrics"]["val/loss"] == pytest.approx(own, rel=0.05)
    assert "sft/farm step_000003 measured as stage=mid" in capsys.readouterr().out


def test_what_is_typed_wins_over_the_checkpoints_own(place):
    own = evaluate("init.from=sft/farm")
    held = evaluate("init.from=sft/farm", "data=local", "data.val_path=held.jsonl")
    assert held["validation"]["rows"] == 20 and own["validation"]["rows"] == 3
    assert "eval/mmlu_acc" in held["metrics"]
    assert set(evaluate("init.from=sft/farm", "eval=bpb")["metrics"]) == {"val/loss", "val/loss_all", "val/bpb"}
    assert evaluate("init.from=sft/farm", "eval.max_problems=7")["metrics"]["eval/mmlu_n"] == 7
    packed = evaluate("init.from=sft/farm", "collator=packed", "eval=bpb")
    assert packed["validation"]["rows"] != own["validation"]["rows"]
    cut = evaluate("init.from=sft/farm", "data=local", "data.val_path=held.jsonl", "train.seq_len=32", "eval=bpb")
    assert cut["validation"]["tokens"] <= held["validation"]["tokens"]


@pytest.fixture
def sums(place):
    """A run on data of another schema than the default."""
    for name, count in (("sums.jsonl", 60), ("held_sums.jsonl", 9)):
        lines = [json.dumps({"question": f"What is {i} + 1?", "answer": f"It is {i + 1}. #### {i + 1}"}) for i in range(count)]
        Path(name).write_text("\n".join(lines) + "\n")
    typed = ["data.train_path=sums.jsonl", "data.schema=gsm8k", "data.test_path=held_sums.jsonl"]
    train("sft", "sums", "train.max_steps=1", "init.from=scratch", *typed)
    yield "init.from=sft/sums"
    shutil.rmtree("runs/sft/sums")


def test_of_the_runs_data_only_what_is_typed_changes_where_no_data_is_chosen(sums, capsys):
    assert evaluate(sums, "data.val_path=held_sums.jsonl")["validation"]["rows"] == 9
    done = command_line(capsys, "command=evaluate", sums, "data.val_path=held_sums.jsonl")
    assert done.status == 0, done.err
    assert json.loads(done.out.splitlines()[-1])["validation"]["rows"] == 9
    assert evaluate(sums, "data.val_path=held_sums.jsonl", "eval.on=test")["part"] == "test"


def test_a_path_for_a_run_on_other_data_needs_the_choice_of_data(place, capsys):
    kept = [o for o in TINY if not o.startswith("data")]
    chattrain.run(["stage=mid", *kept, "data=demo", "run.name=demo", "train.max_steps=1", "init.from=scratch"])
    for typed in (["data.val_path=held.jsonl"], ["data.val_path=held.jsonl", "data.schema=messages"]):
        refused = command_line(capsys, "command=evaluate", "init.from=mid/demo", *typed)
        assert refused.status == 2 and "no key data.val_path" in refused.message and "data=local" in refused.message
    assert evaluate("init.from=mid/demo", "data=local", "data.val_path=held.jsonl")["validation"]["rows"] > 0
    shutil.rmtree("runs/mid/demo")


def test_a_choice_of_evaluation_of_ones_own_counts(place, capsys):
    Path("my/eval").mkdir(parents=True)
    Path("my/eval/mine.yaml").write_text("validation: false\nmultiple_choice: true\nmax_problems: 5\nmmlu_path: questions\n")
    done = command_line(capsys, "--config-dir", "my", "command=evaluate", "init.from=sft/farm", "eval=mine")
    assert done.status == 0, done.err
    found = json.loads(done.out.splitlines()[-1])["metrics"]
    assert found["eval/mmlu_n"] == 5 and "val/loss" not in found


def test_a_key_that_the_checkpoints_part_does_not_have_is_refused(place):
    with pytest.raises(UserError, match=r"no key collator\.isolate_documents.*leave it out"):
        evaluate("init.from=sft/farm", "collator.isolate_documents=true")


def test_questions_of_the_data_are_kept_where_only_the_choice_of_evaluation_is_typed(place):
    assert evaluate("init.from=sft/farm", "eval=full")["metrics"]["eval/mmlu_n"] == 40


# --- error bars and answers ------------------------------------------------------------------------------------------


def test_an_accuracy_comes_with_its_error_and_count_and_each_answer_is_kept(place, capsys):
    found = evaluate("init.from=sft/farm")
    accuracy, n = found["metrics"]["eval/mmlu_acc"], found["metrics"]["eval/mmlu_n"]
    assert n == 40
    assert found["metrics"]["eval/mmlu_stderr"] == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / n))
    out = capsys.readouterr().out
    assert f"{accuracy:.1%} +- {found['metrics']['eval/mmlu_stderr']:.1%}  standard error, 40 questions" in out
    answers = [json.loads(line) for line in (Path(found["folder"]) / "answers.jsonl").read_text().splitlines()]
    assert sum(a["choice"] == a["answer"] for a in answers) / n == accuracy
    assert [a["index"] for a in answers] == list(range(40)) and [a["answer"] for a in answers] == [i % 3 for i in range(40)]
    for a in answers:
        assert len(a["logprobs"]) == 3 and a["choice"] == max(range(3), key=lambda i: a["logprobs"][i])
        assert sum(map(math.exp, a["logprobs"])) < 1 + 1e-6
    bits = sum(-a["logprobs"][a["answer"]] for a in answers) / math.log(2)
    assert found["metrics"]["eval/mmlu_bpb"] == pytest.approx(bits / n)  # a letter is one byte
    assert (place / "runs/sft/farm/answers.jsonl").read_text() == (Path(found["folder"]) / "answers.jsonl").read_text()


def test_a_measurement_never_replaces_another(place):
    folders = [evaluate("init.from=sft/farm", "eval=bpb")["folder"] for _ in range(2)]
    assert len(set(folders)) == 2 and all((Path(folder) / "result.json").is_file() for folder in folders)


def test_the_log_of_a_run_shows_accuracies_without_their_details(place):
    log = Path("runs/sft/farm/train.log").read_text()
    assert "eval/mmlu_acc" in log and "eval/mmlu_stderr" not in log
    assert any("eval/mmlu_stderr" in row for row in metrics("runs/sft/farm"))
    assert "validation: 3 rows" in log


# --- several runs ----------------------------------------------------------------------------------------------------


def test_two_runs_are_compared_question_by_question(place, capsys):
    found = evaluate("runs=[mid/farm,sft/farm]", "stage=sft", "data=local", "data.val_path=talk.jsonl")
    assert [result["trained"] for result in found["runs"]] == ["mid", "sft"]
    first, second = (result["metrics"] for result in found["runs"])
    pair = found["pairs"][0]
    assert (pair["mmlu_acc"]["first"], pair["mmlu_acc"]["second"]) == (first["eval/mmlu_acc"], second["eval/mmlu_acc"])
    assert pair["val/loss"]["second"] == pytest.approx(second["val/loss"])
    assert pair["val/loss"]["significant"] == (abs(first["val/loss"] - second["val/loss"]) > 0.01)
    out = capsys.readouterr().out
    assert "(first) against sft/farm step_000003 (second)" in out and "McNemar" in out and "noise" in out


def test_a_run_does_not_differ_from_itself(place):
    pair = evaluate("runs=[sft/farm,sft/farm]", "train.device_batch_size=1")["pairs"][0]
    assert pair["mmlu_acc"]["significant"] is False and "p = 1" in pair["mmlu_acc"]["text"]


def test_runs_that_have_nothing_in_common_to_compare_are_said_to(place, capsys):
    evaluate("runs=[mid/farm,sft/farm]", "eval=bpb")
    out = capsys.readouterr().out
    against = out[out.index("(first) against") :].splitlines()
    assert "nothing could be compared" in against[1]


def test_runs_that_answered_different_questions_are_not_compared(place):
    shutil.copytree("runs/sft/farm", "runs/sft/fewer")
    file = place / "runs/sft/fewer/checkpoints/step_000003/config.yaml"
    damaged = file.read_text()
    try:
        settings = damaged.replace("max_problems: 1024", "max_problems: 12")
        assert settings != damaged
        file.write_text(settings)
        manifest = file.with_name("manifest.json")
        import hashlib

        sums = json.loads(manifest.read_text()) | {"config.yaml": hashlib.sha256(settings.encode()).hexdigest()}
        manifest.write_text(json.dumps(sums))
        with pytest.raises(UserError, match=r"same questions in mmlu: 40 and 12, 12 of them in both"):
            evaluate("runs=[sft/farm,sft/fewer]")
        advised = evaluate("runs=[sft/farm,sft/fewer]", "eval.max_problems=12")
        assert advised["pairs"][0]["mmlu_acc"]["first"] == advised["runs"][1]["metrics"]["eval/mmlu_acc"]
    finally:
        shutil.rmtree("runs/sft/fewer")


def test_runs_are_two_or_more_and_the_only_name(place):
    with pytest.raises(UserError, match="two runs or more"):
        evaluate("runs=[sft/farm]")
    with pytest.raises(UserError, match=r"takes the place of run\.name=farm"):
        evaluate("runs=[sft/farm,mid/farm]", "run.name=farm")


def test_a_sweep_of_evaluations_ends_in_a_table(place, capsys):
    done = command_line(capsys, "-m", "command=evaluate", "init.from=mid/farm,sft/farm", "tracking=none")
    assert done.status == 0, done.err
    table = done.out[done.out.rindex("checkpoint  ") :]
    for cell in ("mid/farm step_000004", "sft/farm step_000003", "tokens", "val/loss_all", "+-"):
        assert cell in table


# --- the test part ---------------------------------------------------------------------------------------------------


def test_the_test_part_is_measured_only_where_it_is_asked_for(place):
    found = evaluate("init.from=sft/farm", "eval=bpb", "eval.on=test")
    assert found["part"] == "test" and set(found["metrics"]) == {"test/loss", "test/loss_all", "test/bpb"}
    assert found["validation"]["rows"] == 20
    assert score_on_test(place / "runs/sft/farm")["metrics"] == pytest.approx(found["metrics"])


def test_a_training_never_looks_at_its_test_part(place):
    with pytest.raises(UserError, match=r"eval\.on=test is for command=evaluate"):
        train("sft", "cheat", "train.max_steps=1", "eval.on=test")


def test_data_without_a_test_part_says_how_to_give_one(place):
    with pytest.raises(UserError, match=r"no test part.*data\.test_path"):
        evaluate("init.from=sft/farm", "data=local", "data.val_path=held.jsonl", "eval.on=test", "eval=bpb")
    train("mid", "plain", *TINY, "train.max_steps=1", "init.from=scratch")
    assert score_on_test(place / "runs/mid/plain") is None
    shutil.rmtree("runs/mid/plain")


def test_from_another_folder_the_message_says_where_the_run_was_started(place, tmp_path, monkeypatch):
    run = Path("runs/sft/farm").resolve()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"talk\.jsonl.* looked up from {tmp_path}\. The run was started in {place.resolve()}"):
        evaluate(f"init.from={run}")
    typed = [f"data.train_path={place}/talk.jsonl", f"data.val_path={place}/held.jsonl", f"eval.mmlu_path={place}/questions"]
    assert evaluate(f"init.from={run}", "data=local", *typed)["metrics"]["eval/mmlu_acc"] > 0
