"""A sweep goes on where it was, side by side or stopped, and never passes another run off as the answer."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from chattrain.sweeps.record import read_outcomes
from tests.helpers import TINY, command_line, contents, metrics, process, write_talk
from tests.sweeps.common import SFT, jobs

# --- once more -------------------------------------------------------------------------------------------------------


def trained_at(name: str) -> dict[str, int]:
    """When the checkpoint of each job was written."""
    return {
        Path(job.run_dir or "").name: next((Path(job.run_dir or "") / "checkpoints").iterdir()).stat().st_mtime_ns
        for job in jobs(name)
    }


def test_the_same_command_again_trains_only_what_is_missing(place, name, capsys):
    typed = ["-m", *SFT, f"sweep.name={name}", "run.seed=1,2"]
    command_line(capsys, *typed)
    before = trained_at(name)
    shutil.rmtree(place / f"runs/sft/{name}-seed_2")
    again = command_line(capsys, *typed)
    assert again.status == 0, again.err
    after = trained_at(name)
    assert after[f"{name}-seed_1"] == before[f"{name}-seed_1"] and after[f"{name}-seed_2"] > before[f"{name}-seed_2"]


def test_a_larger_grid_adds_to_a_named_sweep(place, name, capsys):
    command_line(capsys, "-m", *SFT, f"sweep.name={name}", "run.seed=1,2")
    before = trained_at(name)
    command_line(capsys, "-m", *SFT, f"sweep.name={name}", "run.seed=3,2")
    assert sorted(job.values["run.seed"] for job in jobs(name)) == ["1", "2", "3"]
    assert before.items() <= trained_at(name).items()


@pytest.mark.parametrize("change", [["train.max_steps=3"], ["optimizer.weight_decay=0.1"], ["data.train_path=other.jsonl"]])
def test_a_changed_job_of_a_named_sweep_is_run_anew_and_the_old_one_kept(change, place, name, capsys):
    command_line(capsys, "-m", *SFT, f"sweep.name={name}", "run.seed=1,2")
    again = command_line(capsys, "-m", *SFT, f"sweep.name={name}", "run.seed=1,2", *change)
    assert again.status == 0 and "run anew" in again.err
    assert change[0].partition("=")[0].rpartition(".")[2].replace("max_steps", "optimizer steps") in again.err
    for job in jobs(name):
        assert job.status == "completed" and (Path(f"{job.run_dir}.old1") / "summary.json").is_file()


def test_a_job_of_a_named_sweep_is_run_anew_when_its_start_has_changed(place, name, capsys):
    mid = ["stage=mid", *TINY, "init.from=scratch", "train.max_steps=1", f"run.name={name}", "run.resume=never"]
    sft = ["-m", "stage=sft", *TINY, "train.max_steps=1", f"init.from=runs/mid/{name}", f"sweep.name={name}", "run.seed=1,2"]
    command_line(capsys, *mid)
    assert command_line(capsys, *sft).status == 0
    before = trained_at(name)
    command_line(capsys, *sft)
    assert trained_at(name) == before
    command_line(capsys, *mid, "run.seed=5")
    assert command_line(capsys, *sft).status == 0
    assert all(at > before[run] for run, at in trained_at(name).items())


def rewrite(place: Path) -> list[str]:
    write_talk(place, "mine.jsonl", factor=7)
    return []


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda place: ["optimizer.lr_scale=30"], "optimizer.lr_scale 1.0 -> 30.0"),
        (lambda place: ["optimizer=adamw"], "optimizer"),
        (lambda place: ["data.val_path=other.jsonl"], "data.val_path None -> other.jsonl"),
        (lambda place: ["eval.max_tokens=64"], "eval.max_tokens None -> 64"),
        (lambda place: ["train.max_steps=1"], "steps"),
        (lambda place: ["run.seed=5"], "seed"),
        (lambda place: ["schedule=cosine"], "schedule"),
        (rewrite, "data"),
    ],
    ids=["optimizer", "other optimizer", "validation", "eval", "fewer steps", "seed", "schedule", "contents"],
)
def test_a_finished_run_is_not_the_answer_to_another_question(change, named, place, name, capsys):
    write_talk(place, "mine.jsonl")
    typed = [*SFT, "data.train_path=mine.jsonl", f"run.name={name}"]
    assert command_line(capsys, *typed).status == 0
    refused = command_line(capsys, *typed, *change(place))
    assert refused.status == 2, refused.err
    assert named in refused.message and "run.name" in refused.message


def test_a_finished_run_is_the_answer_where_only_speed_and_place_differ(place, name, capsys):
    typed = [*SFT, f"run.name={name}"]
    command_line(capsys, *typed)
    same = command_line(capsys, *typed, "train.device_batch_size=2", "log.every=2", "eval.batch_size=3", "checkpoint.keep=5")
    assert same.status == 0 and "nothing to do" in same.err


def test_what_a_run_began_with_counts_not_what_is_newest_when_it_resumes(place, name, capsys):
    """The run is cut short, another mid run is trained, and the run resumes: it is still that of the first mid run."""
    root = f"run.root={name}"
    mid, sft = (
        ["stage=mid", *TINY, root, "train.max_steps=1"],
        ["stage=sft", *TINY, root, "train.max_steps=4", f"run.name={name}"],
    )
    command_line(capsys, *mid, "init.from=scratch", "run.name=a")
    assert command_line(capsys, *sft, "train.stop_after=0.5").status == 0
    command_line(capsys, *mid, "init.from=scratch", "run.name=b", "run.seed=5")
    assert command_line(capsys, *sft).status == 0
    refused = command_line(capsys, *sft)
    assert refused.status == 2 and "mid/a" in refused.message and "mid/b" in refused.message


def test_a_run_that_resumed_under_other_settings_is_the_answer_to_neither(place, name, capsys):
    typed = [*SFT, "train.max_steps=4", f"run.name={name}"]
    command_line(capsys, *typed, "train.stop_after=0.5")
    assert command_line(capsys, *typed, "optimizer.lr_scale=3", "run.allow_change=[optimizer]").status == 0
    assert "3.0" in json.loads((place / f"runs/sft/{name}/summary.json").read_text())["changes"]
    for again in ([], ["optimizer.lr_scale=3"]):
        refused = command_line(capsys, *typed, *again)
        assert refused.status == 2 and "optimizer.lr_scale 1.0 -> 3.0" in refused.message


def test_a_damaged_record_of_a_run_or_a_sweep_is_said(place, name, capsys):
    typed = ["-m", *SFT, f"sweep.name={name}", "run.seed=1,2"]
    command_line(capsys, *typed)
    (place / f"runs/sft/{name}-seed_1/identity.json").write_text("{")
    assert "identity.json cannot be read" in command_line(capsys, *typed).err
    (place / f"runs/sweeps/{name}/sweep.json").write_text("{")
    refused = command_line(capsys, *typed)
    assert refused.status == 2 and "sweep.json cannot be read" in refused.message


def test_one_more_value_of_a_named_sweep_joins_the_others(place, name, capsys):
    command_line(capsys, "-m", *SFT, f"sweep.name={name}", "run.seed=1,2")
    assert command_line(capsys, "-m", *SFT, f"sweep.name={name}", "run.seed=3").status == 0
    found = {job.values["run.seed"]: job for job in jobs(name)}
    assert sorted(found) == ["1", "2", "3"] and len({job.num for job in found.values()}) == 3
    assert all(Path(job.run_dir or "").name == f"{name}-seed_{seed}" for seed, job in found.items())


def test_a_command_that_reads_runs_leaves_their_sweep_alone(place, name, capsys):
    command_line(capsys, "-m", *SFT, f"sweep.name={name}", "run.seed=1,2")
    before = contents(place / "runs/sweeps")
    read = command_line(capsys, "-m", "command=evaluate", f"init.from=sft/{name}-seed_1,sft/{name}-seed_2", "tracking=none")
    assert read.status == 0, read.err
    assert contents(place / "runs/sweeps") == before


def test_a_sweep_that_runs_is_not_begun_twice(place, name, capsys):
    command_line(capsys, "-m", *SFT, f"sweep.name={name}", "run.seed=1,2")
    with (place / f"runs/sweeps/{name}/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused = command_line(capsys, "-m", *SFT, f"sweep.name={name}", "run.seed=1,2")
    assert refused.status == 2 and "another process" in refused.message


# --- side by side, and stopped ---------------------------------------------------------------------------------------


def test_jobs_side_by_side_give_the_numbers_of_jobs_one_by_one(place, name, capsys):
    typed = ["-m", "stage=mid,sft", *TINY, "train.max_steps=2", "run.seed=1,2", "optimizer.lr_scale=1"]
    assert command_line(capsys, *typed, f"run.name={name}", "init.from=scratch").status == 0
    beside = process(*typed, f"run.name={name}beside", "init.from=scratch", "sweep.jobs=2")
    assert beside.status == 0, beside.err
    assert [job.objective for job in jobs(name)] == [job.objective for job in jobs(f"{name}beside")]
    for job in jobs(f"{name}beside")[2:]:  # each sft from its own mid
        started = json.loads((Path(job.run_dir or "") / "summary.json").read_text())["init"]
        assert f"/mid/{name}beside-seed_{job.values['run.seed']}/" in started


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_sweep_loses_nothing_finished_and_goes_on(signum, place, name, capsys):
    typed = ["-m", *SFT, "train.max_steps=400", "checkpoint.every=5", "eval.every=null", f"sweep.name={name}", "run.seed=1,2,3"]
    command = [sys.executable, "-m", "chattrain", *typed, "sweep.jobs=2"]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 120
    saved = [place / f"runs/sft/{name}-seed_{seed}/checkpoints" for seed in (1, 2)]
    while time.monotonic() < deadline and not all(folder.is_dir() for folder in saved):
        time.sleep(0.02)
    os.kill(running.pid, signum)
    _, err = running.communicate(timeout=120)
    assert running.returncode == (130 if signum == signal.SIGINT else -signal.SIGKILL), err
    wait_for_workers(saved)
    done = command_line(capsys, *typed)
    assert done.status == 0, done.err
    assert "resuming from" in done.err
    assert [(job.status, job.steps) for job in jobs(name)] == [("completed", 400)] * 3
    for job in jobs(name):
        assert [r["step"] for r in metrics(job.run_dir or "") if "train/loss" in r] == [*range(1, 401)]


INTERRUPTING = """
import os, signal, traceback


