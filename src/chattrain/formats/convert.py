"""Models of other programs, converted into checkpoints of ours."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from pathlib import Path

from chattrain.errors import UserError
from chattrain.formats import huggingface, nanochat
from chattrain.formats.imported import FolderFormat, ImportedModel, ModelFolder
from chattrain.storage import checkpoint
from chattrain.storage.files import make_folder

log = logging.getLogger("chattrain")

FORMAT_VERSION = 1  # part of the cache's key; raised when a conversion changes


def read(found: ModelFolder, tokenizer_path: str | None) -> ImportedModel:
    """A model of the GPT's architecture. Raises UserError for any other, and for files that are broken."""
    if found.format == FolderFormat.nanochat:
        return nanochat.read(found, Path(tokenizer_path).expanduser() if tokenizer_path else None)
    kind = huggingface.model_type(found.path)
    if kind != "nanochat":
        raise UserError(
            f"{found.path} holds a Hugging Face model of type {kind}, which is trained as it is, without an import: "
            f"model=hf init.from={found.path}"
        )
    return huggingface.read(found.path)


def write(folder: Path, model: ImportedModel, stage: str, config_yaml: str) -> None:
    """The model as a checkpoint of ours in `folder`, with no optimizer state."""
    state = checkpoint.CheckpointState(
        step=model.step,
        tokens_seen=0,
        supervised_tokens=0,
        stage=stage,
        model=model.sizes,
        data_fingerprint="",
        num_steps=model.step,
    )
    checkpoint.write(folder, state, model.weights, {}, model.tokenizer, config_yaml, {})


def as_checkpoint(found: ModelFolder, tokenizer_path: str | None, cache: Path) -> Path:
    """The model of another program's folder as a checkpoint, converted once and kept in the cache. Raises UserError where it
    cannot be read."""
    kept = cache / "imported" / _key(found, tokenizer_path)
    if kept.is_dir() and (damage := checkpoint.find_damage(_only(kept))):
        log.warning("%s is damaged (%s) and made anew", kept, damage)
        shutil.rmtree(kept)
    if not kept.is_dir():
        model = read(found, tokenizer_path)
        stage = found.stage or "imported"
        make_folder(kept, lambda scratch: write(scratch / f"step_{model.step:06d}", model, stage, _config_yaml(model)))
        log.info("%s was converted into a checkpoint, kept in %s", found.path, kept)
    return _only(kept)


def _only(kept: Path) -> Path:
    return next(iter(kept.glob("step_*")), kept)


def _config_yaml(model: ImportedModel) -> str:
    sizes = {name: size for name, size in model.sizes.items() if name != "vocab_size"}
    return json.dumps({"model": sizes, "train": {"seq_len": model.seq_len}}, indent=1) + "\n"  # JSON is YAML


def _key(found: ModelFolder, tokenizer_path: str | None) -> str:
    """Of what the files are: names, sizes, times. The hash of the bytes would read a large model twice."""
    given = Path(tokenizer_path).expanduser() if tokenizer_path else None
    places = [found.path, found.path / "tokenizer", found.tokenizer, given]
    files = {f.resolve() for place in places if place and place.is_dir() for f in place.iterdir() if f.is_file()}
    facts = [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(files)]
    return hashlib.sha256(json.dumps([FORMAT_VERSION, facts]).encode()).hexdigest()[:24]
