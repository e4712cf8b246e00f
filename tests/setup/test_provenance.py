"""provenance.json: how and on what a run was made."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from chattrain.tokenizer import Tokenizer
from chattrain.tracking import repository as repositories
from chattrain.tracking.repository import repository
from tests.helpers import TINY, command_line, train


def entries(run_dir: str | Path) -> list[dict]:
    return json.loads((Path(run_dir) / "provenance.json").read_text())


def test_a_run_records_what_it_was_made_of(place, capsys):
    typed = ["stage=base", *TINY, "train.max_steps=2", "run.name=made", "run.seed=11", "tracking.uri=http://me:swordfish@host"]
    done = command_line(capsys, *typed)
    assert done.status == 0, done.err
    text = Path("runs/base/made/provenance.json").read_text()
    (made,) = json.loads(text)
    assert made["command"].startswith("chattrain stage=base model.n_layer=2 ") and "run.seed=11" in made["command"]
    assert "swordfish" not in text and "me:***@host" in made["command"]
    assert (made["step"], made["seed"], made["dtype"], made["compile"], made["deterministic"]) == (0, 11, "fp32", False, False)
    assert made["versions"]["torch"] == torch.__version__.partition("+")[0] or made["versions"]["torch"] == torch.__version__
    assert {"python", "numpy", "chattrain"} <= made["versions"].keys()
    hardware = made["hardware"]
    assert hardware["device"] == "cpu" and hardware["cpu"] and hardware["memory_gib"] > 0 and hardware["processes"] == 1
    state = json.loads(Path("runs/base/made/checkpoints/step_000002/state.json").read_text())
    assert made["data"]["fingerprint"] == state["data_fingerprint"]
    assert made["data"]["training"]["talk.jsonl"]["documents"] == 57 and made["data"]["validation"]["talk.jsonl"]["fingerprint"]
    assert made["tokenizer"] == Tokenizer.load(Path("runs/base/made/checkpoints/step_000002")).fingerprint()
    assert made["start"] == {"description": "random weights", "checkpoint": None, "weights": "random"}
    assert made["folder"] == str(place)


def test_each_resume_adds_an_entry_and_a_start_is_known_by_its_hash(place):
    typed = ["train.max_steps=2", "checkpoint.every=1"]
    start = train("base", "start", *typed)
    begun = train("mid", "begun", *typed, "init.from=base/start")
    train("mid", "begun", "train.max_steps=3", "checkpoint.every=1", "init.from=base/start")
    first, second = entries(begun["run_dir"])
    assert (first["step"], second["step"]) == (0, 2) and (first["num_steps"], second["num_steps"]) == (2, 3)
    assert first["start"]["checkpoint"] == start["checkpoint"] and first["start"]["weights"] == second["start"]["weights"]
    assert first["command"].startswith("chattrain.run([")


@pytest.fixture
def code(tmp_path) -> Path:
    """A repository with a committed file that was changed."""
    file, who = tmp_path / "code.py", ["-c", "user.name=me", "-c", "user.email=me@host"]
    file.write_text("lr = 1\n")
    for arguments in (["init", "-q"], ["add", "code.py"], [*who, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True)
    file.write_text("lr = 3\nuri = 'http://me:swordfish@host'\n")
    return tmp_path


def test_uncommitted_changes_are_kept_without_their_secrets(code, monkeypatch):
    state = repository(code)
    assert state and len(state["commit"]) == 40 and "-lr = 1\n+lr = 3" in state["diff"] and "swordfish" not in state["diff"]
    monkeypatch.setattr(repositories, "DIFF_CHARACTERS", 100)
    (code / "below").mkdir()
    cut = repository(code / "below")
    assert cut and cut["diff"].splitlines()[-1].startswith("[cut here: ") and len(cut["diff"]) < 200


def test_code_in_no_repository_has_no_commit(tmp_path):
    assert repository(tmp_path) is None
