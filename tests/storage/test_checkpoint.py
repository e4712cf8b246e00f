"""A checkpoint is whole or absent, says what is wrong with it, and needs nothing but itself."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import chattrain
from chattrain.errors import RunFailed, UserError
from chattrain.model.gpt import GPT
from chattrain.storage import checkpoint
from chattrain.storage.tensors import fill_model
from chattrain.tokenizer import Tokenizer
from tests.helpers import TINY, contents, damage, metrics, standing_in, train, write_talk


@pytest.fixture(scope="module")
def place(tmp_path_factory, cache):
    folder = tmp_path_factory.mktemp("place")
    with standing_in(folder, cache):
        write_talk(folder)
        yield folder


@pytest.fixture(scope="module")
def finished(place) -> dict:
    return train("base", "finished", "train.max_steps=2")


@pytest.fixture
def folder(finished, tmp_path) -> Path:
    """A checkpoint of the run, to be spoilt."""
    return Path(shutil.copytree(finished["checkpoint"], tmp_path / "step_000002"))


@pytest.fixture
def model(finished) -> GPT:
    """An empty model of the run's shape."""
    saved = checkpoint.load_state(Path(finished["checkpoint"])).model
    return GPT(saved["vocab_size"], saved["n_layer"], saved["n_embd"], saved["n_head"], saved["n_kv_head"])


# --- whole or absent -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["first file", "second file", "manifest", "rename"])
def test_a_crash_while_saving_leaves_the_older_checkpoint_and_no_half_of_a_new_one(moment, place, monkeypatch):
    """The disk is full in the middle of the second checkpoint; the run goes on from the first and ends the same."""
    name = moment.replace(" ", "_")
    whole = train("base", f"{name}_whole", "train.max_steps=4")
    with monkeypatch.context() as patch:
        break_saving(patch, moment, of_checkpoint=2)
        with pytest.raises(RunFailed, match="no space left"):
            train("base", name, "train.max_steps=4", "checkpoint.every=2")

    run_dir = place / "runs/base" / name
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "failed" and "no space left" in summary["error"]
    (left,) = checkpoint.all_checkpoints(run_dir)
    assert left.name == "step_000002" and checkpoint.find_damage(left) is None
    assert summary["checkpoint"] == str(left)

    resumed = train("base", name, "train.max_steps=4", "checkpoint.every=2")
    assert resumed["status"] == "completed" and "step_000002" in resumed["init"]
    files = [load_file(Path(run["checkpoint"]) / "model.safetensors") for run in (whole, resumed)]
    assert all(files[0][key].equal(files[1][key]) for key in files[0])
    assert sorted(f.name for f in (run_dir / "checkpoints").iterdir()) == ["step_000002", "step_000004"]


def break_saving(monkeypatch, moment: str, of_checkpoint: int) -> None:
    """Raise OSError at this moment of the n-th checkpoint that is saved."""
    calls = {"save_file": 0, "rename": 0, "_sha256": 0}
    due = {
        "first file": ("save_file", 2 * of_checkpoint - 1),
        "second file": ("save_file", 2 * of_checkpoint),
        "rename": ("rename", of_checkpoint),
        "manifest": ("_sha256", 6 * of_checkpoint),
    }[moment]

    def breaking(name, inner):
        def call(*arguments, **named):
            if name != "rename" or arguments[0].name.startswith(".step_"):
                calls[name] += 1
            if (name, calls[name]) == due:
                if name == "save_file":  # half of the file is there
                    Path(arguments[1]).write_bytes(b"half of it")
                raise OSError(errno.ENOSPC, "No space left on device")
            return inner(*arguments, **named)

        return call

    monkeypatch.setattr(checkpoint, "save_file", breaking("save_file", checkpoint.save_file))
    monkeypatch.setattr(checkpoint, "_sha256", breaking("_sha256", checkpoint._sha256))
    monkeypatch.setattr(Path, "rename", breaking("rename", Path.rename))


def test_what_a_crash_left_behind_is_no_checkpoint_to_start_from(finished, tmp_path):
    torn = tmp_path / "run/checkpoints/.step_000002.writing"
    shutil.copytree(finished["checkpoint"], torn)
    assert checkpoint.all_checkpoints(tmp_path / "run") == []
    with pytest.raises(UserError, match="neither a checkpoint nor a run with a valid one"):
        checkpoint.resolve(tmp_path / "run")


# --- what is in it ---------------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_all_that_a_run_needs_and_no_pickle(finished):
    held = {name.split("/")[0] for name in contents(Path(finished["checkpoint"]))}
    assert held == {"model.safetensors", "optimizer.safetensors", "state.json", "config.yaml", "tokenizer", "manifest.json"}
    kinds = {Path(name).suffix for name in contents(Path(finished["checkpoint"]))}
    assert kinds <= {".safetensors", ".json", ".yaml", ".tiktoken"}


