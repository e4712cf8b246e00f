"""What a run leaves in MLflow: who, what, from which data and checkpoint, and a model for each checkpoint that is kept."""

from __future__ import annotations

import getpass
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from chattrain.commands.execute import execute
from chattrain.config.compose import compose
from chattrain.setup.job import Job, SweepMember
from chattrain.storage import checkpoint
from chattrain.tracking.mlflow_parent import open_parent
from chattrain.tracking.mlflow_store import connect
from tests.helpers import TINY, standing_in, train, write_talk
from tests.tracking.stores import environment

SAVES = ["tracking=mlflow", "train.max_steps=6", "eval.every=2", "checkpoint.every=2", "checkpoint.keep=2"]
CHOICES = {"stage": "sft", "model": "tiny", "tracking": "mlflow", "experiment": "null", "hydra/launcher": "basic"}


def member(parent: str | None, lr_scale: str) -> Job:
    overrides = ["stage=sft", f"optimizer.lr_scale={lr_scale}", "train.max_steps=6", "chat.max_tokens=7", "run.seed=3"]
    values = {"optimizer.lr_scale": lr_scale, "run.seed": "3"}
    return Job(overrides, CHOICES, SweepMember("/runs/sweeps/try", 0, values, parent))


@pytest.fixture(scope="module")
def place(tmp_path_factory, cache):
    """base -> mid -> a sweep of two in sft, with the store that they left."""
    folder = tmp_path_factory.mktemp("chain")
    with standing_in(folder, cache), environment(MLFLOW_RUN_ID=""):
        write_talk(folder)
        uri = f"sqlite:///{folder / 'runs' / 'mlflow.db'}"
        base, mid = train("base", "chain", *SAVES, "init.from=scratch"), train("mid", "chain", *SAVES)
        command = ["-m", "stage=sft", "optimizer.lr_scale=1,3"]
        sweep = open_parent(folder / "runs" / "sweeps" / "try", uri, "chattrain", command, ["optimizer.lr_scale"])
        parent = sweep.run_id
        jobs = []
        for lr_scale in ("1", "3"):
            with environment(member(parent, lr_scale), MLFLOW_RUN_ID=parent or ""):
                typed = [*TINY, *SAVES, "stage=sft", f"run.name=try{lr_scale}", f"optimizer.lr_scale={lr_scale}", "run.seed=3"]
                jobs.append(execute(compose(typed)))  # chattrain.run would be a job of its own
        (folder / "runs" / "sweeps" / "try" / "table.md").write_text("the table")
        sweep.close(metrics={"val/bpb (best)": 1.25})
        yield SimpleNamespace(folder=folder, client=connect(uri), base=base, mid=mid, parent=parent, jobs=jobs)


def run_of(place, summary: dict):
    return place.client.get_run(summary["mlflow_run_id"])


def models_of(place, run_id: str) -> list:
    return [m for m in place.client.search_logged_models(["1"]) if m.source_run_id == run_id]


def test_only_what_was_chosen_and_what_follows_from_it_is_a_param(place):
    params = run_of(place, place.jobs[1]).data.params
    assert {name for name in params if not name.startswith("peak_lr/")} == {
        *("stage", "model", "optimizer.lr_scale", "run.seed", "train.max_steps"),
        *("num_steps", "rows_per_step", "tokens_per_step", "world_size", "num_parameters"),
    }
    assert (params["optimizer.lr_scale"], params["num_steps"], params["tokens_per_step"]) == ("3.0", "6", "256")
    assert float(params["peak_lr/matrix"]) == pytest.approx(dict(history(place, place.jobs[1], "lr/matrix"))[1])


def history(place, summary: dict, metric: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in place.client.get_metric_history(summary["mlflow_run_id"], metric)]