def schedule(step, num_steps, **settings):
    if step == num_steps - 1 and any(frame.name == "fit" for frame in traceback.extract_stack()):
        os.kill(os.getpid(), signal.SIGINT)
    return 1.0
"""


def test_a_signal_in_the_last_step_of_a_job_ends_the_sweep_and_the_job_is_complete(place, name, monkeypatch):
    (place / "interrupting.py").write_text(INTERRUPTING)
    monkeypatch.setenv("PYTHONPATH", f"{place}:{os.environ.get('PYTHONPATH', '')}")
    done = process("-m", *SFT, f"sweep.name={name}", "run.seed=1,2", "schedule._target_=interrupting.schedule")
    assert done.status == 130 and "the same command goes on" in done.err
    assert "give the same command again" not in done.err  # one advice
    assert [(job.status, job.steps) for job in jobs(name)] == [("completed", 2), ("waiting", None)]


def wait_for_workers(saved: list[Path]) -> None:
    """Until the workers of a killed launch, which save and end, have written nothing for a second."""
    before: list[list[str]] = []
    while before != (now := [sorted(f.name for f in folder.iterdir()) for folder in saved]):
        before = now
        time.sleep(1)


def test_the_outcomes_of_jobs_are_not_left_behind(place, name, capsys):
    command_line(capsys, "-m", *SFT, f"run.name={name}", "run.seed=1,2")
    assert read_outcomes(place / "runs/sweeps" / name) == []
