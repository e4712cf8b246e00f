"""Several processes from one command: our own launch, inside `-m`, and torchrun. Numbers are in test_equivalence.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from chattrain.errors import RunFailed, UserError
from tests.helpers import TINY, Outcome, command_line, metrics, train, write_talk

TWO = [o for o in TINY if not o.startswith(("distributed.", "train.device_batch", "tracking"))] + [
    "train.device_batch_size=2",
    "train.max_steps=2",
    "init.from=scratch",
]


@pytest.fixture
def place(workplace):
    write_talk(workplace)
    return workplace


def summaries(place) -> list[dict]:
    return [json.loads(file.read_text()) for file in sorted((place / "runs").glob("*/*/summary.json"))]


def mlflow_runs(place) -> int:
    import sqlite3

    with sqlite3.connect(place / "runs" / "mlflow.db") as store:
        return store.execute("select count(*) from runs").fetchone()[0]


def test_one_command_with_two_processes_is_one_run_in_every_job_of_a_sweep(place, capsys):
    done = command_line(capsys, "-m", "stage=mid", *TWO, "distributed.nproc=2", "optimizer.lr_scale=1,0.5", "tracking=mlflow")
    assert done.status == 0, done.err
    runs = summaries(place)
    assert [run["status"] for run in runs] == ["completed"] * 2 and mlflow_runs(place) == 3  # and the sweep's
    for run in runs:
        trained = [line["step"] for line in metrics(run["run_dir"]) if "train/loss" in line]
        assert trained == [1, 2]
        assert os.path.isdir(run["checkpoint"])


def torchrun(*arguments: str) -> Outcome:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "chattrain", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def test_torchrun_starts_the_same_single_run(place):
    done = torchrun("stage=sft", *TWO, "tracking=mlflow")
    assert done.status == 0, done.err
    (run,) = summaries(place)
    assert run["status"] == "completed" and run["steps"] == 2 and mlflow_runs(place) == 1
    assert done.err.count("starting from") == 1  # one process speaks


def under_torchrun(capsys, monkeypatch, *arguments: str) -> list[Outcome]:
    """What the command says as each of two processes that torchrun starts."""
    said = []
    for rank in ("0", "1"):
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)
        said.append(command_line(capsys, *arguments))
    return said


def test_torchrun_and_distributed_nproc_must_agree(place, capsys, monkeypatch):
    first, second = under_torchrun(capsys, monkeypatch, "stage=sft", *TWO, "distributed.nproc=3")
    assert first.status != 0 and first.message.startswith("distributed.nproc=3")
    assert second.status != 0 and "chattrain: " not in second.err  # one process speaks
    assert not (place / "runs").exists()


def test_a_mistake_is_found_before_processes_are_started(place):
    with pytest.raises(UserError, match=r"rows_per_step=4 .*3 ranks"):
        train("sft", "odd", "distributed.nproc=3", "train.device_batch_size=1")
    assert not (place / "runs").exists()


def test_what_goes_wrong_in_all_ranks_is_said_as_in_one(place):
    with pytest.raises(RunFailed, match="non-finite"):
        train(
            "mid",
            "diverged",
            "distributed.nproc=2",
            "train.device_batch_size=2",
            "optimizer.lr_scale=1e39",
            "train.max_steps=9",
            "init.from=scratch",
        )
    (run,) = summaries(place)
    assert run["status"] == "failed" and "non-finite" in run["error"]


def test_one_ctrl_c_stops_two_ranks_with_a_checkpoint(place):
    """A terminal sends it to the launcher and to both ranks at once."""
    long = [o for o in TWO if not o.startswith("train.max_steps")] + ["train.max_steps=100000", "run.name=cut", "tracking=none"]
    running = subprocess.Popen(
        [sys.executable, "-m", "chattrain", "stage=mid", *long, "distributed.nproc=2"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    file = place / "runs/mid/cut/metrics.jsonl"
    deadline = time.monotonic() + 120
    while running.poll() is None and time.monotonic() < deadline and not (file.exists() and '"step": 5,' in file.read_text()):
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGINT)
    _, err = running.communicate(timeout=120)
    assert running.returncode == 130, err
    (run,) = summaries(place)
    assert run["status"] == "interrupted" and run["checkpoint"].endswith(f"step_{run['steps']:06d}")


def test_a_sweep_under_torchrun_is_refused(place, capsys, monkeypatch):
    first, second = under_torchrun(capsys, monkeypatch, "-m", "stage=sft", *TWO, "optimizer.lr_scale=1,0.5")
    assert first.status != 0 and first.message.startswith("-m starts one run after another")
    assert second.status != 0 and "chattrain: " not in second.err
