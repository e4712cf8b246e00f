"""command=lineage: a checkpoint carries the chain that it comes from."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

import chattrain
from chattrain.setup.lineage import setting_changes
from tests.foreign import random_gpt, write_nanochat
from tests.helpers import command_line, train

STEPS = ["train.max_steps=2", "checkpoint.every=1"]


@pytest.fixture(scope="module")
def chain(place) -> list[dict]:
    """The summaries of base -> mid -> sft."""
    return [
        train("base", "first", *STEPS),
        train("mid", "second", *STEPS, "run.seed=7"),
        train("sft", "third", *STEPS, "optimizer=adamw", "init.from=mid/second"),
    ]


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def lineage(reference: object) -> list[dict]:
    return chattrain.run(["command=lineage", f"init.from={reference}"])["lineage"]


def test_the_chain_is_printed_with_hashes_and_differences(chain, capsys):
    done = command_line(capsys, "command=lineage", "init.from=sft/third")
    assert done.status == 0, done.err
    found = json.loads(done.out.splitlines()[-1])["lineage"]
    assert [(e["stage"], e["run"], e["step"], e["whereabouts"]) for e in found] == [
        ("base", "base/first", 2, "there"),
        ("mid", "mid/second", 2, "there"),
        ("sft", "sft/third", 2, "there"),
    ]
    for entry, summary in zip(found, chain, strict=True):
        folder = Path(summary["checkpoint"])
        assert entry["weights"] == sha256(folder / "model.safetensors") and entry["config"] == sha256(folder / "config.yaml")
        assert entry["data"] == json.loads((folder / "state.json").read_text())["data_fingerprint"]
        assert entry["chattrain"] == chattrain.__version__
    assert "changes" not in found[0] and found[1]["changes"]["run.seed"] == [1337, 7]
    changes = found[2]["changes"]
    assert changes["run.seed"] == [7, 1337] and changes["optimizer.lr"][0] is None
    assert changes["optimizer._target_"] == ["chattrain.optim.muon_adamw.build", "chattrain.optim.adamw.build"]
    assert not [key for key in changes if key.startswith(("run.name", "init", "tracking", "checkpoint"))]
    lines = done.out.splitlines()
    assert [line.split()[1] for line in lines[1:4]] == ["base/first", "mid/second", "sft/third"]
    assert "  run.seed: 7 -> 1337" in lines


def test_other_data_is_named(chain, capsys):
    train("sft", "elsewhere", *STEPS, "init.from=mid/second", "data.train_path=other.jsonl")
    done = command_line(capsys, "command=lineage", "init.from=sft/elsewhere")
    assert json.loads(done.out.splitlines()[-1])["lineage"][-1]["changes"]["data"] == [["talk.jsonl"], ["other.jsonl"]]
    assert '  data: ["talk.jsonl"] -> ["other.jsonl"]' in done.out.splitlines()


def test_from_a_model_without_settings_no_setting_differs(chain, tmp_path):
    folder = shutil.copytree(chain[1]["checkpoint"], tmp_path / "bare")
    here = (folder / "config.yaml").read_text()
    assert setting_changes(folder, here) == {}
    (folder / "config.yaml").unlink()
    assert setting_changes(folder, here) == {}


def test_the_chain_travels_with_the_checkpoint(chain, tmp_path):
    """Copied elsewhere, with its ancestors gone or others in their place, it still says what they were."""
    alone = shutil.copytree(chain[2]["checkpoint"], tmp_path / "alone")
    before = lineage(alone)
    first, second = (Path(summary["checkpoint"]) for summary in chain[:2])
    away = first.rename(first.with_name("away"))
    kept = second.rename(second.with_name("kept"))
    shutil.copytree(Path(chain[1]["run_dir"]) / "checkpoints/step_000001", second)
    now = lineage(alone)
    shutil.rmtree(second)
    kept.rename(second)
    away.rename(first)
    assert [entry["whereabouts"] for entry in now] == ["gone", "changed", "there"]
    assert [entry["weights"] for entry in now] == [entry["weights"] for entry in before]


def test_a_resumed_run_keeps_its_chain_though_its_start_is_gone(chain):
    begun = train("sft", "torn", *STEPS, "init.from=mid/second", "optimizer.lr_scale=0.5")
    expected = lineage("sft/torn")
    start = Path(chain[1]["checkpoint"])
    away = start.rename(start.with_name("away"))
    train("sft", "torn", "train.max_steps=3", "checkpoint.every=1", "init.from=mid/second", "optimizer.lr_scale=0.5")
    found = lineage("sft/torn")
    away.rename(start)
    assert [entry["run"] for entry in found] == ["base/first", "mid/second", "sft/torn"]
    assert found[:1] == expected[:1] and found[2]["changes"] == expected[2]["changes"] and found[2]["step"] == 3
    assert begun["steps"] == 2


def test_a_checkpoint_of_an_earlier_version_says_what_its_run_knows(chain, place):
    run = Path(shutil.copytree(chain[2]["run_dir"], place / "runs/sft/older"))
    for folder in (run / "checkpoints").iterdir():
        state = json.loads((folder / "state.json").read_text())
        del state["lineage"]
        (folder / "state.json").write_text(json.dumps(state))
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps(manifest | {"state.json": sha256(folder / "state.json")}))
    assert [entry["run"] for entry in lineage("sft/older")] == ["base/first", "mid/second", "sft/older"]


def test_an_imported_model_is_the_root(place, tmp_path, tokenizer):
    model = random_gpt(tokenizer.vocab_size, n_layer=2, n_embd=64, n_head=2, n_kv_head=2)
    source = write_nanochat(tmp_path / "nanochat", model, tokenizer)
    chattrain.run(["command=import", "stage=base", f"init.from={source}", "run.name=imported", "tracking=none"])
    (root,) = lineage("base/imported")
    assert (root["stage"], root["imported_from"], root["run"]) == ("base", "nanochat", str(source))
    assert root["weights"] == sha256(Path(root["checkpoint"]) / "model.safetensors")
