"""A sweep gives one run a job however it is written, goes on where it was, and never passes another run off as the answer."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import pytest
from safetensors.torch import load_file

from chattrain.sweeps.record import read_outcomes
from chattrain.tracking.sweep_record import JobRecord, SweepRecord
from tests.helpers import TINY, command_line, contents, metrics, process, standing_in, write_talk

SFT = ["stage=sft", *TINY, "init.from=scratch", "train.max_steps=2", "eval.every=1"]
NAMES = (f"sweep{number}" for number in count())


@pytest.fixture(scope="module")
def place(tmp_path_factory, cache):
    folder = tmp_path_factory.mktemp("place")
    with standing_in(folder, cache):
        write_talk(folder)
        write_talk(folder, "other.jsonl", factor=4)
        yield folder


@pytest.fixture
def name() -> str:
    """A name that no other test has."""
    return next(NAMES)


def jobs(name: str) -> list[JobRecord]:
    return SweepRecord.read(Path("runs/sweeps") / name).jobs


def own_yaml(place: Path, group: str, name: str, text: str) -> list[str]:
    """The arguments that find a YAML file of the user's."""
    file = place / "my_conf" / group / f"{name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return ["--config-dir", str(place / "my_conf")]


# --- however it is written -------------------------------------------------------------------------------------------

IN_YAML = """# @package _global_
hydra:
  mode: MULTIRUN
  sweeper:
    params:
      optimizer.lr_scale: 0.5,1
"""


@pytest.mark.parametrize(
    "written",
    [
        ["-m", "optimizer.lr_scale=0.5,1"],
        ["train.compile=false", "--multirun", "optimizer.lr_scale=0.5,1"],
        ["hydra.mode=MULTIRUN", "optimizer.lr_scale=0.5,1"],
        ["-m", "optimizer.lr_scale=range(0.5,1.1,step=0.5)"],
        ["-m", "optimizer.lr_scale=choice(0.5,1)"],
    ],
    ids=["-m", "-m in the middle", "mode", "range", "choice"],
)
def test_each_value_is_a_run_of_its_own(written, place, name, capsys):
    done = command_line(capsys, *SFT, f"run.name={name}", *written)
    assert done.status == 0, done.err
    found = {job.values["optimizer.lr_scale"]: job for job in jobs(name)}
    assert sorted(map(float, found)) == [0.5, 1.0]
    assert len({job.run_dir for job in found.values()}) == 2
    assert all(job.status == "completed" and Path(job.run_dir or "").is_dir() for job in found.values())


@pytest.mark.parametrize("flags", [[], ["-m"]])
def test_a_sweep_committed_as_yaml_is_one(flags, place, name, capsys):
    where = own_yaml(place, "experiment", "rates", IN_YAML)
    done = command_line(capsys, *flags, *where, "experiment=rates", *SFT, f"run.name={name}")
    assert done.status == 0, done.err
    assert len({job.objective for job in jobs(name)}) == len({job.run_dir for job in jobs(name)}) == 2


def test_values_to_sweep_in_a_single_run_are_refused(place, capsys):
    where = own_yaml(place, "experiment", "no_mode", IN_YAML.replace("  mode: MULTIRUN\n", ""))
    before = contents(place)
    refused = command_line(capsys, *where, "experiment=no_mode", *SFT)
    assert refused.status == 2 and "optimizer.lr_scale" in refused.message and "add -m" in refused.message
    assert contents(place) == before
    assert command_line(capsys, *where, "experiment=no_mode", *SFT, "hydra.mode=RUN", f"run.name={next(NAMES)}").status == 0


def test_a_group_and_a_list_are_swept(place, name, capsys):
    done = command_line(
        capsys, "-m", *SFT, f"run.name={name}", "schedule=linear,cosine", "data.train_path=[talk.jsonl],[other.jsonl]"
    )
    assert done.status == 0, done.err
    names = [Path(job.run_dir or "").name for job in jobs(name)]
    assert len(set(names)) == 4 and sum("cosine" in n for n in names) == 2


