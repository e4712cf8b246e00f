"""Loss spikes are kept with their rows, which command=inspect shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import chattrain
from chattrain.errors import UserError
from chattrain.setup.spikes import Spikes
from tests.helpers import TINY, train, write_talk


def test_a_spike_is_kept_with_the_rows_that_made_it_and_usual_losses_are_not(tmp_path, caplog):
    watch = Spikes(tmp_path, lambda step: f"rows of step {step}", writes=True)
    losses = [3.0 - 0.01 * step + (0.05 if step % 2 else 0.0) for step in range(100)]
    losses[60] = 6.0
    for step, loss in enumerate(losses, start=1):
        watch(step, loss)
    (file,) = (tmp_path / "spikes").iterdir()
    content = json.loads(file.read_text())
    assert (file.name, content["step"], content["loss"], content["rows"]) == ("step_000061.json", 61, 6.0, "rows of step 60")
    assert "inspect.step=61" in caplog.text


def test_other_ranks_write_nothing(tmp_path):
    watch = Spikes(tmp_path, str, writes=False)
    for step, loss in enumerate([1.0] * 50 + [9.0], start=1):
        watch(step, loss)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def place(workplace):
    write_talk(workplace)
    return workplace


def inspect(*overrides: str) -> list[str]:
    return [*["command=inspect", "stage=sft"], *TINY, "init.from=scratch", "train.max_steps=9", *overrides]


def test_the_rows_of_a_step_are_those_that_it_trains_on(place, capsys, monkeypatch):
    described = {}

    def fit(trainer, state, cadence):
        described.update({step: trainer.loader.describe(step - 1) for step in (1, 4)})
        return state

    with monkeypatch.context() as patch:
        patch.setattr("chattrain.loop.fit", fit)
        train("sft", "spied", "init.from=scratch", "train.max_steps=9")
    for step, rows in described.items():
        capsys.readouterr()
        chattrain.run(inspect(f"inspect.step={step}", "inspect.rows=4"))
        shown = [line.partition(": ")[2] for line in capsys.readouterr().out.splitlines() if line.startswith("row ")]
        assert ", ".join(shown) == rows
    chattrain.run(inspect("inspect.step=4", "inspect.row=2"))
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("row ")] == [f"row 2: {shown[2]}"]


@pytest.mark.parametrize(
    "given, words",
    [("inspect.step=10", "beyond the run's 9 steps"), ("inspect.row=4", "beyond the 4 rows"), ("inspect.source=x", "has talk")],
)
def test_what_is_not_there_is_not_shown(place, given, words):
    with pytest.raises(UserError, match=words):
        chattrain.run(inspect(given))
    assert not Path("runs").exists()
