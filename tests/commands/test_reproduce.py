"""command=reproduce: a run is repeated as it was recorded, and told apart from another one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import chattrain
from chattrain.commands.reproduce import changed_surroundings
from chattrain.errors import RunFailed, UserError
from tests.helpers import TINY, command_line, train, write_talk

SHORT = ["init.from=scratch", "train.max_steps=6", "eval.every=3", "checkpoint.every=2", "checkpoint.keep=9"]


@pytest.fixture(scope="module")
def run(place) -> Path:
    return Path(train("mid", "original", *SHORT)["run_dir"])


def copy(run: Path, name: str) -> Path:
    return Path(shutil.copytree(run, run.parent / name))


def reproduce(*arguments: str) -> dict:
    return chattrain.run(["command=reproduce", *arguments])


def test_a_run_is_repeated_to_the_bit_without_a_word_of_its_settings(run, capsys):
    done = command_line(capsys, "command=reproduce", "init.from=mid/original")
    assert done.status == 0, done.err
    found = json.loads(done.out.splitlines()[-1])
    assert found["equal"] and found["passed"] and found["tolerance"] == 0 and found["surroundings"] == []
    assert found["step"] == 6 and found["compared_numbers"] > 30 and found["tensors"] > 10
    assert "equal to the bit" in done.out
    new = Path(found["reproduction"])
    assert new == run.parent / "original-reproduced"
    assert json.loads((new / "reproduction.json").read_text()) == found
    again = reproduce("run.name=original", "stage=mid")  # named by run.name; each repetition has a folder of its own
    assert again["equal"] and Path(again["reproduction"]) == run.parent / "original-reproduced2"


def test_a_run_that_was_interrupted_and_resumed_is_repeated(place):
    typed = [*SHORT, "optimizer=adamw", "collator=best_fit", "schedule=cosine", "loss.prompt_weight=0.5"]
    stopped = train("sft", "torn", *typed, "train.stop_after=0.5")
    assert stopped["steps"] == 3
    half = reproduce(f"init.from={stopped['run_dir']}", "run.name=half")  # up to where it is
    assert half["equal"] and half["step"] == 3 and Path(half["reproduction"]).name == "half"
    resumed = train("sft", "torn", *typed)
    assert resumed["steps"] == 6
    whole = reproduce("init.from=torn", "run.name=whole")
    assert whole["equal"] and whole["step"] == 6
    assert len(json.loads((Path(resumed["run_dir"]) / "provenance.json").read_text())) == 2


def test_it_starts_from_what_auto_found_then(place):
    """A newer run of the stage before is not what the original started from."""
    train("base", "old", *SHORT)
    original = train("mid", "after", *(SHORT[1:]))
    assert "base/old" in original["init"]
    train("base", "newer", *SHORT, "run.seed=3")
    assert reproduce("init.from=mid/after")["equal"]
    checkpoint = Path(original["init"])
    away = checkpoint.rename(checkpoint.with_name("away"))
    with pytest.raises(UserError, match=r"started from .*base/old.*is gone"):
        reproduce("init.from=mid/after")
    shutil.copytree(Path("runs/base/newer/checkpoints") / checkpoint.name, checkpoint)
    with pytest.raises(UserError, match=r"other weights or another tokenizer"):
        reproduce("init.from=mid/after")
    shutil.rmtree(checkpoint)
    away.rename(checkpoint)


def test_other_data_is_refused_by_name_and_moved_data_is_named_anew(place):
    write_talk(place, "changing.jsonl")
    changing = train("mid", "changing", *SHORT, "data.train_path=changing.jsonl")
    Path("changing.jsonl").rename("moved.jsonl")
    with pytest.raises(UserError, match=r"cannot be repeated.*changing\.jsonl"):
        reproduce(f"init.from={changing['run_dir']}")
    assert reproduce(f"init.from={changing['run_dir']}", "data.train_path=moved.jsonl")["equal"]
    write_talk(place, "changing.jsonl", count=61)
    with pytest.raises(UserError, match=r"training data of changing\.jsonl.*other contents.*57 documents then, 58 now"):
        reproduce(f"init.from={changing['run_dir']}")
    assert not (Path(changing["run_dir"]).parent / "changing-reproduced2").exists()


@pytest.mark.parametrize(
    "typed, words",
    [
        (["optimizer.lr_scale=3"], "optimizer.lr_scale is given.*own settings"),
        (["train.max_steps=2"], "train.max_steps is given"),
        (["run.name=original"], "original holds a complete run"),
        (["stage=sft"], "stage=sft would have no effect"),
    ],
)
def test_what_would_make_another_run_is_refused(run, typed, words):
    with pytest.raises(UserError, match=words):
        reproduce(f"init.from={run}", *typed)


def test_a_run_that_is_not_what_its_record_says_fails_with_its_first_difference(run, capsys):
    other = copy(run, "other")
    rows = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if row["step"] == 4 and "train/loss" in row:
            row["train/loss"] *= 1.0001
    (other / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    done = command_line(capsys, "command=reproduce", f"init.from={other}")
    assert done.status == 1 and "does not repeat" in done.message and "tolerance: none" in done.message
    found = json.loads(done.out.splitlines()[-1])
    assert found["first_difference"][:2] == [4, "train/loss"]
    assert found["largest_relative"] == {"train/loss": pytest.approx(1e-4, rel=1e-2)}
    assert not found["equal"] and found["different_tensors"] == 0


def test_other_versions_are_named_and_loosen_what_passes(run):
    other = copy(run, "elsewhere")
    entries = json.loads((other / "provenance.json").read_text())
    entries[0]["versions"]["torch"] = "2.0.0"
    (other / "provenance.json").write_text(json.dumps(entries))
    rows = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    rows[-1]["val/loss"] *= 1.001
    (other / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    found = reproduce(f"init.from={other}")
    assert any(text.startswith("versions.torch: 2.0.0 -> ") for text in found["surroundings"])
    assert found["passed"] and not found["equal"] and found["tolerance"] == 0.01
    rows[-1]["val/loss"] *= 1.1
    (other / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    with pytest.raises(RunFailed, match="tolerance: 1%"):
        reproduce(f"init.from={other}")


def test_a_mixture_of_settings_is_no_run_to_repeat(place):
    train("mid", "mixed", *SHORT)
    train("mid", "mixed", *SHORT, "train.max_steps=8", "optimizer.lr_scale=0.5", "run.allow_change=[optimizer.lr_scale]")
    with pytest.raises(UserError, match=r"changed while it ran \(optimizer\.lr_scale"):
        reproduce("init.from=mid/mixed")


def test_a_run_that_was_extended_says_why_it_is_not_repeated(place):
    train("sft", "longer", *SHORT)
    train("sft", "longer", *SHORT, "train.max_steps=8")
    with pytest.raises(RunFailed, match="It was planned with 6, then 8 steps, and its learning rates followed"):
        reproduce("init.from=sft/longer")


def test_two_deterministic_runs_are_equal_to_the_bit(place):
    one = train("sft", "fixed", *SHORT, "train.deterministic=true")
    assert json.loads((Path(one["run_dir"]) / "provenance.json").read_text())[0]["deterministic"] is True
    found = reproduce("init.from=sft/fixed")
    assert found["equal"]
    assert json.loads((Path(found["reproduction"]) / "provenance.json").read_text())[0]["deterministic"] is True


def test_parts_of_the_users_own_are_repeated_with_their_folder_only(place, capsys):
    Path("ours.py").write_text("def factor(step, num_steps, slope: float = 0.5):\n    return 1 - slope * step / num_steps\n")
    Path("choices/schedule").mkdir(parents=True)
    Path("choices/schedule/sloping.yaml").write_text("_target_: ours.factor\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path.cwd())
        own = ["--config-dir", "choices"]
        typed = ["stage=sft", *TINY, *SHORT, "schedule=sloping", "schedule.slope=0.25", "run.name=own"]
        assert command_line(capsys, *own, *typed).status == 0
        refused = command_line(capsys, "command=reproduce", "init.from=sft/own")
        assert refused.status == 2 and "schedule._target_=ours.factor" in refused.message and "--config-dir" in refused.message
        done = command_line(capsys, *own, "command=reproduce", "init.from=sft/own")
    assert done.status == 0 and json.loads(done.out.splitlines()[-1])["equal"], done.err


def test_other_code_is_named():
    made = {"versions": {}, "hardware": {}, "dtype": "fp32", "compile": False, "config_dirs": []}
    code = {"of": "chattrain", "folder": "/a", "commit": "1" * 40, "diff": ""}
    elsewhere = {"of": "current folder", "folder": "/b", "commit": "3" * 40, "diff": ""}

    def changed(*repositories: dict, **others: list) -> list[str]:
        return changed_surroundings([made | {"git": [code]} | others], made | {"git": list(repositories)} | others)

    assert changed(code | {"folder": "/moved"}) == [] == changed(code, elsewhere)
    assert changed(code | {"commit": "2" * 40}) == [f"commit (chattrain): {'1' * 40} -> {'2' * 40}"]
    assert changed(code | {"diff": "+x"}) == ["uncommitted changes (chattrain)"]
    assert changed(code, elsewhere, config_dirs=["/b/conf"]) == [f"commit (current folder): None -> {'3' * 40}"]
