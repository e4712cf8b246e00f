"""command=evaluate of suites whose answers the model writes: what is asked, kept, shown, compared and sent."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import chattrain
from chattrain.commands.evaluate import score_on_test
from chattrain.errors import UserError
from chattrain.tracking.mlflow_store import connect
from tests.conftest import SHARED_DATA
from tests.helpers import TINY, command_line, standing_in, train, write_talk
from tests.tracking.stores import environment

GSM8K = [{"question": f"What is {i} + {3 * i}?", "answer": f"<<{i}+{3 * i}={4 * i}>>\n#### {4 * i}"} for i in range(20)]
SHORT = "eval.max_reply_tokens=16"


@pytest.fixture(scope="module")
def place(tmp_path_factory, cache):
    """mid and sft runs on conversations, GSM8K in the hub's layout, and a run on the demo."""
    folder = tmp_path_factory.mktemp("written")
    with standing_in(folder, cache), environment(MLFLOW_RUN_ID=""):
        write_talk(folder)
        (folder / "gsm8k/main").mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(GSM8K), folder / "gsm8k/main/test-00000-of-00001.parquet")
        asked = ["eval.gsm8k_path=gsm8k", SHORT, "eval.max_generative=5", "eval.every=2"]
        train("mid", "farm", "train.max_steps=2", "init.from=scratch", *asked)
        train("sft", "farm", "train.max_steps=4", "init.from=mid/farm", "eval=[bpb,gsm8k]", "schedule.init_lr_frac=1", *asked)
        tiny = [o for o in TINY if not o.startswith(("data", "eval"))]
        demo = ["data=demo", "run.name=demo", "train.max_steps=1", "init.from=scratch", "eval=none"]
        chattrain.run(["stage=sft", *tiny, *demo])
        yield folder


def evaluate(*typed: str) -> dict:
    return chattrain.run(["command=evaluate", "tracking=none", *typed])


def answers(result: dict) -> list[dict]:
    return [json.loads(line) for line in (Path(result["folder"]) / "answers.jsonl").read_text().splitlines()]


def test_a_choice_measures_what_it_names_and_a_list_all_of_it(place):
    alone = evaluate("init.from=sft/farm", "eval=gsm8k", SHORT)["metrics"]
    assert set(alone) == {
        f"eval/gsm8k{name}" for name in ("_acc", "_stderr", "_n", "_flexible_acc", "_flexible_stderr", "_flexible_n", "_ended")
    }
    both = evaluate("init.from=sft/farm", "eval=[gsm8k,bpb]", SHORT)["metrics"]
    assert alone.items() <= both.items() and "val/bpb" in both
    own = evaluate("init.from=sft/farm")["metrics"]  # those of its training, and no more of them
    assert own["eval/gsm8k_n"] == 5 and "val/bpb" in own