@pytest.mark.parametrize(
    "typed, named",
    [
        (["-m", "optimizer.lr_scale=1,1"], ["lr_scale=1", "twice"]),
        (["-m", "run.dir=one", "run.seed=1,2"], ["run.dir", "run.name"]),
        (["hydra.run.dir=elsewhere"], ["hydra.run.dir", "run.root"]),
        (["-m", "hydra.sweep.dir=elsewhere", "run.seed=1,2"], ["hydra.sweep.dir", "run.root"]),
        (["-m", "hydra.sweep.subdir=x", "run.seed=1,2"], ["hydra.sweep.subdir", "sweep.name"]),
        (["hydra.job.chdir=true"], ["hydra.job.chdir", "run.root"]),
        (["-m", "run.seed=1,2", "sweep.gpus_per_job=64"], ["sweep.gpus_per_job=64", "sweep.jobs"]),
        (["-m", "stage=mid,sft", "sweep.prune=2"], ["sweep.prune=2", "one stage"]),
        (["-m", "run.seed=1,2", "train.max_step=3"], ["train.max_step", "train.max_steps"]),
        (["sweep.jobs=2"], ["sweep.jobs", "-m"]),
        (["-m", "run.seed=1,2", "run.name=a/b"], ["run.name=a/b"]),
        (["command=evaluate", "sweep.name=nosuch"], ["sweep.name", "-m"]),
        (["-m", "run.seed=1,2", "sweep.jobs=2", "hydra/launcher=submitit_local"], ["sweep.jobs", "submitit_local"]),
        (["sweep.jobs=0", "-m"], ["sweep.jobs=0", "1 or more"]),
        (["sweep.name=a/b", "-m"], ["sweep.name=a/b"]),
    ],
)
def test_what_cannot_be_swept_is_refused_before_anything_is_written(typed, named, place, capsys):
    before = contents(place)
    refused = command_line(capsys, *(o for o in SFT if not (o.startswith("stage") and "prune" in str(typed))), *typed)
    assert refused.status == 2
    assert all(part in refused.message for part in named), refused.message
    assert contents(place) == before


def test_a_long_value_makes_a_short_name(place, name, capsys):
    deep = place / "d" / ("a" * 120) / ("b" * 120)
    deep.mkdir(parents=True, exist_ok=True)
    paths = [shutil.copy(place / "talk.jsonl", deep / f"{letter}.jsonl") for letter in "xy"]
    done = command_line(capsys, "-m", *SFT, f"run.name={name}", f"data.train_path={paths[0]},{paths[1]}")
    assert done.status == 0, done.err
    names = sorted(Path(job.run_dir or "").name for job in jobs(name))
    assert len(names) == 2 and all(len(n) < 60 and "=" not in n for n in names)
    assert "x.jsonl" in names[0] and "y.jsonl" in names[1]
    rows = [line for line in done.out.splitlines() if line.endswith("completed") or "completed" in line]
    assert all(f"{job.objective:.4f}" in done.out for job in jobs(name)) and len(rows) == 2  # the table has its numbers


def test_a_refused_job_shows_nothing_of_the_run_that_is_in_its_folder(place, name, capsys):
    command_line(capsys, "-m", *SFT, f"run.name={name}", "run.seed=1,2")
    measured = {f"{job.objective:.4f}" for job in jobs(name)}
    table = command_line(capsys, "-m", *SFT, f"run.name={name}", "run.seed=1,2", "optimizer.lr_scale=30").out
    assert table.count("failed: ") == 2 and "peak lr" not in table
    assert not any(value in table for value in measured)


# --- what a job returns ----------------------------------------------------------------------------------------------


def test_the_objective_is_the_last_value_of_the_stages_metric(place, name, capsys):
    command_line(capsys, "-m", *SFT, f"run.name={name}", "run.seed=1,2")
    command_line(capsys, "-m", *SFT, f"run.name={name}b", "run.seed=1,2", "sweep.objective=val/bpb")
    for sweep, metric in ((name, "val/loss"), (f"{name}b", "val/bpb")):
        assert SweepRecord.read(Path("runs/sweeps") / sweep).objective == metric
        for job in jobs(sweep):
            assert job.objective == metrics(job.run_dir or "")[-1][metric]


