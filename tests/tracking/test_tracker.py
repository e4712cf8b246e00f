"""Numbers reach metrics.jsonl whatever becomes of the console and of MLflow."""

import io
import json
import logging
import math
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from chattrain.tracking.console import setup_logging
from chattrain.tracking.mlflow_store import connect
from chattrain.tracking.tracker import NullTracker, Tracker
from tests.tracking.stores import finish, history, tracked


def lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def no_constants(word: str):
    raise AssertionError(f"{word} is not JSON")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def logs(tmp_path):
    """stderr and train.log of a run in tmp_path, closed again."""
    close = setup_logging(tmp_path, console=True, resume=False)
    yield tmp_path / "train.log"
    close()


# --- metrics.jsonl ---------------------------------------------------------------------------------------------------


def test_each_log_is_one_line_in_order_with_its_step_and_time(tmp_path):
    tracker = Tracker(tmp_path, num_steps=20, console=False)
    before = time.time()
    tracker.log(10, {"train/loss": 2.5, "train/tokens_seen": 4096})
    tracker.log(10, {"val/bpb": 1.25})
    tracker.log(20, {"train/loss": 2.0})
    rows = lines(tmp_path)  # before finish: each line is flushed
    assert [row.pop("time") for row in rows] == pytest.approx([before] * 3, abs=60)
    assert rows == [
        {"step": 10, "train/loss": 2.5, "train/tokens_seen": 4096},
        {"step": 10, "val/bpb": 1.25},
        {"step": 20, "train/loss": 2.0},
    ]


def test_a_sink_that_raises_costs_no_line(tmp_path):
    class Broken:
        def start(self): ...

        def send(self):
            assert lines(tmp_path)[-1]["step"] == len(lines(tmp_path))  # the line was there first
            raise OSError("disk full")

    tracker = Tracker(tmp_path, num_steps=2, mlflow=Broken(), console=False)
    for step in (1, 2):
        with pytest.raises(OSError):
            tracker.log(step, {"train/loss": 1.0})
    assert [row["step"] for row in lines(tmp_path)] == [1, 2]


def test_numbers_that_are_not_finite_are_null_and_the_line_stays_json(tmp_path):
    tracker = Tracker(tmp_path, num_steps=1, console=False)
    tracker.log(1, {"train/loss": math.nan, "train/grad_norm": math.inf, "lr_factor": 1.0})
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=no_constants)
    assert (row["train/loss"], row["train/grad_norm"], row["lr_factor"]) == (None, None, 1.0)
    assert tracker.last == {"train/loss": None, "train/grad_norm": None, "lr_factor": 1.0}


def test_last_has_the_last_value_of_each_metric(tmp_path):
    tracker = Tracker(tmp_path, num_steps=20, console=False)
    tracker.log(10, {"train/loss": 2.5, "val/bpb": 1.25})
    tracker.log(20, {"train/loss": 2.0})
    assert tracker.last == {"train/loss": 2.0, "val/bpb": 1.25}


def test_a_run_from_step_0_starts_a_new_file(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 0, "train/loss": 9.0}\n')
    tracker = Tracker(tmp_path, num_steps=1, console=False)
    assert lines(tmp_path) == [] and tracker.last == {}