def test_tags_name_the_user_the_command_and_the_commit(place):
    tags = run_of(place, place.jobs[0]).data.tags
    assert tags["mlflow.user"] == getpass.getuser() and tags["mlflow.source.type"] == "LOCAL"
    assert tags["mlflow.source.name"].startswith("chattrain stage=sft optimizer.lr_scale=1 ")
    head = subprocess.run(["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode == 0:
        assert tags["mlflow.source.git.commit"] == head.stdout.strip()
        assert tags["mlflow.source.git.dirty"] in ("true", "false")
    note = tags["mlflow.note.content"]
    assert note.startswith("completed at step 6 of 6: ") and "val/bpb" in note and place.jobs[0]["run_dir"] in note


def test_jobs_of_a_sweep_are_nested_and_named_by_what_was_swept(place):
    found = place.client.search_runs(["1"], f"tags.`mlflow.parentRunId` = '{place.parent}'")
    assert {run.info.run_id for run in found} == {job["mlflow_run_id"] for job in place.jobs}
    assert {run.info.run_name for run in found} == {"1, 3 (lr_scale, seed) sft", "3, 3 (lr_scale, seed) sft"}
    assert run_of(place, place.base).info.run_name == "base chain"


def test_the_run_of_a_sweep_has_its_command_and_its_result(place):
    run = place.client.get_run(place.parent)
    assert (run.info.run_name, run.info.status) == ("sweep try", "FINISHED")
    assert run.data.params == {"swept": "optimizer.lr_scale"}
    assert "optimizer.lr_scale=1,3" in run.data.tags["mlflow.source.name"]
    assert [value for name, value in run.data.metrics.items() if name.startswith("val/bpb _best_")] == [1.25]
    assert [item.path for item in place.client.list_artifacts(place.parent)] == ["table.md"]


def test_data_sets_have_a_digest_counts_and_a_context(place):
    inputs = run_of(place, place.mid).inputs.dataset_inputs
    by_context = {i.tags[0].value: i.dataset for i in inputs}
    assert set(by_context) == {"training", "validation"}
    training = by_context["training"]
    assert (training.name, json.loads(training.source)) == ("talk.jsonl", {"uri": "talk.jsonl"})
    counts = json.loads(training.profile)
    assert counts["documents"] == 57 and 0 < counts["supervised_tokens"] < counts["tokens"]
    assert training.digest != by_context["validation"].digest
    same = run_of(place, place.jobs[0]).inputs.dataset_inputs
    assert training.digest in [i.dataset.digest for i in same]  # the same tokens in another stage


def test_what_is_measured_on_several_sources_names_them_all(place):
    write_talk(place.folder, "more.jsonl", factor=7)
    summary = train("mid", "two", *SAVES, "data.train_path=[talk.jsonl,more.jsonl]")
    inputs = [i.dataset for i in run_of(place, summary).inputs.dataset_inputs]
    assert sorted(d.name for d in inputs) == ["more.jsonl"] * 2 + ["talk.jsonl"] * 2 + ["talk.jsonl + more.jsonl"]
    (both,) = [d for d in inputs if "+" in d.name]
    assert json.loads(both.profile)["documents"] == 6
    metrics = [m for model in models_of(place, summary["mlflow_run_id"]) for m in model.metrics]
    whole = {(m.dataset_name, m.dataset_digest) for m in metrics if m.key.count("/") == 1}
    assert whole == {(both.name, both.digest)}
    by_source = {m.key.rpartition("/")[2]: m.dataset_name for m in metrics if m.key.count("/") > 1}
    assert by_source == {"talk.jsonl": "talk.jsonl", "more.jsonl": "more.jsonl"}


def test_kept_checkpoints_are_models_which_a_metric_ranks_across_runs(place):
    order = [{"field_name": "metrics.val/bpb", "ascending": True}]
    ranked = place.client.search_logged_models(["1"], "tags.sweep = 'try'", order_by=order)
    values = [next(m.value for m in model.metrics if m.key == "val/bpb") for model in ranked]
    assert len(ranked) == 4 and values == sorted(values) and len(set(values)) == 4
    kept = {str(folder) for job in place.jobs for folder in checkpoint.all_checkpoints(Path(job["run_dir"]))}
    assert {model.tags["chattrain.folder"] for model in ranked} == kept  # that of step 2 went with its checkpoint
    digest = next(i.dataset.digest for i in run_of(place, place.jobs[0]).inputs.dataset_inputs if i.tags[0].value == "validation")
    assert {(m.dataset_name, m.dataset_digest) for model in ranked for m in model.metrics} == {("talk.jsonl", digest)}
    for job in place.jobs:
        logged = {step: value for step, value in history(place, job, "val/bpb")}
        assert sorted(logged) == [0, 2, 4, 6]  # once each, although the models have them too
        for model in models_of(place, job["mlflow_run_id"]):
            assert {m.key: m.value for m in model.metrics}["val/bpb"] == logged[int(model.tags["step"])]


def test_stages_can_be_walked_back_from_a_run_to_the_model_that_it_started_from(place):
    stages, summary = [], place.jobs[1]
    run = run_of(place, summary)
    while run.inputs.model_inputs:
        model = place.client.get_logged_model(run.inputs.model_inputs[0].model_id)
        stages.append((model.tags["stage"], model.tags["step"]))
        run = place.client.get_run(model.source_run_id)
    assert stages == [("mid", "6"), ("base", "6")]


# --- where numbers go ------------------------------------------------------------------------------------------------


def test_the_environment_names_store_experiment_and_run_and_a_line_says_so(place, caplog):
    uri = f"sqlite:///{place.folder / 'other.db'}"
    with environment(MLFLOW_TRACKING_URI=uri, MLFLOW_EXPERIMENT_NAME="mine"), caplog.at_level("INFO", logger="chattrain"):
        first = train("mid", "env", "tracking=mlflow", "train.max_steps=1")
    client = connect(uri)
    experiment = client.get_experiment_by_name("mine")
    assert client.get_run(first["mlflow_run_id"]).info.experiment_id == experiment.experiment_id
    assert any(uri in line and "mine" in line and first["mlflow_run_id"] in line for line in caplog.messages)
    made = client.create_run(client.create_experiment("another"), run_name="made before").info.run_id
    with environment(MLFLOW_TRACKING_URI=uri, MLFLOW_EXPERIMENT_NAME="mine", MLFLOW_RUN_ID=made):
        assert train("mid", "env2", "tracking=mlflow", "train.max_steps=1")["mlflow_run_id"] == made
    assert client.get_run(made).info.status == "FINISHED" and "val/bpb" in client.get_run(made).data.metrics
    model = client.get_logged_model(client.get_run(made).outputs.model_outputs[0].model_id)
    assert model.experiment_id == client.get_run(made).info.experiment_id  # where the run is


def test_what_the_configuration_names_wins_over_the_environment(place):
    uri = f"sqlite:///{place.folder / 'given.db'}"
    with environment(MLFLOW_TRACKING_URI="http://127.0.0.1:9", MLFLOW_EXPERIMENT_NAME="mine"):
        given = [f"tracking.uri={uri}", "tracking.experiment=ours", "+tracking.tags.team=blue"]
        summary = train("mid", "given", "tracking=mlflow", "train.max_steps=1", *given)
    run = connect(uri).get_run(summary["mlflow_run_id"])
    assert connect(uri).get_experiment(run.info.experiment_id).name == "ours" and run.data.tags["team"] == "blue"


def test_a_resumed_run_keeps_its_own_run_and_its_models(place):
    first = train("mid", "resumed", *SAVES)
    with environment(MLFLOW_RUN_ID=place.base["mlflow_run_id"]):
        again = train("mid", "resumed", *SAVES, "train.max_steps=8")
    assert again["mlflow_run_id"] == first["mlflow_run_id"]
    kept = [str(folder) for folder in checkpoint.all_checkpoints(Path(again["run_dir"]))]
    assert sorted(m.tags["chattrain.folder"] for m in models_of(place, again["mlflow_run_id"])) == kept
    inputs = run_of(place, again).inputs
    assert [place.client.get_logged_model(i.model_id).tags["stage"] for i in inputs.model_inputs] == ["base"]
    assert sorted(i.tags[0].value for i in inputs.dataset_inputs) == ["training", "validation"]


def test_a_sweep_whose_store_does_not_answer_gets_one_warning_and_no_run(tmp_path, caplog):
    (tmp_path / "mlflow.db").mkdir()
    sweep = open_parent(tmp_path / "try", f"sqlite:///{tmp_path / 'mlflow.db'}", "chattrain", [], [])
    assert sweep.run_id is None
    sweep.close()
    assert len([r for r in caplog.records if r.levelname == "WARNING"]) == 1


def test_the_run_of_a_sweep_goes_on_under_the_id_that_it_had_or_is_given(place):
    uri = f"sqlite:///{place.folder / 'runs' / 'mlflow.db'}"
    for folder in ("try", "copied"):
        again = open_parent(place.folder / "runs" / "sweeps" / folder, uri, "chattrain", ["-m"], ["a"], run_id=place.parent)
        assert again.run_id == place.parent and place.client.get_run(again.run_id).info.status == "RUNNING"
        again.close("FAILED")
        assert place.client.get_run(again.run_id).info.status == "FAILED"
