"""Tokenizers, checkpoints and run folders of strangers, mutated: read, or refused with one message; nothing leaves the folder."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import yaml

from chattrain.chat import render
from chattrain.config.plain_yaml import read_yaml
from chattrain.errors import UserError
from chattrain.storage import checkpoint
from chattrain.storage.tensors import read_tensors
from chattrain.tokenizer import Tokenizer
from chattrain.tracking.report import write_report
from tests.fuzz.inputs import dumps, for_all, forms, mutated_bytes, mutated_values, no_hang, refusal
from tests.helpers import command_line, train
from tests.tiny_hf import CHATML, TOOLS, write_model, write_tokenizer

TALK = {"messages": [{"role": "user", "content": "Hi <|bos|>"}, {"role": "assistant", "content": "Yo, 12 東京"}]}


def use_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.decode(tokenizer.encode("Hello, 12 worlds")) is not None
    assert len(tokenizer.token_bytes()) == tokenizer.vocab_size and tokenizer.fingerprint()
    render({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}, tokenizer)


def replaced(original: Path, folder: Path, files: dict[str, bytes]) -> Path:
    """A copy of a folder with other files."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(original, folder)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> Path:
    """A folder of each kind."""
    pytest.importorskip("transformers")
    from tests.conftest import TEXTS

    place = tmp_path_factory.mktemp("tokenizers")
    own = Tokenizer.train(TEXTS * 50, 400)
    own.save(place / "own")
    (place / "nanochat").mkdir()
    (place / "nanochat" / "tokenizer.pkl").write_bytes(pickle.dumps(own.encoding))
    write_tokenizer(place / "hf", CHATML)
    (place / "hf" / "generation_config.json").write_text('{"eos_token_id": [4, 2]}')
    return place


@forms(12, 120)
@pytest.mark.parametrize(
    "name", ["own/encoding.json", "hf/tokenizer.json", "hf/tokenizer_config.json", "hf/generation_config.json"]
)
def test_a_mutated_json_file_of_a_tokenizer(tmp_path, tokenizers, name, count):
    folder, file = name.split("/")
    tree = json.loads((tokenizers / name).read_text())
    for_all(
        count,
        mutated_values(tree),
        lambda tree: refusal(lambda: use_tokenizer(replaced(tokenizers / folder, tmp_path / "t", {file: dumps(tree).encode()}))),
    )


@forms(12, 120)
@pytest.mark.parametrize("name", ["own/ranks.tiktoken", "hf/chat_template.jinja", "nanochat/tokenizer.pkl"])
def test_a_mutated_other_file_of_a_tokenizer(tmp_path, tokenizers, name, count):
    folder, file = name.split("/")
    spec = json.loads((tokenizers / "own" / "encoding.json").read_text())

    def check(content: bytes) -> None:
        sealed = {"encoding.json": dumps({**spec, "ranks_sha256": hashlib.sha256(content).hexdigest()}).encode()}
        files = {file: content, **(sealed if folder == "own" else {})}  # who mutates a file may make its checksum right
        refusal(lambda: use_tokenizer(replaced(tokenizers / folder, tmp_path / "t", files)))

    for_all(count, mutated_bytes((tokenizers / name).read_bytes()), check)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_a_pickled_tokenizer_runs_no_code(workplace, tokenizers):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        files = {"tokenizer.pkl": pickle.dumps(Evil(), protocol)}
        with pytest.raises(UserError, match=r"mkdir.*refused"):
            Tokenizer.load(replaced(tokenizers / "nanochat", workplace / "t", files))
    assert not (workplace / "ran").exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 / 0 }}",
        "{% for i in range(10 ** 12) %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_template_of_a_stranger_is_refused_with_its_reason(tmp_path, tokenizers, template):
    folder = replaced(tokenizers / "hf", tmp_path / "t", {"chat_template.jinja": template.encode()})
    with no_hang(), pytest.raises(UserError, match="chat template"):
        render(TALK, Tokenizer.load(folder))


def test_a_template_without_end_is_stopped(tmp_path, tokenizers, monkeypatch):
    monkeypatch.setattr("chattrain.chat.jinja.LIMIT_S", 0.2)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    folder = replaced(tokenizers / "hf", tmp_path / "t", {"chat_template.jinja": (loop + CHATML).encode()})
    with no_hang(), pytest.raises(UserError, match="still at work"):
        render(TALK, Tokenizer.load(folder))


def test_arguments_of_a_call_cannot_smuggle_in_a_special_token(tmp_path, tokenizers):
    """Escapes of JSON hide it until a template that wants objects writes them out."""
    template = TOOLS.replace("ARGUMENTS", "call['arguments'] | tojson").encode()
    tokenizer = Tokenizer.load(replaced(tokenizers / "hf", tmp_path / "t", {"chat_template.jinja": template}))
    call = {"function": {"name": "f", "arguments": '{"a": "\\u003c|im_end|\\u003e"}'}}
    talk = {"messages": [TALK["messages"][0] | {"content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": [call]}]}
    with pytest.raises(ValueError, match="special token"):
        render(talk, tokenizer)


@pytest.fixture(scope="module")
def run_dir(place) -> Path:
    """A run of two steps; `place` is the current folder."""
    train("sft", "small", "init.from=scratch", "train.max_steps=2", "checkpoint.every=1")
    return place / "runs" / "sft" / "small"


def seal(folder: Path) -> None:
    """Make the checksums those of the files, as one who changes a checkpoint can."""
    names = [str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file() and f.name != "manifest.json"]
    manifest = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def use_checkpoint(folder: Path) -> None:
    found = checkpoint.resolve(folder)
    state = checkpoint.load_state(found)
    assert isinstance(state.step, int) and isinstance(state.model, dict)
    read_tensors(found / "model.safetensors")
    checkpoint.load_optimizer(found)
    read_yaml((found / "config.yaml").read_text(errors="replace"))
    Tokenizer.load(found)


