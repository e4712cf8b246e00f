"""Tracking cannot hurt: whatever a server does, the run goes on, its record is whole, and `command=sync` sends the rest."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

import chattrain
from chattrain.errors import RunFailed, UserError
from chattrain.storage import checkpoint
from chattrain.tracking.mlflow_store import connect, open_store
from tests.helpers import TINY, command_line, metrics, standing_in, train, write_talk
from tests.tracking.stores import everything_below, finish, history, make_empty_store, serving, tracked

TRACKED = ["tracking=mlflow", "tracking.system_metrics=false", "train.max_steps=6", "eval.every=2", "checkpoint.every=3"]


@pytest.fixture(scope="module")
def empty(tmp_path_factory) -> Path:
    return make_empty_store(tmp_path_factory.mktemp("empty"))


@pytest.fixture
def server(tmp_path, empty, cache):
    with standing_in(tmp_path, cache), serving(tmp_path, empty) as server:
        write_talk(tmp_path)
        yield server


def run(server, name: str, *overrides: str) -> dict:
    return train("mid", name, *TRACKED, f"tracking.uri={server.uri}", *overrides)


def sync(*overrides: str) -> dict:
    return chattrain.run(["command=sync", *overrides])


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING" and "MLflow" in record.getMessage()]


def assert_delivered(server, run_dir: str, status: str = "FINISHED", experiment: str = "chattrain") -> None:
    """The server has one run, with each number of metrics.jsonl once, one model a checkpoint, and how it ended."""
    [found] = server.runs(experiment)
    rows = metrics(run_dir)
    for name in {name for row in rows for name in row} - {"step", "time"}:
        recorded = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        assert history(server.client, found.info.run_id, name) == sorted(recorded), name
    assert found.info.status == status and found.data.params["stage"] == "mid"
    times = [row["time"] for row in rows]
    assert found.info.start_time <= times[0] * 1000 + 1 and found.info.end_time + 1 >= times[-1] * 1000
    models = [m for m in server.client.search_logged_models([found.info.experiment_id])]
    kept = [str(folder) for folder in checkpoint.all_checkpoints(Path(run_dir))]
    assert sorted(m.tags["chattrain.folder"] for m in models) == kept
    assert all("val/bpb" in {m.key for m in model.metrics} for model in models if model.tags["step"] == "6")
    assert len(server.client.get_run(found.info.run_id).outputs.model_outputs) == len(kept)
    summary = Path(run_dir) / "summary.json"
    if summary.exists():
        assert json.loads(summary.read_text())["mlflow_run_id"] == found.info.run_id
        stored = Path(found.info.artifact_uri.removeprefix("file://")) / "summary.json"
        assert json.loads(stored.read_text()) == json.loads(summary.read_text())


# --- a server that fails, and the run ----------------------------------------------------------------------------------


def test_a_server_that_refuses_costs_one_warning_and_sync_sends_the_run_once(server, caplog):
    server.stop()
    summary = run(server, "refused")
    assert summary["status"] == "completed" and summary["mlflow_run_id"] is None and len(warnings(caplog)) == 1
    assert [row["step"] for row in metrics(summary["run_dir"]) if "train/loss" in row] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(RunFailed, match="mid/refused"):
        sync()
    server.start()
    assert sync()["sent"] == [summary["run_dir"]]
    assert_delivered(server, summary["run_dir"])
    again = sync("run.name=refused")
    assert (again["sent"], again["complete"]) == ([], [summary["run_dir"]])
    assert_delivered(server, summary["run_dir"])


def test_a_server_that_hangs_costs_one_warning_and_sync_sends_the_run_once(server, caplog):
    server.fault = "hang"
    summary = run(server, "hangs")
    assert summary["status"] == "completed" and len(warnings(caplog)) == 1 and len(metrics(summary["run_dir"])) == 10
    server.fault = None
    sync("run.name=hangs")
    assert_delivered(server, summary["run_dir"])


@pytest.mark.parametrize("fault", ["500", "lost", "hang"])
def test_a_server_that_fails_in_the_middle_for_good_gets_the_rest_by_sync(server, caplog, fault):
    server.fault = lambda path: fault if len(server.requests) > 12 else None
    summary = run(server, "middle")
    assert summary["status"] == "completed" and len(warnings(caplog)) == 1
    server.fault = None
    sync("run.name=middle")
    assert_delivered(server, summary["run_dir"])


@pytest.mark.parametrize("fault", ["500", "lost"])
def test_a_server_that_fails_at_each_third_request_gets_everything_once(server, fault):
    server.fault = lambda path: fault if len(server.requests) % 3 == 0 else None
    summary = run(server, "shaky")
    server.fault = None
    sync("run.name=shaky")
    assert_delivered(server, summary["run_dir"])


@pytest.mark.parametrize("path", ["experiments/create", "runs/create", "runs/log-inputs", "logged-models", "runs/outputs"])
def test_what_was_done_and_not_confirmed_is_not_done_twice(server, path):
    server.fault = lambda asked: "lost" if asked == path and server.requests.count(path) == 1 else None
    summary = run(server, "lost")
    assert path in server.requests
    assert_delivered(server, summary["run_dir"])
    assert len(server.client.get_run(summary["mlflow_run_id"]).inputs.dataset_inputs) == 2


@pytest.mark.parametrize("path", ["runs/update", "artifacts", "logged-models"])
def test_a_server_that_fails_at_the_end_gets_the_end_by_sync(server, caplog, path):
    server.fault = lambda asked: "500" if asked.startswith(path) else None
    summary = run(server, "end")
    assert summary["status"] == "completed" and len(warnings(caplog)) == (path != "artifacts")
    server.fault = None
    sync("run.name=end")
    assert_delivered(server, summary["run_dir"])


def test_a_server_that_comes_back_while_the_run_goes_on_gets_everything_from_the_run(server, tmp_path):
    server.stop()
    tracker = tracked(tmp_path / "run", server.uri, "back")
    tracker.log(1, {"train/loss": 3.0})
    time.sleep(0.5)
    server.start()
    tracker.log(2, {"train/loss": 2.0})
    assert history(server.client, finish(tracker), "train/loss") == [(1, 3.0), (2, 2.0)]


def test_a_resumed_run_that_was_offline_sends_what_is_missing(server):
    server.stop()
    first = run(server, "resumed", "train.stop_after=0.5")
    assert first["status"] == "interrupted" and first["mlflow_run_id"] is None
    server.start()
    summary = run(server, "resumed")
    assert summary["mlflow_run_id"]
    assert_delivered(server, summary["run_dir"])


def test_steps_that_a_resumed_run_makes_again_are_one_point_each(server):
    first = run(server, "again")
    shutil.rmtree(Path(first["run_dir"]) / "checkpoints" / "step_000006")  # as if it had been killed before
    assert run(server, "again")["mlflow_run_id"] == first["mlflow_run_id"]
    points = [(row["step"], row["train/loss"]) for row in metrics(first["run_dir"]) if "train/loss" in row]
    assert history(server.client, first["mlflow_run_id"], "train/loss") == points and len(points) == 6


def test_an_experiment_that_was_deleted_costs_one_warning_and_sync_restores_it(server, caplog):
    experiment = server.client.create_experiment("chattrain")
    server.client.delete_experiment(experiment)
    summary = run(server, "deleted")
    assert summary["status"] == "completed"
    [warning] = warnings(caplog)
    assert "chattrain is deleted" in warning
    with pytest.raises(RunFailed, match=f"run.dir={summary['run_dir']} restores it"):
        sync()
    sync(f"run.dir={summary['run_dir']}")
    assert_delivered(server, summary["run_dir"])


def test_an_experiment_that_is_deleted_while_the_run_goes_on_is_restored_by_sync(server, caplog):
    def delete(path: str) -> None:
        if path == "runs/log-batch" and server.requests.count(path) == 3:
            server.client.delete_experiment(server.client.get_experiment_by_name("chattrain").experiment_id)

    server.fault = delete
    summary = run(server, "deleted")
    assert summary["status"] == "completed" and len(warnings(caplog)) == 1
    server.fault = None
    sync("run.name=deleted")
    assert_delivered(server, summary["run_dir"])


def test_a_run_that_is_gone_for_good_is_made_anew_by_sync(server):
    summary = run(server, "gone")
    with sqlite3.connect(server.store.removeprefix("sqlite:///")) as database:
        for table in ("latest_metrics", "metrics", "params", "tags", "logged_model_metrics", "inputs", "runs"):
            database.execute(f"delete from {table}")
        for table in ("logged_model_tags", "logged_model_params", "logged_models"):
            database.execute(f"delete from {table}")
    assert sync()["sent"] == []  # it asks nothing of a store that is known to have everything
    summary["mlflow_run_id"] = None
    (Path(summary["run_dir"]) / "summary.json").write_text(json.dumps(summary))
    sync("run.name=gone")
    assert_delivered(server, summary["run_dir"])


def test_a_run_that_was_deleted_is_restored_where_it_is_named(server):
    summary = run(server, "deleted")
    server.client.delete_run(summary["mlflow_run_id"])
    assert sync()["sent"] == [] and server.runs() == []
    sync("run.name=deleted")
    assert_delivered(server, summary["run_dir"])


# --- sync ----------------------------------------------------------------------------------------------------------------


def test_another_store_gets_a_copy_of_its_own(server, tmp_path, empty):
    summary = run(server, "copied")
    other = f"sqlite:///{tmp_path / 'other.db'}"
    (tmp_path / "other.db").write_bytes(empty.read_bytes())
    for sent in (1, 0):
        assert len(sync(f"tracking.uri={other}", "tracking.experiment=elsewhere")["sent"]) == sent
    client = connect(other)
    [there] = client.search_runs([client.get_experiment_by_name("elsewhere").experiment_id])
    assert there.info.run_id != summary["mlflow_run_id"] and there.info.status == "FINISHED"
    recorded = [(row["step"], row["train/loss"]) for row in metrics(summary["run_dir"]) if "train/loss" in row]
    assert history(client, there.info.run_id, "train/loss") == recorded
    sync("run.name=copied", "tracking.experiment=third")  # another experiment of the same store
    assert len(server.runs("third")) == 1
    assert sync()["sent"] == []  # its own has everything
    assert_delivered(server, summary["run_dir"])


def test_a_run_without_tracking_is_sent_where_it_is_named(server):
    summary = train("mid", "untracked", "train.max_steps=2")
    assert sync()["sent"] == []
    for _ in range(2):
        sync("run.name=mid/untracked", f"tracking.uri={server.uri}")
    assert_delivered(server, summary["run_dir"])


def test_sync_is_refused_where_it_could_do_nothing(server):
    for typed, reason in ((["run.name=none"], "no run none"), (["tracking=none"], "tracking=none")):
        with pytest.raises(UserError, match=reason):
            sync(*typed)
    assert sync() == {"sent": [], "complete": [], "going_on": []}


def test_a_run_that_goes_on_is_left_to_itself(server, tmp_path):
    folder = tmp_path / "runs" / "mid" / "live"
    tracker = tracked(folder, server.uri, "live")
    (folder / "config.yaml").write_text("stage: mid\n")
    tracker.log(1, {"train/loss": 3.0})
    while tracker.mlflow_run_id is None:
        time.sleep(0.01)
    assert sync()["going_on"] == [str(folder)]
    with pytest.raises(UserError, match="once it has ended"):
        sync("run.name=live")
    assert history(server.client, finish(tracker), "train/loss") == [(1, 3.0)]
    assert [found.info.status for found in server.runs("live")] == ["FINISHED"]


# --- processes that die --------------------------------------------------------------------------------------------------


def start(server, *overrides: str, **variables: str) -> subprocess.Popen:
    """A training in a process of its own, on a schedule that sleeps where FAULT says."""
    typed = [*TINY, "stage=mid", *TRACKED, f"tracking.uri={server.uri}", *overrides]
    faults = {"RANK": "", "FAULT_RANK": "", **variables}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **faults}
    environment.pop("RANK")
    return subprocess.Popen([sys.executable, "-m", "chattrain", *typed], env=environment, stderr=subprocess.PIPE, text=True)


def until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def kill_before_a_checkpoint(server, name: str) -> Path:
    """A run that is killed after it has told the server of some steps."""
    process = start(server, f"run.name={name}", "train.max_steps=100000", "checkpoint.every=null", "eval.every=null")
    try:
        until(lambda: server.runs() and "train/loss" in server.runs()[0].data.metrics)
    finally:
        process.kill()
        process.wait()
    assert [found.info.status for found in server.runs()] == ["RUNNING"]
    return Path("runs/mid").resolve() / name


def test_a_run_that_was_killed_is_ended_by_sync_at_the_time_of_its_last_number(server):
    folder = kill_before_a_checkpoint(server, "killed")
    assert sync()["sent"] == [str(folder)]
    [found] = server.runs()
    rows = metrics(folder)
    assert found.info.status == "KILLED" and found.info.end_time == int(rows[-1]["time"] * 1000)
    recorded = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert history(server.client, found.info.run_id, "train/loss") == recorded
    assert sync()["sent"] == []


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_run_that_was_killed_before_its_first_checkpoint_is_ended_by_the_next_start(server, resume):
    kill_before_a_checkpoint(server, "again")
    [killed] = server.runs()
    summary = run(server, "again", f"run.resume={resume}")
    status = {found.info.run_id: found.info.status for found in server.runs()}
    assert status == {killed.info.run_id: "KILLED", summary["mlflow_run_id"]: "FINISHED"}


def test_ctrl_c_ends_a_run_at_once_while_the_server_hangs(server):
    server.fault = "hang"
    process = start(
        server, "run.name=stopped", "train.max_steps=100000", "checkpoint.every=null", MLFLOW_HTTP_REQUEST_TIMEOUT="60"
    )
    folder = Path("runs/mid/stopped")
    until(lambda: (folder / "metrics.jsonl").exists() and len(metrics(folder)) > 3)  # it trains
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in err, err
    assert json.loads((folder / "summary.json").read_text())["status"] == "interrupted"


# --- sweeps --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["refuse", pytest.param("hang", marks=pytest.mark.slow)])
def test_a_sweep_survives_its_server_and_sync_nests_its_runs(server, tmp_path, capsys, caplog, fault):
    server.stop() if fault == "refuse" else setattr(server, "fault", "hang")
    with_password = server.uri.replace("://", "://me:tr0ub4dor-3@")
    typed = [*TINY, *TRACKED, "stage=mid", "sweep.name=try", f"tracking.uri={with_password}", "run.seed=1,2"]
    done = command_line(capsys, "-m", *typed)
    assert done.status == 0 and len(warnings(caplog)) == 1, done.err
    server.start() if fault == "refuse" else setattr(server, "fault", None)
    for sent in (3, 0):
        assert len(sync()["sent"]) == sent
    runs = {found.info.run_name: found for found in server.runs()}
    assert set(runs) == {"sweep try", "seed=1 mid", "seed=2 mid"}
    parents = {runs[name].data.tags["mlflow.parentRunId"] for name in ("seed=1 mid", "seed=2 mid")}
    assert parents == {runs["sweep try"].info.run_id}
    assert "tr0ub4dor-3" not in everything_below(tmp_path) + done.out + done.err
    assert {found.info.status for found in runs.values()} == {"FINISHED"} and "best/val/bpb" in runs["sweep try"].data.metrics


# --- credentials ---------------------------------------------------------------------------------------------------------

SECRETS = {
    "MLFLOW_TRACKING_PASSWORD": "correct-horse-1",
    "HF_TOKEN": "battery-staple-2",
    "AWS_SECRET_ACCESS_KEY": "hidden-key-3",
}


@pytest.mark.parametrize("state", ["up", "down"])
def test_credentials_reach_the_server_and_nothing_else(server, tmp_path, capfd, state):
    for name, value in SECRETS.items():
        os.environ[name] = value
    try:
        if state == "down":
            server.stop()
        host = server.uri.removeprefix("http://")
        secret = "tr0ub4dor-3"
        typed = [f"tracking.uri=http://me:{secret}@{host}"]
        typed += [f"+tracking.tags.{name}={value}" for name, value in SECRETS.items()]
        summary = train("mid", "secret", *TRACKED, *typed)
        assert (summary["mlflow_run_id"] is None) == (state == "down")
        if state == "down":
            server.start()
            sync("run.name=secret", f"tracking.uri=http://me:{secret}@{host}")
        assert_delivered(server, summary["run_dir"])
        assert any("HTTP_AUTHORIZATION" in headers for headers in server.headers)
        assert summary["status"] == "completed"
        shown = capfd.readouterr()
        written = everything_below(tmp_path) + shown.out + shown.err
        for value in (secret, *SECRETS.values()):
            leaks = [line for line in written.splitlines() if value in line]
            assert not leaks, leaks[0][:300]
    finally:
        for name in SECRETS:
            os.environ.pop(name, None)


def test_a_refusal_hides_what_was_typed(server, capsys):
    done = command_line(
        capsys, *TINY, "stage=mid", "tracking.uri=http://me:secret-1@host", "data.train_path=http://me:secret-2@host/x"
    )
    assert done.status == 2 and "secret" not in done.err


@pytest.mark.parametrize("size", [60_000, 90_000, 130_000])  # bytes of tables when it is killed; a complete store has 950,000
def test_a_process_that_is_killed_while_it_makes_a_store_leaves_no_broken_one(tmp_path, size):
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    making = f"from chattrain.tracking.mlflow_store import open_store; open_store({store!r}, 'one')"
    with subprocess.Popen([sys.executable, "-c", making]) as process:
        while process.poll() is None and sum(len(held) for held in _files(tmp_path)) < size:
            time.sleep(0.005)
        process.kill()
    client, _ = open_store(store, "one")
    assert client.get_experiment_by_name("one")


def _files(folder: Path) -> list[bytes]:
    """What the files of a folder hold, while others are renamed."""
    try:
        return [file.read_bytes() for file in folder.iterdir()]
    except FileNotFoundError:
        return []


def test_a_store_named_by_a_relative_path_is_the_same_from_another_folder(tmp_path, cache, empty):
    with standing_in(tmp_path, cache):
        write_talk(tmp_path)
        shutil.copy(empty, tmp_path / "mine.db")
        summary = train("mid", "relative", *TRACKED, "tracking.uri=sqlite:///mine.db")
        (tmp_path / "elsewhere").mkdir()
        os.chdir("elsewhere")
        assert sync(f"run.dir={summary['run_dir']}")["complete"] == [summary["run_dir"]]
        assert not list(Path().iterdir())
