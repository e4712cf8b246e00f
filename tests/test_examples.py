"""The examples: parts of one's own train, resume and are measured, and the notebook runs from top to bottom."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import TINY, metrics, process

EXAMPLES = Path(__file__).parents[1] / "examples"
OWN = ["--config-dir", str(EXAMPLES / "conf"), "stage=sft", "run.name=own"]
SMALL = [*(key for key in TINY if key.startswith(("model.", "train.dtype", "train.compile", "train.device=", "eval", "log")))]


@pytest.fixture
def importable(workplace, monkeypatch):
    paths = (str(EXAMPLES), str(EXAMPLES.parent / "src"), os.environ.get("PYTHONPATH", ""))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    return workplace


def test_the_examples_own_tests_pass(importable):
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(EXAMPLES / "tests")], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout


def test_own_parts_of_every_group_train_resume_and_are_measured(importable):
    typed = [*OWN, "experiment=mychat", "tracking=none", *SMALL]
    for steps in (3, 6):
        trained = process(*typed, f"train.max_steps={steps}", "run.allow_change=[train.max_steps]")
        assert trained.status == 0, trained.err
    assert [line["step"] for line in metrics("runs/sft/own") if "train/loss" in line] == [1, 2, 3, 4, 5, 6]
    refused = process("command=evaluate", "stage=sft", "run.name=own", "tracking=none")
    assert refused.status == 2 and "--config-dir" in refused.message
    measured = process(*OWN, "command=evaluate", "tracking=none")
    assert measured.status == 0 and "val/loss" in measured.out, measured.err


def test_the_notebook_runs_and_draws(importable):
    nbformat = pytest.importorskip("nbformat", reason="needs nbclient and ipykernel, of the extra dev")
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient and ipykernel, of the extra dev")
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    parameters.source = (
        'settings = {"train": {"max_steps": 2, "seq_len": 64, "rows_per_step": 4, "device_batch_size": 4}, '
        '"model": {"n_layer": 2, "n_embd": 64, "n_head": 2}, "tokenizer": {"vocab_size": 400}, "eval": {"max_problems": 4, '
        '"max_tokens": 512}, "tracking": "none"}'
    )
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(importable)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.get("text", "") for output in outputs)
    assert "sft completed after 2 steps" in printed and "> Who are you?" in printed
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert any("<iframe" in output.get("data", {}).get("text/html", "") for output in outputs)