WATCHER = """
from hydra.experimental.callback import Callback


class Watch(Callback):
    def on_job_end(self, config, job_return, **kwargs):
        with open("seen.txt", "a") as file:
            file.write(f"{job_return.status.name} {job_return._return_value}\\n")
"""


def test_a_failed_job_is_a_failure_for_hydra_and_the_others_go_on(place, name, capsys, monkeypatch):
    (place / "watcher.py").write_text(WATCHER)
    monkeypatch.syspath_prepend(str(place))
    (place / "seen.txt").unlink(missing_ok=True)
    done = command_line(
        capsys,
        "-m",
        *SFT,
        "stage=mid",
        "train.max_steps=4",
        f"run.name={name}",
        "optimizer.lr_scale=1e39,1",
        "+hydra.callbacks.watch._target_=watcher.Watch",
    )
    assert done.status == 1 and "non-finite" in done.err
    failed, fine = jobs(name)
    assert failed.status == "failed" and "non-finite" in (failed.error or "") and failed.objective is None
    assert fine.status == "completed"
    seen = (place / "seen.txt").read_text().splitlines()
    assert seen[0].startswith("FAILED") and seen[-1] == f"COMPLETED {fine.objective}"


def test_optuna_searches_by_what_jobs_return(place, name, capsys):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    search = [*SFT, "hparams_search=lr_optuna", f"sweep.name={name}", "hydra.sweeper.n_trials=3"]
    done = command_line(capsys, *search)
    assert done.status == 0, done.err
    assert len({job.objective for job in jobs(name)}) == 3
    wrong = command_line(capsys, *search, "sweep.objective=eval/some_acc")
    assert wrong.status == 2 and "direction=maximize" in wrong.message
    missing = command_line(capsys, *search, "sweep.objective=val/nothing", f"run.name={name}2")
    assert missing.status == 1 and "val/nothing was not measured" in missing.err


def test_pruned_jobs_stop_and_the_winner_is_the_run_that_it_would_have_been(place, name, capsys):
    typed = ["-m", *SFT, "train.max_steps=4", "optimizer.lr_scale=0.5,1,2,40"]
    assert command_line(capsys, *typed, f"run.name={name}", "sweep.prune=2").status == 0
    assert command_line(capsys, *typed, f"run.name={name}whole").status == 0
    pruned, whole = jobs(name), jobs(f"{name}whole")
    assert [job.steps for job in pruned] == [1, 1, 2, 4]
    assert [job.status for job in pruned] == ["pruned", "pruned", "pruned", "completed"]
    winner, alone = (load_file(Path(r[-1].run_dir or "") / "checkpoints/step_000004/model.safetensors") for r in (pruned, whole))
    assert all(winner[part].equal(alone[part]) for part in alone)
    assert pruned[-1].objective == whole[-1].objective


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
    assert command_line(capsys, *typed, "optimizer.lr_scale=3").status == 0
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


def test_names_of_runs_can_be_swept(place, name, capsys):
    done = command_line(capsys, "-m", *SFT, f"run.name={name}a,{name}b", "run.seed=1,2")
    assert done.status == 0, done.err
    found = {run.name for run in (place / "runs/sft").glob(f"{name}*")}
    assert found == {f"{name}{letter}-seed_{seed}" for letter in "ab" for seed in "12"}


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


def test_alternative_keys_are_settled_in_a_sweep_written_in_yaml_too(place, name, capsys):
    text = IN_YAML.replace("optimizer.lr_scale: 0.5,1", "train.max_steps: 1,2")
    where = own_yaml(place, "experiment", "steps", text)
    done = command_line(capsys, *where, "experiment=steps", *(o for o in SFT if "max_steps" not in o), f"run.name={name}")
    assert done.status == 0, done.err
    assert [job.steps for job in jobs(name)] == [1, 2]


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
