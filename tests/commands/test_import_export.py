"""nanochat in, Hugging Face out, as commands and as init.from."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

import chattrain
from chattrain.errors import RunFailed
from chattrain.formats import convert, huggingface
from chattrain.storage import checkpoint
from chattrain.storage.tensors import read_tensors
from chattrain.tokenizer import Tokenizer
from tests import tiny_hf
from tests.foreign import random_gpt, write_nanochat
from tests.helpers import TINY, command_line, contents, damage, standing_in, write_talk

SIZES = {"n_layer": 2, "n_embd": 64, "n_head": 2}


@pytest.fixture
def place(workplace):
    """A folder of its own with conversations."""
    write_talk(workplace)
    return workplace


@pytest.fixture(scope="module")
def model(tokenizer):
    return random_gpt(tokenizer.vocab_size, **SIZES)


@pytest.fixture(scope="module")
def nanochat(tmp_path_factory, model, tokenizer) -> Path:
    """nanochat's base directory: base_checkpoints/d2 beside tokenizer/."""
    base_dir = tmp_path_factory.mktemp("nanochat")
    return write_nanochat(base_dir / "base_checkpoints" / "d2", model, tokenizer, tokenizer_dir=base_dir / "tokenizer")


@pytest.fixture(scope="module")
def exported(tmp_path_factory, cache, nanochat) -> Path:
    with standing_in(tmp_path_factory.mktemp("export"), cache) as folder:
        return Path(chattrain.run(["command=export", "format=hf", f"init.from={nanochat}", f"export.dir={folder}/hf"])["folder"])


def run(command: str, *overrides: str) -> dict:
    return chattrain.run([f"command={command}", *overrides])