def test_a_training_writes_after_its_last_step_or_when_it_is_asked_to(place):
    rows = [json.loads(line) for line in Path("runs/sft/farm/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "eval/gsm8k_acc" in row] == [4]
    often = train("sft", "often", "init.from=mid/farm", "eval=gsm8k", "eval.gsm8k_path=gsm8k", SHORT, "eval.max_problems=3",
                  "train.max_steps=4", "eval.every=1", "eval.generative_every=2")  # fmt: skip
    rows = [json.loads(line) for line in Path(f"{often['run_dir']}/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "eval/gsm8k_n" in row] == [0, 2, 4]
    with pytest.raises(UserError, match=r"eval\.generative_every=3 steps is not a multiple of eval\.every=2"):
        train("sft", "never", "eval=gsm8k", "eval.every=2", "eval.generative_every=3")


def test_a_limit_is_said(place, capsys):
    result = evaluate("init.from=sft/farm", "eval=gsm8k", SHORT, "eval.max_problems=7")
    assert (result["questions"]["gsm8k"]["asked"], result["questions"]["gsm8k"]["of"]) == (7, 20)
    assert "standard error, 7 of 20 questions" in capsys.readouterr().out
    assert "| 7 of 20 |" in (Path(result["folder"]) / "result.md").read_text()
    whole = evaluate("init.from=sft/farm", "eval=gsm8k", SHORT)
    assert whole["metrics"]["eval/gsm8k_n"] == 20  # the run's own limit goes with the choice of its own evaluation
    assert "20 questions" in capsys.readouterr().out


def test_each_question_is_kept_with_its_reply(place):
    result = evaluate("init.from=sft/farm", "eval=gsm8k", SHORT)
    kept = answers(result)
    assert [answer["question"] for answer in kept] == [row["question"] for row in GSM8K]
    assert [answer["expected"] for answer in kept] == [str(4 * i) for i in range(20)]
    flexible = [answer["flexible"] for answer in kept]
    assert result["metrics"]["eval/gsm8k_flexible_acc"] == sum(flexible) / 20
    p = sum(flexible) / 20
    assert result["metrics"]["eval/gsm8k_flexible_stderr"] == pytest.approx(math.sqrt(p * (1 - p) / 20))
    said = chattrain.run(
        [
            "command=chat",
            "init.from=sft/farm",
            "train.dtype=fp32",
            f"chat.prompt=['{GSM8K[3]['question']}']",
            "chat.max_tokens=16",
        ]
    )
    assert said["replies"] == [kept[3]["reply"]]


def test_a_result_is_json_markdown_and_a_table_of_answers(place):
    result = evaluate("init.from=sft/farm", "eval=[bpb,gsm8k]", SHORT)
    folder = Path(result["folder"])
    stored = json.loads((folder / "result.json").read_text())
    assert stored["metrics"] == result["metrics"] and stored["questions"] == result["questions"]
    page = (folder / "result.md").read_text()
    assert page.startswith("# sft/farm step_000004\n") and GSM8K[0]["question"] in page
    for name in ("val/bpb", "eval/gsm8k_acc", "eval/gsm8k_flexible_acc"):
        assert f"| {name} |" in page


def test_two_runs_are_compared_reply_by_reply(place, capsys):
    found = evaluate("runs=[mid/farm,sft/farm]", "eval=gsm8k", SHORT, "eval.gsm8k_path=gsm8k")
    pair = found["pairs"][0]["gsm8k_acc"]
    first, second = (result["metrics"]["eval/gsm8k_acc"] for result in found["runs"])
    assert (pair["first"], pair["second"]) == (first, second) and "McNemar" in pair["text"]
    with pytest.raises(UserError, match=r"same questions in gsm8k: 5 and 20, 5 of them in both"):
        from chattrain.evals.paired import compare_answers

        compare_answers(answers(evaluate("init.from=sft/farm")), answers(found["runs"][1]))


def test_the_demo_asks_sums_and_spelling_of_its_own(place):
    typed = ["init.from=sft/demo", SHORT, "eval.max_generative=6"]
    val = evaluate(*typed, "eval=[gsm8k,spelling]")
    assert {"eval/arithmetic_acc", "eval/spelling_acc"} <= set(val["metrics"]) and val["metrics"]["eval/spelling_n"] == 6
    assert "eval/gsm8k_acc" not in val["metrics"]  # sums are no GSM8K
    test = evaluate(*typed, "eval=[gsm8k,spelling]", "eval.on=test")
    assert test["metrics"]["test/arithmetic_n"] == 6
    assert not {a["key"] for a in answers(val)} & {a["key"] for a in answers(test)}
    full = evaluate(*typed, "eval=full", "eval.max_tokens=256", SHORT)["metrics"]
    assert {"val/bpb", "eval/demo_acc", "eval/arithmetic_acc", "eval/spelling_acc"} <= set(full)


def test_words_of_ones_own_are_spelled(place):
    (place / "words.txt").write_text("".join(f"{a}{b}ing\n" for a in "abcdefgh" for b in "ouiel"))
    result = evaluate("init.from=sft/demo", "eval=spelling", "eval.words_path=words.txt", "eval.max_problems=9", SHORT)
    assert all(answer["question"].split("ing")[0][-2:-1] in "abcdefgh" for answer in answers(result))
    assert len(answers(result)) == 9


def test_subjects_have_accuracies_of_their_own(place):
    result = evaluate("init.from=sft/demo", "eval=mmlu_arc", "eval.validation=false", "eval.max_problems=100")
    subjects = result["subjects"]["demo"]
    assert sum(of["n"] for of in subjects.values()) == 100 and "number" in subjects
    right = sum(of["n"] * of["acc"] for of in subjects.values())
    assert right / 100 == pytest.approx(result["metrics"]["eval/demo_acc"])
    assert "## demo by subject" in (Path(result["folder"]) / "result.md").read_text()


def test_without_its_data_a_suite_says_what_to_give(place, capsys):
    typed = ["command=evaluate", "tracking=none", "init.from=mid/farm", "eval=gsm8k"]
    done = command_line(capsys, *typed, "eval.gsm8k_path=null")
    assert done.status == 2 and "nothing to evaluate" in done.message and "eval.gsm8k_path" in done.message
    done = command_line(capsys, *typed, "eval.gsm8k_path=nowhere")
    assert done.status == 2 and "nowhere" in done.message


def test_humaneval_is_refused_in_one_message_where_it_cannot_be_run_safely(place, capsys, monkeypatch):
    problem = {"task_id": "0", "prompt": "def f():\n", "canonical_solution": "    pass\n", "test": "def check(f): f()"}
    (place / "humaneval").mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist([{**problem, "entry_point": "f"}]), place / "humaneval/test.parquet")
    monkeypatch.setenv("PATH", "/nowhere")
    typed = ["command=evaluate", "tracking=none", "init.from=mid/farm", "eval=humaneval", "eval.humaneval_path=humaneval"]
    done = command_line(capsys, *typed)
    assert done.status == 2 and "bubblewrap" in done.message and "eval.humaneval=false" in done.message


def test_prompts_are_for_trainings(place):
    with pytest.raises(UserError, match=r"eval\.prompts is answered while a training goes on.*chat\.prompt"):
        evaluate("init.from=sft/farm", "eval.prompts=[Hi]")


def test_the_winner_of_a_sweep_is_measured_on_the_suites_that_have_a_test_part(place):
    found = score_on_test(place / "runs/sft/farm")
    assert found is None  # neither this data nor GSM8K has one
    tiny = [o for o in TINY if not o.startswith(("data", "eval"))]
    demo = ["data=demo", "train.max_steps=1", "init.from=scratch", "eval=[gsm8k]", SHORT, "eval.max_problems=4"]
    summary = chattrain.run(["stage=sft", *tiny, *demo, "run.name=sums"])
    found = score_on_test(Path(summary["run_dir"]))
    assert found is not None and found["metrics"]["test/arithmetic_n"] == 4


def test_a_measurement_is_a_run_in_mlflow_nested_in_that_of_the_training(place):
    with environment(MLFLOW_RUN_ID=""):
        rest = [o for o in TINY if not o.startswith("tracking")]
        typed = ["stage=sft", *rest, "run.name=tracked", "train.max_steps=2", "init.from=scratch", "eval.gsm8k_path=gsm8k"]
        trained = chattrain.run([*typed, "tracking.system_metrics=false"])
        result = chattrain.run(["command=evaluate", "init.from=sft/tracked", "eval=gsm8k", SHORT])
        client = connect(f"sqlite:///{place}/runs/mlflow.db")
        (run,) = [r for r in client.search_runs(["1"]) if r.info.run_name == "evaluate sft/tracked step_000002"]
    assert run.data.tags["mlflow.parentRunId"] == trained["mlflow_run_id"] and run.info.status == "FINISHED"
    assert run.data.metrics == {name: pytest.approx(value) for name, value in result["metrics"].items()}
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"result.md", "result.json", "answers.jsonl"}
    (point,) = client.get_metric_history(run.info.run_id, "eval/gsm8k_acc")
    assert point.step == 2


def test_many_ranks_measure_what_one_does(place, capsys):
    typed = ["command=evaluate", "tracking=none", "init.from=sft/farm", "eval=gsm8k", SHORT, "eval.reply_batch_size=3"]
    alone = evaluate(*typed[2:])
    done = command_line(capsys, *typed, "distributed.nproc=2")
    assert done.status == 0, done.err
    both = json.loads(done.out.splitlines()[-1])
    assert both["metrics"] == alone["metrics"]
    assert answers(both) == answers(alone)


@pytest.mark.skipif(not (SHARED_DATA / "gsm8k").is_dir(), reason="shared/data/gsm8k is not here")
def test_real_problems_are_asked_as_they_stand_in_the_hubs_files(place):
    typed = ["eval=gsm8k", f"eval.gsm8k_path={SHARED_DATA}/gsm8k", "eval.max_problems=5", SHORT]
    whole = pq.read_metadata(SHARED_DATA / "gsm8k/main/test.parquet").num_rows
    result = evaluate("init.from=sft/farm", *typed)
    assert result["metrics"]["eval/gsm8k_n"] == 5 and result["questions"]["gsm8k"]["of"] == whole
    assert all(answer["expected"].lstrip("-").replace(".", "").isdigit() for answer in answers(result))