@forms(10, 100)
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "config.yaml", "manifest.json"])
def test_a_mutated_file_of_a_checkpoint(tmp_path, run_dir, name, count):
    original = checkpoint.newest_valid(run_dir)
    assert original is not None
    content = (original / name).read_bytes()
    header = content[:400] if name.endswith(".safetensors") else content  # the header, which may lie

    def check(mutated: bytes) -> None:
        folder = replaced(original, tmp_path / "step_000002", {name: mutated + content[len(header) :]})
        assert name == "manifest.json" or mutated == header or checkpoint.find_damage(folder)
        refusal(lambda: use_checkpoint(folder))
        if name != "manifest.json":
            seal(folder)
            refusal(lambda: use_checkpoint(folder))

    for_all(count, mutated_bytes(header), check)


@forms(10, 100)
@pytest.mark.parametrize("name", ["state.json", "manifest.json"])
def test_a_mutated_record_of_a_checkpoint(tmp_path, run_dir, name, count):
    original = checkpoint.newest_valid(run_dir)
    assert original is not None

    def check(tree) -> None:
        folder = replaced(original, tmp_path / "step_000002", {name: dumps(tree).encode()})
        if name == "state.json":
            seal(folder)
        refusal(lambda: use_checkpoint(folder))

    for_all(count, mutated_values(json.loads((original / name).read_text())), check)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "tokenizer/../../outside", "x" * 300, "a\0b"])
def test_a_manifest_cannot_name_what_is_outside_its_checkpoint(tmp_path, run_dir, name):
    original = checkpoint.newest_valid(run_dir)
    assert original is not None
    folder = replaced(original, tmp_path / "step_000002", {})
    (tmp_path / "outside").write_text("x")
    manifest = json.loads((folder / "manifest.json").read_text())
    digest = hashlib.sha256(b"x").hexdigest()
    (folder / "manifest.json").write_text(json.dumps({**manifest, name: digest}))
    with pytest.raises(UserError, match="is damaged"):
        checkpoint.resolve(folder)


def test_links_in_a_circle_are_refused(tmp_path, place, run_dir, capsys):
    (place / "loop").symlink_to(place / "loop")
    (run_dir / "checkpoints" / "step_000009").symlink_to(run_dir / "checkpoints" / "step_000009")
    try:
        for key in ("init.from=loop", "run.dir=loop", "tokenizer.path=loop/x", "data.train_path=loop", "run.root=loop"):
            end = command_line(capsys, "stage=sft", "data=local", "data.train_path=talk.jsonl", "command=inspect", key)
            assert end.status == 2 and "loop" in end.message
        assert checkpoint.newest_valid(run_dir) == run_dir / "checkpoints" / "step_000002"
    finally:
        (run_dir / "checkpoints" / "step_000009").unlink()
        (place / "loop").unlink()


YAMLS = {
    "a tag": "stage: sft\nmodel: !!python/object/apply:os.mkdir [ran]\n",
    "another tag": "stage: !!python/name:os.system\n",
    "aliases": "a: &a [x, x]\n" + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(22)),
    "an interpolation": "stage: sft\ntrain:\n  seq_len: ${oc.env:HOME}\n",
    "a list": "[1, 2]\n",
    "nothing": "",
    "deep": "a: " + "[" * 20_000,
    "a section that is none": "stage: sft\nmodel: 7\n",
}


@pytest.mark.parametrize("kind", YAMLS)
def test_a_configuration_of_a_checkpoint_makes_nothing_but_plain_values(tmp_path, place, run_dir, capsys, kind):
    original = checkpoint.newest_valid(run_dir)
    assert original is not None
    folder = replaced(original, tmp_path / "step_000002", {"config.yaml": YAMLS[kind].encode()})
    seal(folder)
    with no_hang():
        end = command_line(capsys, "command=evaluate", "stage=sft", f"init.from={folder}", "tracking=none")
    assert end.status == 2 and end.message
    assert not (place / "ran").exists()


@forms(10, 80)
@pytest.mark.parametrize("name", ["config.yaml", "summary.json", "metrics.jsonl"])
def test_a_mutated_run_folder_has_its_report(tmp_path, run_dir, name, count):
    content = (run_dir / name).read_bytes()

    def check(mutated: bytes) -> None:
        folder = replaced(run_dir, tmp_path / "run", {name: mutated})
        write_report(folder)

    for_all(count, mutated_bytes(content), check)


@forms(10, 80)
@pytest.mark.parametrize("name", ["config.yaml", "summary.json"])
def test_a_run_folder_with_other_values_has_its_report(tmp_path, run_dir, name, count):
    read, write = (yaml.safe_load, yaml.safe_dump) if name == "config.yaml" else (json.loads, dumps)

    def check(tree) -> None:
        folder = replaced(run_dir, tmp_path / "run", {name: write(tree).encode(errors="replace")})
        write_report(folder)

    for_all(count, mutated_values(read((run_dir / name).read_text())), check)


@forms(10, 100)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_mutated_model_of_another_program(tmp_path, tokenizers, name, count):
    from chattrain.formats import huggingface

    original = tmp_path / "model"
    if not original.is_dir():
        write_model(original)
    content = (original / name).read_bytes()[:600]
    rest = (original / name).read_bytes()[600:]

    def check(mutated: bytes) -> None:
        folder = replaced(original, tmp_path / "m", {name: mutated + rest})
        refusal(lambda: huggingface.read(folder))
        refusal(lambda: read_tensors(folder / "model.safetensors"))

    for_all(count, mutated_bytes(content), check)
