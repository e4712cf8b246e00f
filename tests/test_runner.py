"""What a run leaves behind, chains and sweeps, and the commands that work on a finished run."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
import yaml

import chattrain
from chattrain.errors import UserError
from tests.helpers import TINY, command_line, contents, metrics, process, standing_in, train, write_talk

SUMMARY_KEYS = {
    "status",
    "stage",
    "steps",
    "tokens_seen",
    "supervised_tokens",
    "tokens_per_second",
    "metrics",
    "checkpoint",
    "init",
    "mlflow_run_id",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, cache):
    folder = tmp_path_factory.mktemp("place")
    with standing_in(folder, cache):
        write_talk(folder)
        yield folder


@pytest.fixture(scope="module")
def base(place) -> dict:
    """The summary of a finished base run of 4 steps, evaluated before the first, after the second and the last."""
    return train("base", "first", "train.max_steps=4", "eval.every=2", "checkpoint.every=1", "checkpoint.keep=2")


def tiny(command: str, *overrides: str) -> dict:
    return chattrain.run([f"command={command}", *TINY, *overrides])


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs Linux's list of open files")
@pytest.mark.parametrize("collator", ["packed", "masked", "best_fit"])
def test_a_run_closes_what_it_has_read_without_waiting_for_the_garbage_collector(workplace, monkeypatch, collator):
    """A sweep trains many jobs in one process, and a process may have few files open: 256 on a Mac."""
    write_talk(workplace)
    cache = workplace / "cache"
    monkeypatch.setenv("CHATTRAIN_CACHE", str(cache))
    train("sft", collator, "init.from=scratch", f"collator={collator}", "train.max_steps=2")
    assert not open_files(cache) and any(cache.rglob("tokens.npy"))


def open_files(folder: Path) -> list[str]:
    """The files of a folder that this process holds open."""
    links = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
    return [file for file in links if file.startswith(str(folder.resolve()))]


# --- the run folder --------------------------------------------------------------------------------------------------


def test_a_run_leaves_all_that_the_design_names(base, place):
    run_dir = place / "runs/base/first"
    assert Path(base["run_dir"]) == run_dir
    left = {file.name for file in run_dir.iterdir()}
    named = {"config.yaml", "metrics.jsonl", "summary.json", "train.log", "report.html", "checkpoints"}
    assert left == named | {"overrides.yaml", "identity.json", "provenance.json"}  # the command; what decides numbers; versions
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["train"]["max_steps"] == 4
    assert "completed at step 4 of 4" in (run_dir / "train.log").read_text()
    assert "<html" in (run_dir / "report.html").read_text()


def test_run_returns_what_summary_json_holds(base):
    assert json.loads((Path(base["run_dir"]) / "summary.json").read_text()) == base
    assert base.keys() >= SUMMARY_KEYS and "error" not in base


def test_the_summary_says_what_was_done(base):
    assert (base["status"], base["stage"], base["steps"], base["init"]) == ("completed", "base", 4, "random weights")
    assert base["tokens_seen"] == base["supervised_tokens"] == 4 * 4 * 64  # packed: every token is a target
    assert base["tokens_per_second"] > 0
    assert Path(base["checkpoint"]).name == "step_000004" and Path(base["checkpoint"]).is_dir()
    assert base["mlflow_run_id"] is None


def test_metrics_hold_the_evaluation_before_the_first_step_and_after_the_last(base):
    rows = metrics(base["run_dir"])
    assert [row["step"] for row in rows if "val/bpb" in row] == [0, 2, 4]
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4]
    last = {name: value for row in rows for name, value in row.items() if name not in ("step", "time")}
    assert base["metrics"] == last
    assert {"train/loss", "val/bpb", "val/loss", "lr/matrix", "lr/embed", "lr/lm_head"} <= last.keys()
    assert last["val/loss"] < rows[0]["val/loss"]
    assert all(0 <= row["train/data_wait"] < 1 for row in rows if "train/loss" in row)


def test_questions_are_asked_at_some_of_the_evaluations_and_at_the_last(place):
    asked = [
        "eval.multiple_choice=true",
        "data=demo",
        "eval.max_tokens=64",
        "eval.max_problems=4",
        "eval.every=2",
        "eval.multiple_choice_every=4",
        "train.max_steps=7",
    ]
    settings = [o for o in TINY if not o.startswith("data")]
    summary = chattrain.run(["stage=sft", *settings, "init.from=scratch", "run.name=rarely", *asked])
    lines = metrics(summary["run_dir"])
    assert [line["step"] for line in lines if "val/loss" in line] == [0, 2, 4, 6, 7]
    assert [line["step"] for line in lines if "eval/demo_acc" in line] == [0, 4, 7]


def test_only_the_newest_checkpoints_are_kept(base):
    kept = sorted(folder.name for folder in (Path(base["run_dir"]) / "checkpoints").iterdir())
    assert kept == ["step_000003", "step_000004"]


def test_runs_without_a_name_begun_in_the_same_second_get_a_folder_each(place, monkeypatch):
    monkeypatch.setattr("chattrain.setup.names.time.strftime", lambda *arguments: "20300101-000000")
    one, two = (chattrain.run(["stage=mid", *TINY, "train.max_steps=1", "init.from=scratch"]) for _ in range(2))
    assert one["run_dir"] != two["run_dir"] and Path(one["run_dir"]).parent == place / "runs/mid"
    assert all((Path(run["run_dir"]) / "summary.json").is_file() for run in (one, two))


# --- what a run starts from ------------------------------------------------------------------------------------------


def test_auto_takes_the_newest_finished_run_of_the_stage_before(base, place, caplog):
    newer = train("base", "newer", "train.max_steps=1")
    assert train("mid", "from_newest", "train.max_steps=1")["init"].endswith("runs/base/newer/checkpoints/step_000001")
    assert Path(newer["checkpoint"]).is_dir()
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


def test_a_named_run_and_a_named_checkpoint_are_started_from(base, place):
    for source in ("runs/base/first", "runs/base/first/checkpoints/step_000004"):
        summary = train("mid", f"named{len(source)}", "train.max_steps=1", f"init.from={source}")
        assert summary["init"].endswith("runs/base/first/checkpoints/step_000004")
        first_loss = metrics(summary["run_dir"])[0]["val/loss"]
        assert first_loss == pytest.approx(base["metrics"]["val/loss"], rel=1e-6)


@pytest.mark.parametrize("stage, before", [("mid", "base"), ("sft", "mid")])
def test_a_fallback_to_random_weights_is_warned_of_loudly(place, caplog, stage, before):
    summary = train(stage, "alone", "train.max_steps=1", f"run.root=before_{stage}")
    (warning,) = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert "STARTING FROM RANDOM WEIGHTS" in warning and f"no finished {before} run" in warning
    assert "init.strict=true" in warning
    assert "random weights" in summary["init"]
    assert "STARTING FROM RANDOM WEIGHTS" in (Path(summary["run_dir"]) / "train.log").read_text()


def test_a_fallback_to_the_base_model_is_warned_of_loudly(place, caplog):
    train("base", "only", "train.max_steps=1", "run.root=no_mid")
    summary = train("sft", "skipped", "train.max_steps=1", "run.root=no_mid")
    (warning,) = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert "STARTING FROM THE BASE RUN" in warning and "mid" in warning
    assert "no_mid/base/only" in summary["init"]


def test_scratch_is_no_fallback_and_not_warned_of(place, caplog):
    assert "random weights" in train("mid", "scratch", "train.max_steps=1", "init.from=scratch")["init"]
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


# --- chains and sweeps -----------------------------------------------------------------------------------------------

DEMO = [o for o in TINY if not o.startswith(("data", "eval", "train.rows"))] + [
    "train.max_steps=3",
    "train.total_batch_size=256",
    "eval.max_tokens=512",
    "eval.max_problems=8",
    "data.stages.base.train.prose.limit=100",
    *(f"data.stages.mid.train.{source}.limit=50" for source in ("choice", "spelling", "counting", "arithmetic", "small_talk")),
]


def test_a_chain_trains_each_stage_from_the_one_before_and_ends_with_a_table(workplace):
    done = process("-m", "stage=base,mid,sft", "experiment=quickstart", *DEMO)
    assert done.status == 0, done.err
    runs = {stage: list((workplace / "runs" / stage).iterdir()) for stage in ("base", "mid", "sft")}
    assert {len(found) for found in runs.values()} == {1}
    assert len({found[0].name for found in runs.values()}) == 1  # one name for the launch, not each stage's clock
    summaries = {stage: json.loads((found[0] / "summary.json").read_text()) for stage, found in runs.items()}
    assert [s["status"] for s in summaries.values()] == ["completed"] * 3
    assert summaries["base"]["init"] == "random weights"
    for stage, before in (("mid", "base"), ("sft", "mid")):
        assert Path(summaries[stage]["init"]).samefile(summaries[before]["checkpoint"])
    assert "eval/demo_acc" in summaries["sft"]["metrics"]
    table = [line.split()[0] for line in done.out.splitlines() if line.strip()]
    assert [word for word in table if word in runs] == ["base", "mid", "sft"]
    assert all(str(found[0] / "report.html") in done.out for found in runs.values())


def test_stages_swept_with_something_else_start_from_the_run_of_their_own_value(workplace, capsys):
    write_talk(workplace)
    done = command_line(capsys, "-m", "stage=base,mid", "optimizer.lr_scale=1,0.5", *TINY, "train.max_steps=1", "run.name=x")
    assert done.status == 0
    for value in ("1", "0.5"):
        summary = json.loads((workplace / f"runs/mid/x-lr_scale_{value}/summary.json").read_text())
        assert f"runs/base/x-lr_scale_{value}/" in summary["init"]


def test_a_chain_stops_where_a_stage_has_nothing_to_start_from(workplace, capsys):
    write_talk(workplace)
    broken = command_line(capsys, "-m", "stage=mid,sft", *TINY, "train.max_steps=1", "init.strict=true")
    assert broken.status == 2 and "no finished base run" in broken.message
    assert not list(workplace.rglob("summary.json"))


def test_a_chain_stops_where_a_run_goes_wrong(base, place, capsys):
    broken = command_line(
        capsys,
        "-m",
        "stage=mid,sft",
        *TINY,
        "train.max_steps=4",
        "run.name=wrong",
        "init.from=runs/base/first",
        "optimizer.lr_scale=1e35",
    )
    assert broken.status == 1 and "non-finite" in broken.message
    assert json.loads((place / "runs/mid/wrong/summary.json").read_text())["status"] == "failed"
    assert not (place / "runs/sft/wrong").exists()
    rows = [line for line in broken.out.splitlines() if line.split() and line.split()[0] in ("mid", "sft")]
    assert "failed: step" in rows[0] and "skipped" in rows[1]  # the table has them, though nothing was completed
    assert "failed: step" in (place / "runs/sweeps/wrong/table.md").read_text()


def test_a_sweep_gives_each_run_a_name_of_its_own(base, place, capsys):
    done = command_line(
        capsys,
        "-m",
        "stage=sft",
        "optimizer.lr_scale=0.3,1",
        *TINY,
        "train.max_steps=1",
        "run.name=lr",
        "init.from=runs/base/first",
    )
    assert done.status == 0, done.err
    runs = sorted((place / "runs/sft").glob("lr*"))
    assert [run.name for run in runs] == ["lr-lr_scale_0.3", "lr-lr_scale_1"]
    scales = [yaml.safe_load((run / "config.yaml").read_text())["optimizer"]["lr_scale"] for run in runs]
    assert scales == [0.3, 1.0]
    assert "Best: optimizer.lr_scale=" in done.out and "run.name=lr-best" in done.out
    assert {file.name for file in (place / "runs/sweeps/lr").iterdir()} >= {"table.md", "answer.json", "report.html"}


def test_a_job_that_fails_does_not_stop_the_others_of_a_sweep_and_the_status_tells(base, place, capsys):
    done = command_line(
        capsys,
        "-m",
        "stage=mid",
        "optimizer.lr_scale=-1,1e35,1",
        *TINY,
        "train.max_steps=4",
        "run.name=some",
        "init.from=runs/base/first",
    )
    assert done.status == 2
    assert done.err.count("chattrain: ") == 2 and "Traceback" not in done.err
    runs = {run.name: json.loads((run / "summary.json").read_text())["status"] for run in (place / "runs/mid").glob("some*")}
    assert runs == {"some-lr_scale_1e+35": "failed", "some-lr_scale_1": "completed"}


# --- commands on a finished run --------------------------------------------------------------------------------------


def test_evaluate_measures_what_the_run_measured_last(base, place, capsys):
    found = tiny("evaluate", "stage=base", "init.from=runs/base/first")
    assert found["metrics"] == pytest.approx({name: base["metrics"][name] for name in ("val/loss", "val/loss_all", "val/bpb")})
    last_line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last_line["metrics"] == found["metrics"]


def test_chat_answers_each_prompt_on_stdout(base, place, capsys):
    said = tiny("chat", "stage=base", "init.from=runs/base/first", "chat.prompt=[Hello,Bye]", "chat.max_tokens=8")
    assert len(said["replies"]) == 2
    out = capsys.readouterr().out
    assert "> Hello\n" in out and "> Bye\n" in out and all(reply in out for reply in said["replies"])
    again = tiny("chat", "stage=base", "init.from=runs/base/first", "chat.prompt=Hello", "chat.max_tokens=8")
    assert again["replies"] == said["replies"][:1]  # greedy, and a conversation of its own


def test_chat_takes_a_number_for_a_text(base, place):
    assert len(tiny("chat", "stage=base", "chat.prompt=12", "chat.max_tokens=4")["replies"]) == 1


def test_chat_without_a_prompt_reads_turns_until_the_end_of_input(base, place, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("What is 1 + 3?\n\nAnd you?\n"))
    tiny("chat", "stage=base", "chat.max_tokens=4")
    assert capsys.readouterr().out.count("> ") >= 3


def test_inspect_shows_what_is_supervised_and_trains_nothing(base, place, capsys):
    before = contents(place / "runs")
    facts = tiny("inspect", "stage=sft", "inspect.rows=2", "train.max_steps=5")
    out = capsys.readouterr().out
    assert out.count("row ") >= 2 and "talk.jsonl line" in out
    assert facts["num_steps"] == 5 and 0 < facts["supervised_shown"] < facts["tokens_shown"]
    assert "[<|assistant_end|>]" in out and "[<|user_start|>]" not in out
    assert contents(place / "runs") == before


def test_inspect_shows_where_documents_of_a_row_begin(base, place, capsys):
    tiny("inspect", "stage=sft", "collator=best_fit", "inspect.rows=1", "train.max_steps=5")
    shown = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("<|bos|>"))
    assert shown.count("<|bos|>") == shown.count("<|user_start|>") >= 2 and "[<|bos|>]" not in shown


def test_report_writes_the_report_anew(base, place, capsys):
    report = place / "runs/base/first/report.html"
    report.unlink()
    assert Path(tiny("report", "stage=base", "run.name=first")["report"]).samefile(report)
    assert str(report) in capsys.readouterr().out and report.stat().st_size > 0


@pytest.mark.parametrize("command", ["evaluate", "chat", "report"])
@pytest.mark.parametrize(
    "asked, named", [(["run.root=none"], "no finished mid run"), (["run.root=none", "init.from=gone", "run.dir=gone"], "gone")]
)
def test_commands_refuse_where_there_is_no_run(place, command, asked, named):
    with pytest.raises(UserError, match=named):
        tiny(command, "stage=mid", "chat.prompt=Hello", *asked)
    assert not (place / "none").exists()


def test_inspect_is_refused_from_a_start_that_is_not_there(place):
    with pytest.raises(UserError, match="gone"):
        tiny("inspect", "stage=mid", "init.from=gone")
