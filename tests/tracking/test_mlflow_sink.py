"""MLflow takes every number under a name of its own, also after it was away, and the machine is measured beside them."""

from __future__ import annotations

import time

import pytest

from chattrain.tracking.mlflow_store import connect, valid_name
from chattrain.tracking.mlflow_ui import pages
from tests.tracking.stores import finish, history, tracked


@pytest.fixture(scope="module")
def uri(tmp_path_factory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


def stored(uri: str, run_id: str | None):
    return connect(uri).get_run(run_id or "").data


def test_any_name_of_a_metric_param_or_tag_is_stored_and_none_hides_another(uri, tmp_path, caplog):
    names = ["eval/C++_acc", "eval/C__acc", "eval/C--_acc", "/a", "a//b", "a/../b", "ä (1)", "..", "val/bpb"]
    names += ["x" * 300, "x" * 301]
    params, tags = {name: i for i, name in enumerate(names)}, {name: "x" for name in names}
    tracker = tracked(tmp_path, uri, "names", params=params, tags=tags)
    tracker.log(1, {name: float(i) for i, name in enumerate(names)})
    data = stored(uri, finish(tracker))
    assert sorted(data.metrics.values()) == [float(i) for i in range(len(names))]
    assert sorted(int(value) for value in data.params.values()) == list(range(len(names)))
    assert data.metrics["val/bpb"] == 8.0 and data.metrics["eval/C__acc"] == 1.0  # valid names stay
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_two_names_never_become_one():
    names = ["a+b", "a*b", "a_b", "a b", "a/b", "a//b", "a/./b", "a/b/"]
    assert len({valid_name(name) for name in names}) == len(names)


def test_numbers_of_a_time_without_the_store_come_with_the_next_ones(uri, tmp_path, monkeypatch, caplog):
    tracker = tracked(tmp_path, uri, "away")
    from mlflow.exceptions import MlflowException

    client = type(connect(uri))
    log_batch, away = client.log_batch, [True]

    def refuse(self, *args, **kwargs):
        if away[0]:
            raise MlflowException("the server is away")
        return log_batch(self, *args, **kwargs)

    monkeypatch.setattr(client, "log_batch", refuse)
    tracker.log(1, {"train/loss": 2.0})
    while not [record for record in caplog.records if record.levelname == "WARNING"]:  # the failure has been met
        time.sleep(0.01)
    away[0] = False
    tracker.log(2, {"train/loss": 1.0})
    assert history(connect(uri), finish(tracker), "train/loss") == [(1, 2.0), (2, 1.0)]


def test_the_machine_is_measured_until_the_run_ends(uri, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    tracker = tracked(tmp_path, uri, "system", system_metrics=True)
    until = time.monotonic() + 30
    while tracker.mlflow_run_id is None and time.monotonic() < until:
        time.sleep(0.1)
    while time.monotonic() < until:
        if any(name.startswith("system/") for name in stored(uri, tracker.mlflow_run_id).metrics):
            break
        time.sleep(0.1)
    run_id = finish(tracker)
    assert "system/cpu_utilization_percentage" in stored(uri, run_id).metrics
    assert connect(uri).get_run(run_id).info.status == "FINISHED"


def test_make_ui_opens_the_runs_of_the_experiment_that_ran_last(uri, tmp_path):
    for name in ("older", "newer"):
        finish(tracked(tmp_path / name, uri, name))
    client = connect(uri)
    client.create_experiment("empty")
    ids = {name: client.get_experiment_by_name(name).experiment_id for name in ("older", "newer", "empty")}
    found = pages("http://127.0.0.1:5000", uri)
    assert found[0] == f"http://127.0.0.1:5000/#/experiments/{ids['newer']}/runs?workflowType=machine_learning"
    assert found[1].partition("/experiments/")[2].startswith(f"{ids['older']}/")
    assert not any(f"/experiments/{ids['empty']}/" in page for page in found)
