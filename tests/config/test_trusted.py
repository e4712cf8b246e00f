"""A run folder is data: nothing that its config.yaml names is imported unless this call says that it is the user's own."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import yaml

import chattrain
from chattrain.errors import UserError
from tests.helpers import command_line, train

PART = "from pathlib import Path\nPath('came_in').touch()\n\n\ndef build(**_):\n    Path('came_in').touch()\n"
COMMANDS = {
    "evaluate": ["command=evaluate", "eval=bpb"],
    "chat": ["command=chat", "chat.prompt=[hello]"],
    "export": ["command=export", "format=mlflow"],
}


@pytest.fixture(scope="module")
def run(place) -> Path:
    return Path(train("sft", "honest", "init.from=scratch", "train.max_steps=1")["run_dir"])


@pytest.fixture
def stranger(run, monkeypatch) -> Path:
    """A copy of the run, for a test to change, in a folder where a module `stranger` lies."""
    shutil.rmtree("runs/sft/stranger", ignore_errors=True)
    Path("came_in").unlink(missing_ok=True)
    Path("stranger.py").write_text(PART)
    monkeypatch.syspath_prepend(Path.cwd())
    monkeypatch.setenv("SECRET", "swordfish")
    return Path(shutil.copytree(run, "runs/sft/stranger"))


def write_config(run: Path, *path: str, value: object) -> None:
    """Change one key of the configuration of a run and of its checkpoint, whose manifest then fits again."""
    for folder in (run, *(run / "checkpoints").iterdir()):
        config = node = yaml.safe_load((folder / "config.yaml").read_text())
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = value
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        if (manifest := folder / "manifest.json").is_file():
            digest = hashlib.sha256((folder / "config.yaml").read_bytes()).hexdigest()
            manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"config.yaml": digest}))


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "path, value",
    [
        (["model", "_target_"], "stranger.build"),
        (["model", "_target_"], "chattrain.setup.plan.checkpoint.shutil.rmtree"),
        (["model", "n_kv_head"], {"_target_": "stranger.build"}),
        (["model", "n_kv_head"], "${oc.env:SECRET}"),
    ],
    ids=["part", "through_ours", "nested", "interpolation"],
)
def test_what_a_folder_names_is_not_run(stranger, command, path, value):
    write_config(stranger, *path, value=value)
    with pytest.raises(UserError) as refused:
        chattrain.run(["tracking=none", *COMMANDS[command], f"init.from={stranger}"])
    assert ".".join(path) in str(refused.value) and "swordfish" not in str(refused.value)
    if "interpolation" not in str(refused.value):
        assert "--config-dir" in str(refused.value)
    assert not Path("came_in").exists()


def test_a_folder_does_not_name_its_own_parts_where_it_lies_in_a_folder_of_choices(stranger):
    """`--config-dir .` beside a folder `data` that holds what was downloaded."""
    shutil.rmtree("data", ignore_errors=True)
    inside = Path(shutil.move(stranger, "data/inside"))
    write_config(inside, "collator", "_target_", value="stranger.build")
    for reference in (inside, next((inside / "checkpoints").iterdir())):
        with pytest.raises(UserError, match="--config-dir"):
            chattrain.run(
                [f"hydra.searchpath=[file://{Path.cwd()}]", "tracking=none", "command=evaluate", f"init.from={reference}"]
            )
    assert not Path("came_in").exists()


@pytest.mark.parametrize(
    "path",
    [["collator", "_target_"], ["data", "stages", "sft", "train", "a", "_target_"], ["eval", "own", "mine", "_target_"]],
)
def test_parts_that_only_some_commands_build_are_refused_there(stranger, path):
    write_config(stranger, *path, value="stranger.build")
    with pytest.raises(UserError, match="--config-dir"):
        chattrain.run(["tracking=none", *COMMANDS["evaluate"], f"init.from={stranger}"])
    assert not Path("came_in").exists()


def test_a_source_that_is_a_function_is_called_only_where_this_call_names_it(run, stranger):
    write_config(stranger, "data", "train_path", value=["talk.jsonl", "python:stranger.build"])
    typed = ["tracking=none", *COMMANDS["evaluate"], f"init.from={stranger}"]
    with pytest.raises(UserError, match=r"python:stranger\.build again, or add the folder"):
        chattrain.run(typed)
    assert not Path("came_in").exists()
    assert chattrain.run([*typed, "data.train_path=talk.jsonl"])["metrics"]


def test_the_winner_of_a_sweep_is_measured_with_parts_of_the_users_own(run, capsys):
    """The launching process, which has run no job itself, reads a run of this call: its folder of choices names the parts."""
    Path("mine.py").write_text("from chattrain.data.collators import Padded\n\n\nclass Mine(Padded):\n    pass\n")
    Path("conf/collator").mkdir(parents=True, exist_ok=True)
    Path("conf/collator/mine.yaml").write_text("_target_: mine.Mine\n")
    from tests.helpers import TINY

    sweep = ["optimizer.lr_scale=1,3", "sweep.jobs=2", "sweep.name=mine"]
    typed = ["--config-dir", "conf", "-m", "stage=sft", *TINY, "init.from=scratch", "train.max_steps=1", "collator=mine"]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path.cwd())
        done = command_line(capsys, *typed, "data.test_path=other.jsonl", *sweep)
    assert done.status == 0 and "was not measured" not in done.err, done.err
    assert json.loads(Path("runs/sweeps/mine/answer.json").read_text())["test"]
