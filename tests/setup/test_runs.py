"""The run that is named is the run that is read, by every command; the newest only where none is named."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

import chattrain
from chattrain import loop
from chattrain.errors import UserError
from chattrain.setup.runs import named_run
from tests.helpers import TINY, command_line, contents, standing_in, train, write_talk

OTHER_SHAPE = ["model.n_embd=32", "train.max_steps=1", "init.from=scratch"]


@pytest.fixture(scope="module")
def place(tmp_path_factory, cache):
    """mid/farm, sft/farm and sft/solo of one shape; then, as the newest of each stage, mid/new and sft/new of another."""
    folder = tmp_path_factory.mktemp("place")
    with standing_in(folder, cache):
        write_talk(folder)
        write_talk(folder, "held.jsonl", 20, factor=5)
        train("mid", "farm", "train.max_steps=3", "init.from=scratch", "checkpoint.every=1")
        train("sft", "farm", "train.max_steps=1", "init.from=mid/farm")
        train("sft", "solo", "train.max_steps=1", "init.from=mid/farm")
        for stage in ("mid", "sft"):
            train(stage, "new", *OTHER_SHAPE)
        yield folder


def read(command: str, *typed: str) -> Path:
    """The checkpoint, or for a report the run folder, that a command read."""
    found = chattrain.run([f"command={command}", "tracking=none", "chat.prompt=Hi", "chat.max_tokens=2", *typed])
    return Path(found["report"]).parent if command == "report" else Path(found["checkpoint"])


READING = ["chat", "evaluate", "export", "report"]
WAYS = {
    "by its name": ["run.name=solo"],
    "by its name and stage": ["stage=sft", "run.name=farm"],
    "by its stage and name": ["run.name=sft/farm"],
    "by its folder": ["run.dir=runs/sft/solo"],
    "as a start, by its name": ["init.from=solo"],
    "as a start, by stage and name": ["init.from=sft/farm"],
    "as a start, by its folder": ["init.from=runs/sft/solo"],
    "twice, the same": ["run.name=solo", "init.from=runs/sft/solo"],
}


@pytest.mark.parametrize("command", READING)
@pytest.mark.parametrize("way", WAYS)
def test_the_run_that_is_named_is_the_run_that_is_read(place, command, way):
    found = read(command, *WAYS[way])
    name = "farm" if "farm" in " ".join(WAYS[way]) else "solo"
    run = (place / "runs/sft" / name).resolve()
    assert found == (run if command == "report" else run / "checkpoints/step_000001")


@pytest.mark.parametrize("command", READING)
def test_without_a_name_the_newest_is_read_and_the_first_line_says_which(place, command, capsys):
    done = command_line(capsys, f"command={command}", "stage=sft", "tracking=none", "chat.prompt=Hi", "chat.max_tokens=2")
    assert done.status == 0, done.err
    first = done.err.splitlines()[0]
    assert "newest finished sft run" in first and "new" in first and "run.name" in first


def test_one_checkpoint_of_a_run_can_be_named(place):
    assert read("evaluate", "init.from=runs/mid/farm/checkpoints/step_000002").name == "step_000002"
    assert read("report", "init.from=runs/mid/farm/checkpoints/step_000002") == (place / "runs/mid/farm").resolve()


def test_a_training_starts_from_a_run_by_its_name(place):
    assert train("sft", "next", "train.max_steps=1", "init.from=solo")["init"].endswith("sft/solo/checkpoints/step_000001")
    shutil.rmtree(place / "runs/sft/next")


REFUSED = {
    "a name that no run has": (["run.name=fram"], ["no run fram", "mid/farm"]),
    "a name of another stage": (["stage=mid", "run.name=solo"], ["no mid run solo", "sft/solo"]),
    "a name of several stages": (["run.name=farm"], ["mid/farm", "sft/farm", "stage=mid"]),
    "two names": (["run.name=solo", "init.from=mid/farm"], ["run.name=solo", "init.from=mid/farm", "keep one"]),
    "a name and a folder": (["run.name=solo", "run.dir=runs/mid/farm"], ["run.name=solo", "run.dir=runs/mid/farm"]),
    "a start that no run has": (["init.from=sool"], ["no run sool", "did you mean init.from=sft/solo?"]),
    "more than a stage and a name": (["run.name=runs/sft/solo"], ["run.name=runs/sft/solo", "run.dir"]),
    "a folder that is no run": (["run.dir=runs"], ["runs"]),
    "nothing to read": (["init.from=scratch"], ["init.from=scratch", "run.name"]),
}


@pytest.mark.parametrize("command", READING)
@pytest.mark.parametrize("mistake", REFUSED)
def test_what_names_no_run_or_two_is_refused(place, command, mistake):
    typed, named = REFUSED[mistake]
    before = contents(place)
    with pytest.raises(UserError) as refused:
        read(command, *typed)
    assert all(part in str(refused.value) for part in named), refused.value
    assert contents(place) == before


@pytest.mark.parametrize("command", ["chat", "export", "report"])
def test_a_stage_that_is_not_the_runs_is_refused_where_it_would_have_no_effect(place, command):
    with pytest.raises(UserError, match="is a mid run, so stage=sft would have no effect"):
        read(command, "stage=sft", "init.from=runs/mid/farm")


@pytest.mark.parametrize("command", ["train", "import"])
def test_a_new_run_is_named_without_its_stage(place, command):
    with pytest.raises(UserError, match="mid/x is no name of a folder"):
        chattrain.run([f"command={command}", *TINY, "run.name=mid/x"])


def test_runs_to_compare_are_refused_by_commands_that_compare_none(place):
    with pytest.raises(UserError, match=r"runs=.* has no effect on command=chat"):
        read("chat", "runs=[solo,farm]")


def test_the_advice_of_a_refusal_works_when_typed(place):
    with pytest.raises(UserError) as refused:
        read("chat", "run.name=farm")
    advice = [word for word in str(refused.value).replace(",", " ").split() if "=" in word]
    assert advice == ["stage=mid", "init.from=mid/farm"]
    found = [read("chat", "run.name=farm", advice[0]), read("chat", advice[1])]
    assert found[0] == found[1] and found[0].parents[1].name == "farm"


SWEEP = ["-m", "optimizer.lr_scale=1,2"]


@pytest.mark.parametrize("sweep", [[], SWEEP, [*SWEEP, "sweep.name=night"]], ids=["one run", "a sweep", "a sweep with a name"])
def test_the_advice_after_ctrl_c_resumes_the_run(place, sweep, capsys, monkeypatch):
    typed = [*sweep, *TINY, "stage=sft", "run.root=stopped", "train.max_steps=3", "init.from=runs/mid/farm"]
    train_step = loop.train_step

    def interrupted(*arguments, **named):
        os.kill(os.getpid(), signal.SIGINT)
        return train_step(*arguments, **named)

    monkeypatch.setattr(loop, "train_step", interrupted)
    stopped = command_line(capsys, *typed)
    assert stopped.status == 130
    monkeypatch.undo()
    monkeypatch.chdir(place)
    (advice,) = (line for line in stopped.err.splitlines() if "the same command" in line)
    resumed = command_line(capsys, *typed, *(word for word in advice.split() if "=" in word))
    assert resumed.status == 0 and "resuming from" in resumed.err, resumed.err
    runs = [json.loads(file.read_text()) for file in Path("stopped").rglob("summary.json")]
    assert [run["status"] for run in runs] == ["completed"] * (2 if sweep else 1)
    shutil.rmtree("stopped")


def test_a_run_that_stops_where_it_was_asked_to_is_not_told_how_to_resume(place, capsys):
    typed = [*TINY, "stage=sft", "run.root=half", "run.name=a", "train.max_steps=2", "init.from=runs/mid/farm"]
    done = command_line(capsys, *typed, "train.stop_after=0.5")
    assert done.status == 0 and "at step 1 of 2" in done.err and "to resume" not in done.err, done.err
    shutil.rmtree("half")


def test_a_reference_is_a_folder_or_a_name(place):
    root = Path("runs")
    solo = (place / "runs/sft/solo").resolve()
    for reference in ("solo", "sft/solo", "runs/sft/solo", str(solo), os.path.relpath(solo)):
        assert named_run(reference, root, None) == solo
    with pytest.raises(UserError, match="no mid run solo"):
        named_run("solo", root, "mid")


def test_a_finished_sweep_folder_is_no_run(place):
    folder = place / "runs/sweeps/solo"
    folder.mkdir(parents=True)
    (folder / "sweep.json").write_text(json.dumps({}))
    assert named_run("solo", Path("runs"), None).parent.name == "sft"
    shutil.rmtree(place / "runs/sweeps")
