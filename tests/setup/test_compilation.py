"""train.compile=auto compiles where the planned steps gain by it; the decision is made once, and a resumed run keeps it."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from chattrain.config.compose import compose
from chattrain.device import can_compile
from chattrain.errors import UserError
from chattrain.setup.compilation import PlannedWork, choose
from chattrain.setup.plan import setup_run
from tests.helpers import TINY, train

needs_compiler = pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="no C++ compiler for torch.compile")
NEW = ["init.from=scratch", "eval=none"]
FEW, MANY = "train.max_steps=4", "train.max_steps=10000000"
LAPTOP = PlannedWork("cpu", processors=2, num_steps=0, tokens=0, passes=1, n_layer=4, n_embd=128)
GPU = PlannedWork("cuda", processors=1, num_steps=0, tokens=0, passes=1, n_layer=20, n_embd=1280)


def planned(work: PlannedWork, steps: int, tokens: int) -> bool:
    """The decision for `steps` of `tokens` tokens each."""
    return choose(replace(work, num_steps=steps, tokens=steps * tokens)).on


@pytest.fixture
def as_if_compiled():
    """What is compiled runs uncompiled, in no time; all else is as in a compiled run."""
    with torch._dynamo.config.patch(disable=True):
        yield


def decided(*overrides: str) -> bool:
    """What a run of this command line would do, without training."""
    setup, _ = setup_run(compose(["stage=mid", *TINY, *NEW, "train.compile=auto", *overrides]), world_size=1)
    return setup.compilation.on


def begin(name: str, *overrides: str) -> dict:
    return train("mid", name, *NEW, *overrides)


@pytest.mark.parametrize("work, tokens", [(LAPTOP, 4096), (GPU, 65_536)])
def test_many_steps_are_compiled_and_few_are_not(work, tokens):
    assert planned(work, 100_000, tokens) and not planned(work, 10, tokens)


def test_more_cores_need_more_steps():
    assert planned(LAPTOP, 2000, 4096) and not planned(replace(LAPTOP, processors=200), 2000, 4096)


def test_a_gpu_that_waits_for_launches_compiles_whatever_the_size_of_its_batches():
    assert planned(replace(GPU, n_layer=4, n_embd=128), 10_000, 64)


def test_the_reason_names_the_steps_and_what_they_gain():
    assert "of the 10 steps planned" in choose(replace(GPU, num_steps=10, tokens=655_360)).reason


@needs_compiler
def test_the_planned_steps_of_a_run_decide(place):
    assert decided("run.name=many", MANY) and not decided("run.name=few", FEW)


@needs_compiler
def test_the_decision_is_that_of_the_whole_run_where_a_part_of_it_runs_now(place):
    assert decided("run.name=part", MANY, "train.stop_after=0.0000001")


@needs_compiler
def test_the_decision_does_not_depend_on_the_threads_of_a_rank(place, monkeypatch):
    before = torch.get_num_threads()
    try:
        for threads in (1, 7):
            torch.set_num_threads(threads)
            monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
            assert decided(f"run.name=threads{threads}", MANY)
    finally:
        torch.set_num_threads(before)


def test_where_nothing_can_compile_auto_does_not(place, monkeypatch):
    monkeypatch.setenv("PATH", os.devnull)
    assert not decided("run.name=bare", MANY)
    assert not decided("run.name=bare", MANY, "train.compile=true")


@needs_compiler
def test_what_is_given_wins(place):
    assert decided("run.name=yes", FEW, "train.compile=true") and not decided("run.name=no", MANY, "train.compile=false")


@needs_compiler
def test_a_resumed_run_keeps_the_decision_though_few_steps_remain(place, as_if_compiled, caplog):
    begun = begin("kept", "train.compile=auto", MANY, "train.stop_after=0.0000003")
    assert (begun["steps"], begun["compile"]) == (3, True)
    ended = begin("kept", "train.compile=auto", "train.max_steps=5")
    assert (ended["steps"], ended["compile"]) == (5, True)
    assert "train.compile" not in "".join(r.message for r in caplog.records if r.levelname == "WARNING")


@needs_compiler
def test_a_run_that_began_uncompiled_stays_so_though_many_steps_follow(place):
    assert not begin("plain", "train.compile=auto", FEW)["compile"]
    assert not decided("run.name=plain", MANY)


@needs_compiler
def test_a_setting_given_when_it_resumes_wins_with_a_warning(place, as_if_compiled, caplog):
    begin("switched", "train.compile=auto", FEW)
    ended = begin("switched", "train.compile=true", "train.max_steps=5")
    assert ended["compile"] and "train.compile False -> True" in caplog.text


@needs_compiler
@pytest.mark.parametrize("setting", [True, False])
def test_a_run_of_an_earlier_version_goes_on_as_it_was_set(place, as_if_compiled, setting):
    begun = begin(f"early{setting}", f"train.compile={setting}", FEW)
    file = Path(begun["run_dir"]) / "identity.json"
    identity = json.loads(file.read_text())
    del identity["compiled"]
    file.write_text(json.dumps(identity))
    assert decided(f"run.name=early{setting}", "train.max_steps=6" if setting else MANY) is setting


@needs_compiler
def test_a_finished_run_is_the_answer_however_it_was_computed(place, as_if_compiled):
    begun = begin("done", "train.compile=true", FEW)
    assert begin("done", "train.compile=auto", FEW)["finished_at"] == begun["finished_at"]
    assert begin("done", "train.compile=false", FEW)["finished_at"] == begun["finished_at"]


@pytest.mark.parametrize("wrong", ["maybe", "1", "null"])
def test_another_word_is_refused(wrong):
    with pytest.raises(UserError, match=r"train\.compile"):
        compose(["stage=mid", f"train.compile={wrong}"])
    with pytest.raises(UserError, match="auto, true, false"):
        compose(["stage=mid", "train.compile=maybe"])