@pytest.mark.parametrize("torn", ["", '{"step": 4, "ti', '{"step": 2, "time": 0, "train/lo', "\0\0\0"])
def test_a_resumed_run_has_each_step_once(tmp_path, torn):
    rows = [{"step": step, "time": 0.5, "train/loss": 10.0 - step} for step in (1, 2, 3)]
    rows.insert(2, {"step": 2, "time": 0.5, "val/loss": 4.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)
    tracker = Tracker(tmp_path, num_steps=4, start_step=2, console=False)
    assert tracker.last == {"train/loss": 8.0, "val/loss": 4.0}
    for step in (3, 4):
        tracker.log(step, {"train/loss": 0.0})
    assert [row["step"] for row in lines(tmp_path)] == [1, 2, 2, 3, 4]
    assert lines(tmp_path)[:3] == rows[:3]  # what stays is not altered


def test_a_run_resumed_without_its_file_starts_one(tmp_path):
    Tracker(tmp_path / "moved", num_steps=4, start_step=2, console=False).log(3, {"train/loss": 1.0})
    assert [row["step"] for row in lines(tmp_path / "moved")] == [3]


def test_other_ranks_have_the_same_methods_and_write_nothing():
    tracker = NullTracker()
    tracker.update(1, loss=2.0)
    tracker.log(1, {"train/loss": 2.0})
    tracker.finish({"status": "completed"})
    assert tracker.last == {}


def test_without_mlflow_and_terminal_neither_mlflow_nor_rich_nor_torch_is_imported(tmp_path):
    code = (
        "import sys, pathlib; from chattrain.tracking.tracker import Tracker\n"
        "tracker = Tracker(pathlib.Path(sys.argv[1]), 1); tracker.log(1, {'train/loss': 1.0})\n"
        "tracker.finish({'status': 'completed'})\n"
        "print([name for name in ('mlflow', 'rich', 'torch') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={"PYTHONPATH": ":".join(sys.path)})
    assert done.stdout.strip() == "[]"


# --- console and train.log -------------------------------------------------------------------------------------------


def test_without_a_terminal_each_log_is_one_plain_line(tmp_path, logs, capsys):
    tracker = Tracker(tmp_path, num_steps=200)
    pace = {"lr_factor": 1.0, "lr/matrix": 0.02, "train/grad_norm": 0.5, "train/tokens_per_second": 41200.4}
    tracker.log(40, {"train/loss": 2.3121, **pace})
    tracker.log(40, {"val/bpb": 1.2345, "val/loss": 2.1})
    tracker.log(50, {"train/loss": math.nan, "train/mfu": 0.412, **pace})
    training, evaluation, diverged = capsys.readouterr().err.splitlines()
    assert training == "step 40/200  train/loss 2.3121  lr 0.02  tokens/s 41,200  mfu n/a  left n/a"
    assert evaluation == "step 40/200  val/bpb 1.2345  val/loss 2.1"
    assert diverged == "step 50/200  train/loss nan  lr 0.02  tokens/s 41,200  mfu 41.2%  left 0:00:00"


def test_time_left_follows_the_pace_since_the_first_step_seen(tmp_path, logs, capsys, monkeypatch):
    clock = iter([1000.0, 1020.0])
    monkeypatch.setattr("chattrain.tracking.tracker.time", SimpleNamespace(monotonic=lambda: next(clock), time=time.time))
    tracker = Tracker(tmp_path, num_steps=100)
    tracker.update(1, loss=3.0)  # the first step may have compiled for minutes: it does not count
    tracker.log(11, {"train/loss": 2.0})
    assert capsys.readouterr().err.rstrip().endswith("left 0:02:58")  # 2 s a step, 89 steps


def test_a_terminal_gets_a_bar_that_messages_do_not_tear(tmp_path, monkeypatch, capsys):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    close = setup_logging(tmp_path, console=True, resume=False)
    tracker = Tracker(tmp_path, num_steps=200)
    tracker.update(39, loss=2.5)
    logging.getLogger("chattrain").warning("a [bold] word")
    print("for the pipe")
    tracker.log(40, {"train/loss": 2.25})
    tracker.log(40, {"val/bpb": 1.5})
    tracker.finish({"status": "completed"})
    close()
    shown = terminal.getvalue()
    assert "39/200" in shown and "train/loss 2.25" in shown
    assert "step 40/200  train/loss" not in shown  # the bar says it
    assert "step 40/200  val/bpb 1.5\n" in shown and "a [bold] word" in shown
    assert "\033[33m" in shown  # the warning is yellow
    assert capsys.readouterr().out == "for the pipe\n"
    assert sys.stderr is terminal  # given back
    assert "step 40/200  train/loss 2.25" in (tmp_path / "train.log").read_text()


def test_console_off_leaves_stderr_alone_and_train_log_whole(tmp_path, capsys):
    close = setup_logging(tmp_path, console=False, resume=False)
    Tracker(tmp_path, num_steps=2, console=False).log(1, {"train/loss": 2.0})
    logging.getLogger("chattrain").warning("careful")
    close()
    assert capsys.readouterr().err == ""
    first, second = (tmp_path / "train.log").read_text().splitlines()
    assert "INFO step 1/2  train/loss 2" in first and second.endswith("WARNING careful")


def test_passwords_are_in_no_message_and_no_traceback(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "battery-staple-2")
    close = setup_logging(tmp_path, console=True, resume=False)
    try:
        raise OSError("https://me:correct-horse-1@host refused battery-staple-2")
    except OSError as error:
        logging.getLogger("chattrain").error("at step %d: %s", 3, error, exc_info=True)
    close()
    written = (tmp_path / "train.log").read_text() + capsys.readouterr().err
    assert written.count("https://me:***@host refused ***") >= 4  # message and traceback, twice
    assert "correct-horse-1" not in written and "battery-staple-2" not in written


def test_setting_up_logging_again_duplicates_nothing_and_resume_appends(tmp_path, capsys, caplog):
    stale = setup_logging(tmp_path / "a", console=True, resume=False)
    for resume in (False, True):
        close = setup_logging(tmp_path / "b", console=True, resume=resume)
        stale()  # closing an earlier run's logging does not touch this one's
        logging.getLogger("chattrain").info("hello")
        close()
    assert capsys.readouterr().err == "hello\nhello\n"
    assert (tmp_path / "b" / "train.log").read_text().count("INFO hello") == 2
    assert (tmp_path / "a" / "train.log").read_text() == ""
    assert caplog.messages == ["hello", "hello"]
    setup_logging(tmp_path / "b", console=False, resume=False)()
    assert (tmp_path / "b" / "train.log").read_text() == ""


# --- MLflow ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store with one finished run of two steps, and its client. Making a store takes seconds, so it is made once."""
    folder = tmp_path_factory.mktemp("mlflow store")
    run_dir, store = folder / "run #1", folder / "new" / "mlflow.db"
    params = {"train.seq_len": 2048, "init.from": "auto", "run.name": None, "long": "x" * 7000}
    params |= {f"many.{i}": i for i in range(150)}
    tracker = tracked(run_dir, f"sqlite:///{store}", "chattrain", 2, name="first", params=params, tags={"stage": "sft"})
    for step in (1, 2):
        tracker.log(step, {"train/loss": 3.0 - step, "lr/matrix": 0.02, "train/grad_norm": math.nan})
    for name in ("config.yaml", "summary.json"):  # and no report.html
        (run_dir / name).write_text("{}")
    run_id = finish(tracker, "interrupted")
    return SimpleNamespace(path=store, uri=f"sqlite:///{store}", run_id=run_id, client=connect(f"sqlite:///{store}"))


def test_the_store_holds_params_metrics_artifacts_and_how_the_run_ended(store):
    run = store.client.get_run(store.run_id)
    assert run.info.run_name == "first" and run.info.status == "KILLED" and run.data.tags["stage"] == "sft"
    assert run.data.params["train.seq_len"] == "2048" and run.data.params["run.name"] == "null"
    assert len(run.data.params["long"]) == 6000 and len(run.data.params) == 154
    assert history(store.client, store.run_id, "train/loss") == [(1, 2.0), (2, 1.0)]
    assert run.data.metrics["lr/matrix"] == 0.02 and math.isnan(run.data.metrics["train/grad_norm"])
    assert {item.path for item in store.client.list_artifacts(store.run_id)} == {"config.yaml", "summary.json"}
    assert (store.path.parent / "mlartifacts" / store.run_id / "artifacts" / "config.yaml").exists()


def test_a_second_run_joins_the_experiment_and_a_continued_one_goes_on(store, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="chattrain")
    ids = []
    for name, status in (("second", "failed"), ("third", "completed")):
        tracker = tracked(tmp_path / name, store.uri, "chattrain", params={"a": 1})
        tracker.log(1, {"val/bpb": 1.0})
        ids.append(finish(tracker, status))
    again = tracked(tmp_path / "second", store.uri, "chattrain", start_step=1, params={"a": 2, "b": 3})
    while store.client.get_run(ids[0]).info.status != "RUNNING":
        time.sleep(0.01)
    again.log(2, {"val/bpb": 0.5})
    assert finish(again) == ids[0]
    runs = [store.client.get_run(run_id) for run_id in (store.run_id, *ids)]
    assert len({run.info.experiment_id for run in runs}) == 1
    assert [run.info.status for run in runs] == ["KILLED", "FINISHED", "FINISHED"]
    assert history(store.client, ids[0], "val/bpb") == [(1, 1.0), (2, 0.5)]
    assert runs[1].data.params == {"a": "1", "b": "3"}  # MLflow lets no param change
    assert [m for m in caplog.messages if "changed" in m] == ["MLflow keeps the first values of changed params: a"]


def test_a_run_that_the_store_does_not_know_becomes_a_new_one_with_a_warning(store, tmp_path, caplog):
    run_id = finish(tracked(tmp_path, store.uri, "chattrain", run_id="0" * 32))
    assert run_id not in ("", "0" * 32) and "has no run 0000" in caplog.text


@pytest.mark.slow
def test_processes_that_make_one_store_at_the_same_moment_all_get_in(tmp_path):
    code = (
        "import sys; from pathlib import Path; from tests.tracking.stores import finish, tracked\n"
        "tracker = tracked(Path(sys.argv[2]), sys.argv[1], 'sweep'); tracker.log(1, {'val/bpb': 1.0})\n"
        "sys.exit(not finish(tracker))"
    )
    command = [sys.executable, "-c", code, f"sqlite:///{tmp_path / 'mlflow.db'}"]
    path = {"PYTHONPATH": ":".join(["", *sys.path])}
    processes = [subprocess.Popen([*command, str(tmp_path / name)], env=path) for name in "abc"]
    assert [process.wait() for process in processes] == [0, 0, 0]
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        assert database.execute("select count(*) from metrics").fetchone() == (3,)
        assert database.execute("select count(*) from experiments where name = 'sweep'").fetchone() == (1,)


def train(tracker: Tracker) -> None:
    for step in (1, 2, 3):
        tracker.log(step, {"train/loss": 1.0})
    finish(tracker)


def assert_one_warning(caplog) -> None:
    [record] = [record for record in caplog.records if record.levelno >= logging.WARNING]
    text = record.getMessage()
    assert "metrics.jsonl stays whole" in text and "tracking=none" in text and "command=sync" in text


def test_a_store_that_cannot_be_opened_warns_once_and_training_goes_on(tmp_path, caplog):
    (tmp_path / "mlflow.db").mkdir()
    started = time.monotonic()
    tracker = tracked(tmp_path, f"sqlite:///{tmp_path / 'mlflow.db'}", "chattrain")
    train(tracker)
    assert tracker.mlflow_run_id is None and time.monotonic() - started < 30  # MLflow itself would take 100 s to give up
    assert len(lines(tmp_path)) == 3
    assert_one_warning(caplog)


def test_a_store_that_breaks_during_the_run_warns_once_and_training_goes_on(store, tmp_path, caplog, capfd):
    shutil.copy(store.path, tmp_path / "mlflow.db")
    tracker = tracked(tmp_path, f"sqlite:///{tmp_path / 'mlflow.db'}", "chattrain")
    while tracker.mlflow_run_id is None:
        time.sleep(0.01)
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.execute("drop table metrics")
        database.execute("drop table runs")
    train(tracker)
    assert len(lines(tmp_path)) == 3
    assert_one_warning(caplog)
    assert capfd.readouterr().err == ""  # no noise of MLflow's own


def test_a_store_that_hangs_does_not_keep_the_run_from_ending(store, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(type(store.client), "log_batch", lambda *args, **kwargs: time.sleep(2))
    monkeypatch.setattr("chattrain.tracking.mlflow_sink.PATIENCE", 0.1)
    train(tracked(tmp_path, store.uri, "chattrain"))
    assert_one_warning(caplog)


def test_a_log_within_another_is_undone_to_it(tmp_path, capsys):
    """As of a run that a command starts: the command's own lines after it are printed, and none is printed twice."""
    undo_outer = setup_logging(None, console=True, resume=False)
    undo_inner = setup_logging(tmp_path, console=True, resume=False)
    logging.getLogger("chattrain").info("within")
    undo_inner()
    logging.getLogger("chattrain").info("after")
    undo_outer()
    assert capsys.readouterr().err.split() == ["within", "after"]
    assert "within" in (tmp_path / "train.log").read_text() and "after" not in (tmp_path / "train.log").read_text()
