"""A sweep gives one run a job however it is written, and each job returns its objective."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from chattrain.tracking.sweep_record import SweepRecord
from tests.helpers import command_line, contents, metrics
from tests.sweeps.common import SFT, jobs

IN_YAML = """# @package _global_
hydra:
  mode: MULTIRUN
  sweeper:
    params:
      optimizer.lr_scale: 0.5,1
"""


def own_yaml(place: Path, group: str, name: str, text: str) -> list[str]:
    """The arguments that find a YAML file of the user's."""
    file = place / "my_conf" / group / f"{name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return ["--config-dir", str(place / "my_conf")]


# --- however it is written -------------------------------------------------------------------------------------------


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


def test_values_to_sweep_in_a_single_run_are_refused(place, name, capsys):
    where = own_yaml(place, "experiment", "no_mode", IN_YAML.replace("  mode: MULTIRUN\n", ""))
    before = contents(place)
    refused = command_line(capsys, *where, "experiment=no_mode", *SFT)
    assert refused.status == 2 and "optimizer.lr_scale" in refused.message and "add -m" in refused.message
    assert contents(place) == before
    assert command_line(capsys, *where, "experiment=no_mode", *SFT, "hydra.mode=RUN", f"run.name={name}").status == 0


@pytest.mark.parametrize(
    "hydra, named",
    [
        ("hydra: { mode: MULTIRUN, sweeper: { params: { optimizer.lr_scale: [0.5, 1] } } }", ["`optimizer.lr_scale: 0.5,1`"]),
        ("hydra: { sweep: { dir: elsewhere } }", ["hydra.sweep.dir", "run.root"]),
        ("hydra: { run: { dir: elsewhere } }", ["hydra.run.dir", "run.root"]),
        ("hydra: { job: { chdir: true } }", ["hydra.job.chdir", "run.root"]),
    ],
)
def test_keys_of_hydra_in_yaml_that_have_no_effect_are_refused(hydra, named, place, capsys):
    where = own_yaml(place, "experiment", "no_effect", f"# @package _global_\n{hydra}\n")
    before = contents(place)
    refused = command_line(capsys, *where, "experiment=no_effect", *SFT)
    assert refused.status == 2 and all(part in refused.message for part in named), refused.err
    assert contents(place) == before


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
        (["sweep.name=" + 120 * "ä", "-m"], ["sweep.name", "240 bytes", "200"]),
        (["-m", "run.seed=1,2", "run.name=" + 250 * "a"], ["run.name", "250 bytes", "200"]),
        (["run.name='two\nlines'"], ["run.name", "no name of a folder"]),
        (["-m", "optimizer.lr_scale=tag(log, interval(0.1, 1))"], ["interval", "hydra/sweeper=optuna"]),
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


def test_names_of_runs_can_be_swept(place, name, capsys):
    done = command_line(capsys, "-m", *SFT, f"run.name={name}a,{name}b", "run.seed=1,2")
    assert done.status == 0, done.err
    found = {run.name for run in (place / "runs/sft").glob(f"{name}*")}
    assert found == {f"{name}{letter}-seed_{seed}" for letter in "ab" for seed in "12"}


def test_alternative_keys_are_settled_in_a_sweep_written_in_yaml_too(place, name, capsys):
    text = IN_YAML.replace("optimizer.lr_scale: 0.5,1", "train.max_steps: 1,2")
    where = own_yaml(place, "experiment", "steps", text)
    done = command_line(capsys, *where, "experiment=steps", *(o for o in SFT if "max_steps" not in o), f"run.name={name}")
    assert done.status == 0, done.err
    assert [job.steps for job in jobs(name)] == [1, 2]


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
    assert done.status == 1 and done.err.count("non-finite") == 1 and "Error executing job" not in done.err
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
