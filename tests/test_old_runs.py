"""Runs of version 0.1.0 go on: resumed, evaluated, talked to, exported.

They lie in old_runs/ as they were after 4 of 8 steps, with the metrics of all 8.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import chattrain
from tests.helpers import TINY, metrics, write_talk

OLD = Path(__file__).parent / "old_runs"
SIZES = ["model.n_layer=1", "model.n_embd=32", "tokenizer.vocab_size=280", "train.max_steps=8", "checkpoint.every=4"]
RUNS = {
    "mid/packed": [],
    "sft/masked": ["optimizer=adamw", "init.from=scratch"],
    "sft/best_fit": ["collator=best_fit", "init.from=scratch"],
}


@pytest.fixture
def old_run(request, workplace) -> tuple[Path, list[str]]:
    """A copy of an old run, and the command line that began it."""
    write_talk(workplace)
    shutil.copytree(OLD / request.param, workplace / "runs" / request.param)
    stage, name = request.param.split("/")
    return workplace / "runs" / request.param, [*TINY, *SIZES, f"stage={stage}", f"run.name={name}", *RUNS[request.param]]


def losses(run_dir: Path) -> dict[int, float]:
    return {row["step"]: row["train/loss"] for row in metrics(run_dir) if "train/loss" in row}


@pytest.mark.parametrize("old_run", RUNS, indirect=True)
def test_an_old_run_goes_on_to_the_losses_that_it_had(old_run):
    run_dir, typed = old_run
    expected = losses(run_dir)
    summary = chattrain.run(typed)
    assert (summary["status"], summary["steps"]) == ("completed", 8) and "(resumed)" in summary["init"]
    assert losses(run_dir) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("old_run", RUNS, indirect=True)
def test_an_old_run_is_evaluated_talked_to_and_exported(old_run):
    run_dir, typed = old_run
    start = f"init.from={run_dir}"
    found = chattrain.run([*typed, "command=evaluate", start])
    assert Path(found["checkpoint"]).name == "step_000004" and found["metrics"]["val/loss"] > 0
    assert len(chattrain.run([*typed, "command=chat", start, "chat.prompt=[hello]"])["replies"]) == 1
    exported = chattrain.run([*typed, "command=export", start])
    assert json.loads((Path(exported["folder"]) / "config.json").read_text())["model_type"] == "nanochat"


@pytest.mark.parametrize("old_run", ["sft/masked"], indirect=True)
def test_an_old_name_of_a_part_means_the_same_part(old_run):
    _, typed = old_run
    summary = chattrain.run([*typed, "collator._target_=chattrain.data.collators.Masked"])
    assert (summary["status"], summary["steps"]) == ("completed", 8)
