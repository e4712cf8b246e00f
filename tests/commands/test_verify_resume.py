"""command=verify_resume on configurations that resume exactly, and on one that does not."""

from __future__ import annotations

import json

import pytest

from tests.helpers import TINY, process, write_talk


@pytest.fixture
def place(workplace):
    write_talk(workplace)
    return workplace


ARGUMENTS = ["command=verify_resume", *TINY, "init.from=scratch", "verify.steps=12", "eval.every=5"]


@pytest.mark.parametrize(
    "chosen",
    [
        ["stage=mid"],
        ["stage=sft", "optimizer=adamw", "collator=best_fit", "loss.prompt_weight=0.5"],
        pytest.param(["stage=sft", "distributed.nproc=2"], marks=pytest.mark.slow),
    ],
    ids=["packed", "best_fit", "two_ranks"],
)
def test_a_configuration_that_resumes_exactly_is_told_so(place, chosen):
    """12 steps of 4 rows go beyond the end of an epoch of 57 conversations in none of them; the run is killed anywhere."""
    outcome = process(*ARGUMENTS, *chosen)
    assert outcome.status == 0, outcome.err
    found = json.loads(outcome.out.splitlines()[-1])
    assert found["equal"] and found["tensors"] > 10 and found["metric_lines"] >= 12 and found["largest_deviation"] == 0
    assert 1 <= found["killed_after"] <= 12
    assert list((place / "runs").iterdir()) == []


def test_a_configuration_that_cannot_train_is_told_so_in_one_line(place):
    outcome = process(*ARGUMENTS, "stage=sft", "data.train_path=nowhere.jsonl")
    assert outcome.status == 1 and "nowhere.jsonl" in outcome.message


def test_a_run_that_is_not_resumed_exactly_fails(place):
    """A part of the user's own that counts its calls in its process gives other learning rates after the resume."""
    (place / "mine.py").write_text(
        "calls = 0\n\n\ndef factor(step, num_steps):\n    global calls\n    calls += 1\n    return 1 / (1 + calls)\n"
    )
    (place / "conf" / "schedule").mkdir(parents=True)
    (place / "conf" / "schedule" / "counting.yaml").write_text("_target_: mine.factor\n")
    outcome = process("--config-dir", "conf", *ARGUMENTS, "stage=sft", "schedule=counting")
    assert outcome.status == 1, outcome.err
    assert "the resumed run differs" in outcome.message