def test_the_manifest_names_every_file(finished):
    folder = Path(finished["checkpoint"])
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest) == set(contents(folder)) - {"manifest.json"}


def test_the_state_says_where_the_run_was(finished):
    state = checkpoint.load_state(Path(finished["checkpoint"]))
    assert (state.step, state.num_steps, state.stage) == (2, 2, "base")
    assert (state.tokens_seen, state.supervised_tokens) == (finished["tokens_seen"], finished["supervised_tokens"])
    assert state.data_fingerprint and state.format_version == checkpoint.FORMAT_VERSION
    assert {"n_layer": 2, "n_embd": 64, "n_head": 2}.items() <= state.model.items()


def test_a_checkpoint_carried_elsewhere_is_enough_to_go_on_from(folder, finished, tmp_path, monkeypatch):
    """Tokenizer, weights and config come from the folder: another machine has neither the run nor its cache."""
    assert Tokenizer.load(folder).vocab_size == checkpoint.load_state(folder).model["vocab_size"]
    assert yaml.safe_load((folder / "config.yaml").read_text())["train"]["max_steps"] == 2
    monkeypatch.setenv("CHATTRAIN_CACHE", str(tmp_path / "other_cache"))
    monkeypatch.chdir(tmp_path)
    write_talk(tmp_path)
    summary = train("mid", "carried", "train.max_steps=1", f"init.from={folder}")
    assert metrics(summary["run_dir"])[0]["val/loss"] == pytest.approx(finished["metrics"]["val/loss"], rel=1e-6)
    said = chattrain.run(["command=chat", *TINY, f"init.from={folder}", "chat.prompt=Hello", "chat.max_tokens=3"])
    assert len(said["replies"]) == 1


def test_what_is_saved_is_what_is_loaded(model, tokenizer, tmp_path):
    torch.manual_seed(1)
    for p in model.parameters():
        torch.nn.init.normal_(p)
    state = checkpoint.CheckpointState(7, 100, 50, "sft", {"vocab_size": model.vocab_size}, "abc", 9, metrics={"val/bpb": 1.5})
    optimizer = {"lm_head.weight/exp_avg": torch.randn(3, 2).mT, "lm_head.weight/step": torch.tensor(7.0)}
    folder = checkpoint.save(tmp_path, state, model.weights(), optimizer, tokenizer, "stage: sft\n", keep=1, files={})
    assert folder == tmp_path / "checkpoints/step_000007" and checkpoint.find_damage(folder) is None
    assert checkpoint.load_state(folder) == state
    assert all(checkpoint.load_optimizer(folder)[name].equal(value) for name, value in optimizer.items())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for p in model.parameters():
        p.data.zero_()
    fill_model(folder / "model.safetensors", model)
    assert all(model.state_dict()[name].equal(tensor) for name, tensor in before.items())
    assert Tokenizer.load(folder).fingerprint() == tokenizer.fingerprint()


# --- damage and misfits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file",
    [
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
        "config.yaml",
        "tokenizer/ranks.tiktoken",
        "tokenizer/encoding.json",
    ],
)
def test_one_flipped_byte_is_found_in_any_file(folder, file):
    assert checkpoint.find_damage(folder) is None
    damage(folder / file)
    assert file in checkpoint.find_damage(folder)
    with pytest.raises(UserError, match=f"damaged: {file}"):
        checkpoint.resolve(folder)


def test_a_missing_file_is_named(folder):
    (folder / "state.json").unlink()
    assert checkpoint.find_damage(folder) == "state.json is missing"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null"])
def test_a_manifest_that_names_nothing_vouches_for_nothing(folder, text):
    (folder / "manifest.json").write_text(text)
    assert "manifest.json" in (checkpoint.find_damage(folder) or "")


def test_tensors_that_are_missing_unknown_or_of_another_shape_are_named(folder, model):
    tensors = load_file(folder / "model.safetensors")
    missing, other = "transformer.h.0.attn.c_q.weight", "lm_head.weight"
    del tensors[missing]
    tensors["extra.weight"] = torch.zeros(2)
    tensors[other] = torch.zeros(5, 64)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError) as refused:
        fill_model(folder / "model.safetensors", model)
    message = str(refused.value)
    assert f"{missing} is missing" in message and "extra.weight is unknown" in message
    assert f"{other} is (5, 64), the model has {tuple(model.lm_head.weight.shape)}" in message


def test_a_file_that_is_no_safetensors_is_refused(folder, model):
    (folder / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(UserError, match=r"model.safetensors cannot be read"):
        fill_model(folder / "model.safetensors", model)


def test_a_newer_format_is_refused_with_the_way_out(folder):
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"format_version": 99, "invented_later": 1}))
    with pytest.raises(UserError, match=r"format_version 99.*reads up to 1; install a newer"):
        checkpoint.load_state(folder)
