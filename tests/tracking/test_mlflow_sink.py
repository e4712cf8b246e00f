"""MLflow takes every number under a name of its own, also after it was away, and the machine is measured beside them."""

from __future__ import annotations

import time

import pytest

from chattrain.tracking.mlflow_sink import MLflowSink
from chattrain.tracking.mlflow_store import connect, valid_name
from chattrain.tracking.mlflow_ui import pages


@pytest.fixture(scope="module")
def uri(tmp_path_factory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


def stored(uri: str, sink: MLflowSink):
    return connect(uri).get_run(sink.run_id or "").data


def test_any_name_of_a_metric_param_or_tag_is_stored_and_none_hides_another(uri, caplog):
    names = ["eval/C++_acc", "eval/C__acc", "eval/C--_acc", "/a", "a//b", "a/../b", "ä (1)", "..", "val/bpb"]
    names += ["x" * 300, "x" * 301]
    sink = MLflowSink(uri, "names", "run", {name: i for i, name in enumerate(names)}, {name: "x" for name in names})
    sink.log(1, {name: float(i) for i, name in enumerate(names)})
    sink.close()
    data = stored(uri, sink)
    assert sorted(data.metrics.values()) == [float(i) for i in range(len(names))]
    assert sorted(int(value) for value in data.params.values()) == list(range(len(names)))
    assert data.metrics["val/bpb"] == 8.0 and data.metrics["eval/C__acc"] == 1.0  # valid names stay
    assert not caplog.records


def test_two_names_never_become_one():
    names = ["a+b", "a*b", "a_b", "a b", "a/b", "a//b", "a/./b", "a/b/"]
    assert len({valid_name(name) for name in names}) == len(names)


def test_numbers_of_a_time_without_the_store_come_with_the_next_ones(uri, monkeypatch, caplog):
    sink = MLflowSink(uri, "away", "run", {}, {})
    from mlflow.exceptions import MlflowException

    client = type(connect(uri))
    log_batch, away = client.log_batch, [True]

    def refuse(self, *args, **kwargs):
        if away[0]:
            raise MlflowException("the server is away")
        return log_batch(self, *args, **kwargs)

    monkeypatch.setattr(client, "log_batch", refuse)
    sink.log(1, {"train/loss": 2.0})
    while not caplog.records:  # the failure has been met
        time.sleep(0.01)
    away[0] = False
    sink.log(2, {"train/loss": 1.0})
    sink.close()
    history = connect(uri).get_metric_history(sink.run_id or "", "train/loss")
    assert sorted((point.step, point.value) for point in history) == [(1, 2.0), (2, 1.0)]


def test_the_machine_is_measured_until_the_run_ends(uri, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    sink = MLflowSink(uri, "system", "run", {}, {})
    sink.watch_system()
    until = time.monotonic() + 30
    while not any(name.startswith("system/") for name in stored(uri, sink).metrics) and time.monotonic() < until:
        time.sleep(0.1)
    sink.close()
    assert "system/cpu_utilization_percentage" in stored(uri, sink).metrics
    assert connect(uri).get_run(sink.run_id or "").info.status == "FINISHED"


def test_the_password_of_a_store_is_in_no_warning(monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    MLflowSink("http://me:secret@127.0.0.1:9", "x", "run", {}, {}).close()
    assert "me:***@" in caplog.text and "secret" not in caplog.text


def test_make_ui_opens_the_runs_of_the_experiment_that_ran_last(uri):
    MLflowSink(uri, "older", "run", {}, {}).close()
    MLflowSink(uri, "newer", "run", {}, {}).close()
    client = connect(uri)
    client.create_experiment("empty")
    ids = {name: client.get_experiment_by_name(name).experiment_id for name in ("older", "newer", "empty")}
    found = pages("http://127.0.0.1:5000", uri)
    assert found[0] == f"http://127.0.0.1:5000/#/experiments/{ids['newer']}/runs?workflowType=machine_learning"
    assert found[1].partition("/experiments/")[2].startswith(f"{ids['older']}/")
    assert not any(f"/experiments/{ids['empty']}/" in page for page in found)
