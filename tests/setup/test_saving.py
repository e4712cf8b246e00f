"""Checkpoints by time, by signal and by a metric, and what the next stage takes."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from chattrain.config.run import CheckpointConfig
from chattrain.errors import UserError
from chattrain.setup.saving import Best
from chattrain.storage import checkpoint
from tests.helpers import TINY, metrics, train, write_talk


@pytest.fixture
def place(workplace):
    write_talk(workplace)
    return workplace


def steps(summary: dict) -> list[int]:
    return [checkpoint.load_state(folder).step for folder in checkpoint.all_checkpoints(Path(summary["run_dir"]))]


def test_a_run_without_checkpoint_every_saves_by_time(place):
    often = train("sft", "often", "init.from=scratch", "train.max_steps=4", "checkpoint.minutes=1e-9", "checkpoint.keep=9")
    assert steps(often) == [1, 2, 3, 4]
    assert steps(train("sft", "rarely", "init.from=scratch", "train.max_steps=4", "checkpoint.keep=9")) == [4]


@pytest.mark.parametrize("metric, better", [("val/loss", min), ("val/bpb", min)])
def test_the_best_is_kept_besides_the_newest_and_the_next_stage_can_start_from_it(place, metric, better):
    """A learning rate that ruins the model after some steps: the best is not the last."""
    settings = [
        "train.max_steps=6",
        "eval.every=1",
        "checkpoint.keep=1",
        "optimizer.lr_scale=40",
        f"checkpoint.keep_best={metric}",
    ]
    summary = train("mid", "best", "init.from=scratch", *settings)
    values = {row["step"]: row[metric] for row in metrics(summary["run_dir"]) if metric in row and row["step"]}
    best = better(values, key=values.get)
    assert steps(summary) == sorted({best, 6})
    folder, found = checkpoint.best(Path(summary["run_dir"]))
    assert (checkpoint.load_state(folder).step, found["value"]) == (best, values[best])
    for pick, step in (("best", best), ("last", 6)):
        after = train("sft", pick, f"init.pick={pick}", "train.max_steps=1", "init.strict=true")
        assert after["init"].endswith(f"step_{step:06d}")


def test_a_value_that_is_no_number_and_the_model_of_the_start_are_never_the_best():
    best = Best(CheckpointConfig(keep_best="val/loss"), None)
    values = [1.0, math.nan, 5.0, math.nan, 6.0, 4.0, -math.inf]
    assert [best.improves(step, {"val/loss": value}) for step, value in enumerate(values)] == [
        False,
        False,
        True,
        False,
        False,
        True,
        False,
    ]
    assert best.at(5) == {"metric": "val/loss", "value": 4.0, "maximize": False} and best.at(6) is None


def test_the_best_of_a_resumed_run_is_the_best_of_all(place):
    """After the resume everything is worse, at a rate that ruins the model: the checkpoint of before stays."""
    settings = ["init.from=scratch", "train.max_steps=8", "eval.every=1", "checkpoint.keep=1", "checkpoint.keep_best=val/loss"]
    first = train("mid", "both", *settings, "train.stop_after=0.5")
    best = checkpoint.best(Path(first["run_dir"]))
    second = train("mid", "both", *settings, "optimizer.lr_scale=1000", "run.allow_change=[optimizer]")
    values = {row["step"]: row["val/loss"] for row in metrics(second["run_dir"]) if "val/loss" in row and row["step"]}
    assert min(values, key=values.get) <= 4 and checkpoint.best(Path(second["run_dir"])) == best


@pytest.mark.parametrize(
    "given, words",
    [
        (["checkpoint.keep_best=val/accuracy"], "is not measured; measured are val/loss"),
        (["checkpoint.direction=maximize"], r"no effect without checkpoint\.keep_best"),
        (["checkpoint.minutes=0"], "must be above 0"),
    ],
)
def test_what_cannot_be_kept_is_refused(place, given, words):
    with pytest.raises(UserError, match=words):
        train("sft", "wrong", "init.from=scratch", "train.max_steps=1", *given)


def test_to_pick_the_best_of_a_run_that_kept_none_is_refused(place):
    train("mid", "plain", "init.from=scratch", "train.max_steps=1")
    with pytest.raises(UserError, match=r"checkpoint\.keep_best"):
        train("sft", "after", "init.pick=best", "train.max_steps=1")


@pytest.mark.parametrize("nproc", [1, 2])
def test_sigusr1_saves_and_the_run_goes_on(place, nproc):
    arguments = ["stage=sft", *TINY, "init.from=scratch", "run.name=asked", "train.max_steps=400", "checkpoint.keep=99"]
    command = [sys.executable, "-m", "chattrain", *arguments, f"distributed.nproc={nproc}", "eval=none"]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    saved = threading.Event()
    for line in running.stderr:
        if line.startswith("step 20/"):
            os.kill(running.pid, signal.SIGUSR1)
            saved.set()
    assert running.wait() == 0 and saved.is_set()
    summary = json.loads((place / "runs/sft/asked/summary.json").read_text())
    between, last = steps(summary)
    assert 20 <= between < last == 400
