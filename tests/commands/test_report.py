"""command=report finds what it is asked for: a run, a sweep, several runs."""

import json
from pathlib import Path

import pytest

import chattrain
from chattrain.errors import UserError
from chattrain.setup.summary import write_summary
from chattrain.tracking.table import show_sweep
from tests.tracking.folders import Page, job, run_folder, sweep

ROWS = [{"step": 1, "time": 0.0, "train/loss": 3.0}]


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Runs sft/a, sft/b and mid/b, and a sweep `rates`."""
    monkeypatch.chdir(tmp_path)
    for stage, name in (("sft", "a"), ("sft", "b"), ("mid", "b")):
        run_folder(tmp_path / "runs" / stage / name, ROWS, f"stage: {stage}\nrun: {{name: {name}}}\n")
    sweep([job(0, 0.5, rate=1), job(1, 0.4, rate=3)]).write(tmp_path / "runs" / "sweeps" / "rates")
    return tmp_path / "runs"


def report(*overrides: str) -> Path:
    return Path(chattrain.run(["command=report", *overrides])["report"])


@pytest.mark.parametrize("named", ["sweep.name=rates", "run.name=rates", "run.dir=runs/sweeps/rates"])
def test_a_sweep_is_reported_by_its_name(root, named, capsys):
    assert report(named).resolve() == root / "sweeps" / "rates" / "report.html"
    assert "lr_scale" in capsys.readouterr().out and (root / "sweeps" / "rates" / "table.md").is_file()


def test_a_run_is_reported_by_its_name(root):
    assert report("stage=sft", "run.name=a").resolve() == root / "sft" / "a" / "report.html"


def test_a_run_comes_before_a_sweep_of_the_same_name(root):
    run_folder(root / "sft" / "rates", ROWS, "stage: sft\n")
    assert report("stage=sft", "run.name=rates").resolve() == root / "sft" / "rates" / "report.html"


def test_runs_are_compared_by_name_by_stage_and_name_and_by_folder(root):
    page = Page(report(f"runs=[a,mid/b,{root / 'sft' / 'b'}]").read_text())
    assert [series["label"] for series in page.charts["train/loss"]["series"] if series["style"] == "line"] == [
        "sft a",
        "mid b",
        "sft b",
    ]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("runs=[b]", "mid/b, sft/b"),
        ("runs=[none]", "no run none in .*there are"),
        ("sweep.name=none", "there are: rates"),
        ("run.name=none", "no run none in .*there are"),
    ],
)
def test_what_is_not_there_is_said(root, asked, said):
    with pytest.raises(UserError, match=said):
        report(asked)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["runs=[a,mid/b]", "run.name=a"], "runs=.* takes the place of run.name=a"),
        (["runs=[a,mid/b]", "run.dir=runs/sft/a"], "takes the place of run.dir=runs/sft/a"),
        (["runs=[a,mid/b]", "init.from=a"], "takes the place of init.from=a"),
        (["runs=[a,mid/b]", "sweep.name=rates"], "takes the place of sweep.name=rates"),
        (["sweep.name=rates", "run.name=a"], "sweep.name=rates takes the place of run.name=a"),
    ],
)
def test_two_names_for_what_is_reported_are_refused(root, asked, said):
    with pytest.raises(UserError, match=said):
        report(*asked)


def test_a_sweep_that_is_reported_again_keeps_the_test_score_of_its_best(root):
    folder = root / "sweeps" / "rates"
    jobs = [job(i, 0.5 - i / 10, rate=rate, run_dir=str(root / "sft" / "ab"[i])) for i, rate in enumerate((1, 3))]
    sweep(jobs).write(folder)
    show_sweep(folder, {"test/loss": 0.4321})
    report("sweep.name=rates")
    assert json.loads((folder / "answer.json").read_text())["test"] == {"test/loss": 0.4321}
    assert "0.4321" in (folder / "table.md").read_text() and "0.4321" in (folder / "report.html").read_text()
    jobs[0].objective = 0.1
    sweep(jobs).write(folder)
    report("sweep.name=rates")
    assert json.loads((folder / "answer.json").read_text())["test"] is None  # it was another's


def test_a_damaged_answer_is_written_again(root):
    (root / "sweeps" / "rates" / "answer.json").write_text("{")
    report("sweep.name=rates")
    assert json.loads((root / "sweeps" / "rates" / "answer.json").read_text())["test"] is None


def test_a_damaged_record_of_a_sweep_is_said(root):
    (root / "sweeps" / "rates" / "sweep.json").write_text('{"name": "rates"')
    with pytest.raises(UserError, match="cannot be read"):
        report("sweep.name=rates")


def test_a_run_is_finished_though_its_report_cannot_be_written(tmp_path, caplog):
    (tmp_path / "report.html").mkdir()
    write_summary(tmp_path, {"status": "completed"})
    assert (tmp_path / "summary.json").is_file() and len(caplog.records) == 1