def one_step(*overrides: str) -> dict:
    return chattrain.run([*TINY, "train.max_steps=1", "optimizer.lr_scale=1e-9", *overrides])


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return read_tensors(checkpoint.resolve(Path(folder)) / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- import ----------------------------------------------------------------------------------------------------------


def test_an_imported_model_is_a_finished_run_from_which_the_next_stage_goes_on(place, nanochat, model, tokenizer):
    summary = run("import", "stage=base", f"init.from={nanochat}")
    assert summary == json.loads(Path("runs/base/d2/summary.json").read_text())
    assert (summary["status"], summary["stage"], summary["steps"]) == ("completed", "base", 650)
    assert same(weights("runs/base/d2"), model.state_dict())
    assert Tokenizer.load("runs/base/d2/checkpoints/step_000650").fingerprint() == tokenizer.fingerprint()
    assert checkpoint.find_damage(Path(summary["checkpoint"])) is None
    mid = one_step("stage=mid", "init.strict=true")
    assert mid["init"] == summary["checkpoint"]


def test_init_from_a_nanochat_folder_does_the_same_in_passing(place, nanochat):
    imported = run("import", "stage=base", f"init.from={nanochat}")
    by_import = one_step("stage=mid", f"init.from={imported['run_dir']}", "run.name=a")
    in_passing = one_step("stage=mid", f"init.from={nanochat}", "run.name=b")
    assert in_passing["init"] == str(nanochat.resolve())
    assert same(weights(by_import["run_dir"]), weights(in_passing["run_dir"]))


def test_a_folder_is_converted_once_and_anew_when_it_changes(place, model, tokenizer, tmp_path, monkeypatch):
    folder = write_nanochat(tmp_path / "flat", model, tokenizer)
    read = []
    monkeypatch.setattr(convert, "read", lambda *a, whole=convert.read: read.append(a) or whole(*a))
    for name in "ab":
        one_step("stage=mid", f"init.from={folder}", f"run.name={name}")
    assert len(read) == 1
    write_nanochat(folder, random_gpt(tokenizer.vocab_size, seed=1, **SIZES), tokenizer, step=700)
    changed = one_step("stage=mid", f"init.from={folder}", "run.name=c")
    assert len(read) == 2 and not same(weights("runs/mid/a"), weights(changed["run_dir"]))


def test_a_damaged_conversion_is_made_anew(place, model, tokenizer, tmp_path, cache):
    folder = write_nanochat(tmp_path / "flat", model, tokenizer)
    one_step("stage=mid", f"init.from={folder}", "run.name=a")
    newest = max((cache / "imported").glob("*/*/model.safetensors"), key=lambda f: f.stat().st_mtime)
    damage(newest)
    one_step("stage=mid", f"init.from={folder}", "run.name=b")
    assert same(weights("runs/mid/a"), weights("runs/mid/b"))


def test_a_chain_starts_from_init_from_and_goes_on_from_stage_to_stage(place, nanochat, capsys):
    outcome = command_line(capsys, "-m", "stage=mid,sft", *TINY, "train.max_steps=1", f"init.from={nanochat}", "run.name=chain")
    assert outcome.status == 0, outcome.err
    mid, sft = (json.loads(Path(f"runs/{stage}/chain/summary.json").read_text()) for stage in ("mid", "sft"))
    assert (mid["init"], sft["init"]) == (str(nanochat.resolve()), mid["checkpoint"])


def test_a_launcher_with_several_processes_is_refused_where_one_works(place, nanochat, capsys, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert "leave torchrun out" in refused(capsys, "command=import", "stage=base", f"init.from={nanochat}")


def test_two_processes_start_from_one_conversion(place, model, tokenizer, tmp_path, capfd):
    folder = write_nanochat(tmp_path / "flat", model, tokenizer)
    settings = [o for o in TINY if not o.startswith(("distributed", "train.device_batch_size"))]
    done = command_line(
        capfd,
        "stage=mid",
        *settings,
        "train.device_batch_size=2",
        "distributed.nproc=2",
        "train.max_steps=1",
        f"init.from={folder}",
        "run.name=two",
    )
    assert done.status == 0, done.err
    assert done.err.count("was converted into a checkpoint") == 1


def test_chat_evaluate_and_inspect_read_a_nanochat_folder(place, nanochat, capsys):
    assert run("evaluate", "stage=sft", *TINY, f"init.from={nanochat}")["metrics"]["val/loss"] > 0
    assert len(run("chat", "stage=sft", *TINY, f"init.from={nanochat}", "chat.prompt=Hi", "chat.max_tokens=3")["replies"]) == 1
    assert run("inspect", "stage=sft", *TINY, f"init.from={nanochat}")["supervised_shown"] > 0


def test_a_tokenizer_that_lies_elsewhere_is_named_with_tokenizer_path(place, model, tokenizer, tmp_path, capsys):
    folder = write_nanochat(tmp_path / "alone", model, tokenizer, tokenizer_dir=tmp_path / "words")
    outcome = command_line(capsys, "stage=mid", *TINY, f"init.from={folder}")
    assert outcome.status == 2 and "tokenizer.path=" in outcome.message
    assert one_step("stage=mid", f"init.from={folder}", f"tokenizer.path={tmp_path}/words")["status"] == "completed"


def test_a_hub_name_is_fetched(place, model, tokenizer, tmp_path, monkeypatch):
    import huggingface_hub

    folder = write_nanochat(tmp_path / "snapshot", model, tokenizer)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: str(folder))
    assert run("import", "stage=sft", "init.from=someone/nanochat-d2", "run.name=fetched")["steps"] == 650


# --- refused ---------------------------------------------------------------------------------------------------------


def refused(capsys, *arguments: str) -> str:
    before = contents(Path.cwd())
    outcome = command_line(capsys, *arguments)
    assert outcome.status == 2 and contents(Path.cwd()) == before, outcome.err
    return outcome.message


def test_import_without_a_folder_or_of_no_model_is_refused(place, capsys):
    assert "init.from=<" in refused(capsys, "command=import", "stage=base")
    (place / "hollow").mkdir()
    assert "no model of nanochat" in refused(capsys, "command=import", "stage=base", "init.from=hollow")


def test_import_of_a_base_model_as_another_stage_is_refused(place, nanochat, capsys):
    assert "write stage=base" in refused(capsys, "command=import", "stage=sft", f"init.from={nanochat}")


def test_import_into_a_run_that_is_there_is_refused(place, nanochat, capsys):
    run("import", "stage=base", f"init.from={nanochat}")
    assert "is in use" in refused(capsys, "command=import", "stage=base", f"init.from={nanochat}")


def test_import_of_another_architecture_names_the_way_out(place, tmp_path, capsys):
    pytest.importorskip("transformers")
    llama = tiny_hf.write_model(tmp_path / "llama")
    assert "type llama" in (message := refused(capsys, "command=import", "stage=base", f"init.from={llama}"))
    assert "model=hf" in message


@pytest.mark.parametrize("command", ["import", "train"])
def test_a_folder_above_the_model_and_its_file_are_refused_with_a_hint(place, nanochat, capsys, command):
    for above in (nanochat.parent, nanochat.parents[1]):
        message = refused(capsys, f"command={command}", "stage=base", *TINY, f"init.from={above}")
        assert f"did you mean {nanochat.resolve()}?" in message
    assert "name its folder" in refused(
        capsys, f"command={command}", "stage=base", *TINY, f"init.from={nanochat}/model_000650.pt"
    )


def test_a_model_of_other_sizes_is_refused_with_the_sizes(place, nanochat, capsys):
    assert "n_layer=2" in refused(capsys, "stage=mid", *TINY, "model.n_layer=3", f"init.from={nanochat}")


def test_a_name_that_is_nowhere_is_refused(place, capsys):
    message = refused(capsys, "stage=mid", *TINY, "init.from=nobody/nothing")
    assert "no folder nobody/nothing" in message and "hub" in message


# --- export ----------------------------------------------------------------------------------------------------------


def test_a_round_trip_keeps_every_bit(place, nanochat, exported, model, tokenizer):
    back = run("import", "stage=base", f"init.from={exported}", "run.name=back")
    assert same(weights(back["run_dir"]), model.state_dict())
    assert Tokenizer.load(exported).fingerprint() == Tokenizer.load(back["checkpoint"]).fingerprint() == tokenizer.fingerprint()
    again = run("export", "stage=base")
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (Path(again["folder"]) / name).read_bytes() == (exported / name).read_bytes(), name


def test_an_exported_folder_is_an_init_from(place, nanochat, exported):
    a = one_step("stage=mid", f"init.from={exported}", "run.name=a")
    b = one_step("stage=mid", f"init.from={nanochat}", "run.name=b")
    assert same(weights(a["run_dir"]), weights(b["run_dir"]))


def test_export_takes_the_newest_finished_run_of_the_stage_whatever_its_model(place, capsys):
    trained = one_step("stage=mid", "init.from=scratch")
    made = run("export", "format=hf", "stage=mid")
    assert made["checkpoint"] == trained["checkpoint"]
    assert Path(made["folder"]) == Path(trained["run_dir"]) / "hf" / "step_000001"
    assert capsys.readouterr().out.strip().endswith(made["folder"])
    assert json.loads((Path(made["folder"]) / "config.json").read_text())["max_position_embeddings"] == 64


def test_export_takes_the_run_of_the_model_asked_for_before_a_newer_one(place):
    pytest.importorskip("transformers")
    ours = one_step("stage=sft", "init.from=scratch", "run.name=ours")
    settings = [o for o in TINY if not o.startswith(("model.", "tokenizer."))]
    llama = tiny_hf.write_model(place / "llama")
    theirs = chattrain.run(["stage=sft", *settings, "model=hf", "train.max_steps=1", f"init.from={llama}", "run.name=theirs"])
    assert run("export", "stage=sft", *TINY)["checkpoint"] == ours["checkpoint"]
    assert run("export", "stage=sft", "model=hf")["checkpoint"] == theirs["checkpoint"]


def test_a_second_export_replaces_the_first_and_nothing_else(place, capsys):
    one_step("stage=mid", "init.from=scratch", "run.name=first")
    for _ in range(2):
        folder = Path(run("export", "stage=mid", "export.dir=out")["folder"])
    assert (folder / "model.safetensors").is_file()
    (place / "mine").mkdir()
    (place / "mine" / "notes.txt").write_text("keep me")
    assert "is in use" in refused(capsys, "command=export", "stage=mid", "export.dir=mine")


def test_an_export_that_fails_leaves_the_one_before(place, monkeypatch):
    one_step("stage=mid", "init.from=scratch", "run.name=first")
    folder = Path(run("export", "stage=mid", "export.dir=out")["folder"])
    before = contents(place)
    monkeypatch.setattr(huggingface, "write_tokenizer", lambda *a: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        run("export", "stage=mid", "export.dir=out")
    assert contents(place) == before and folder.is_dir()


def test_an_import_that_fails_leaves_nothing(place, nanochat, monkeypatch):
    monkeypatch.setattr(checkpoint, "save_file", lambda *a, **k: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(RunFailed, match="no space"):
        run("import", "stage=base", f"init.from={nanochat}")
    assert not list((place / "runs").rglob("*.json")) and not Path("runs/base/d2").exists()


def test_an_export_is_readable_by_whom_the_umask_lets(exported):
    assert exported.stat().st_mode & 0o077 == 0o777 & ~umask() & 0o077


def umask() -> int:
    now = os.umask(0)
    os.umask(now)
    return now


def test_our_own_export_trained_through_transformers_is_exported_whole(place, exported):
    transformers = pytest.importorskip("transformers")
    settings = [o for o in TINY if not o.startswith(("model.", "tokenizer."))]
    chattrain.run(["stage=sft", *settings, "model=hf", "train.max_steps=1", f"init.from={exported}", "run.name=via"])
    made = Path(run("export", "stage=sft", *settings)["folder"])
    assert transformers.AutoTokenizer.from_pretrained(made).get_chat_template()
    assert type(transformers.AutoModelForCausalLM.from_pretrained(made)).__name__ == "NanoChatForCausalLM"


def test_export_without_a_run_is_refused(place, nanochat, capsys):
    assert "no finished mid run" in refused(capsys, "command=export", "stage=mid")
    assert "export.dir=" in refused(capsys, "command=export", f"init.from={nanochat}")
    assert "format" in refused(capsys, "command=export", "format=gguf", f"init.from={nanochat}")
