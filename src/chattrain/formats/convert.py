"""Models of other programs, converted into checkpoints of chattrain."""

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
from chattrain.storage.lineage import Ancestor, to_json

log = logging.getLogger("chattrain")

FORMAT_VERSION = 1  # part of the cache key; to be increased when a conversion changes


def read(source: ModelFolder, tokenizer_path: str | None) -> ImportedModel:
    """Read a model of the GPT's architecture. Raises UserError for any other architecture and for broken files."""
    if source.format == FolderFormat.nanochat:
        return nanochat.read(source, Path(tokenizer_path).expanduser() if tokenizer_path else None)
    kind = huggingface.model_type(source.path)
    if kind != "nanochat":
        raise UserError(
            f"{source.path} holds a Hugging Face model of type {kind}, which is trained as it is, without an import: "
            f"model=hf init.from={source.path}"
        )
    return huggingface.read(source.path)


def write(folder: Path, model: ImportedModel, stage: str, config_yaml: str, source: ModelFolder) -> None:
    """Write the model of `source` as a checkpoint of chattrain into `folder`, without optimizer state."""
    state = checkpoint.CheckpointState(
        step=model.step,
        tokens_seen=0,
        supervised_tokens=0,
        stage=stage,
        model=model.sizes,
        data_fingerprint="",
        num_steps=model.step,
        lineage=to_json([Ancestor(stage, str(source.path), imported_from=source.format.value)]),
    )
    checkpoint.write(folder, state, model.weights, {}, model.tokenizer, config_yaml, {})


def as_checkpoint(source: ModelFolder, tokenizer_path: str | None, cache: Path) -> Path:
    """The folder of a checkpoint converted from another program's model, which is kept in the cache and converted once.

    Raises UserError if the model cannot be read.
    """
    kept = cache / "imported" / _key(source, tokenizer_path)
    if kept.is_dir() and (damage := checkpoint.find_damage(_checkpoint_in(kept))):
        log.warning("%s is damaged (%s) and converted again", kept, damage)
        shutil.rmtree(kept)
    if not kept.is_dir():
        model = read(source, tokenizer_path)
        stage = source.stage or "imported"
        make_folder(kept, lambda scratch: write(scratch / f"step_{model.step:06d}", model, stage, _config_yaml(model), source))
        log.info("%s was converted into a checkpoint, cached in %s", source.path, kept)
    return _checkpoint_in(kept)


def _checkpoint_in(kept: Path) -> Path:
    """The checkpoint folder in an entry of the cache."""
    return next(iter(kept.glob("step_*")), kept)


def _config_yaml(model: ImportedModel) -> str:
    sizes = {name: size for name, size in model.sizes.items() if name != "vocab_size"}
    return json.dumps({"model": sizes, "train": {"seq_len": model.seq_len}}, indent=1) + "\n"  # JSON is YAML


def _key(source: ModelFolder, tokenizer_path: str | None) -> str:
    """A hash of the files' paths, sizes and times. Hashing their contents would read a large model twice."""
    tokenizer_dir = Path(tokenizer_path).expanduser() if tokenizer_path else None
    folders = [source.path, source.path / "tokenizer", source.tokenizer, tokenizer_dir]
    files = {f.resolve() for folder in folders if folder and folder.is_dir() for f in folder.iterdir() if f.is_file()}
    facts = [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(files)]
    return hashlib.sha256(json.dumps([FORMAT_VERSION, facts]).encode()).hexdigest()[:24]
