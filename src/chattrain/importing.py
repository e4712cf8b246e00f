"""Models in the folders of others: found, and made into a checkpoint of ours."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from pathlib import Path

from chattrain import checkpoint
from chattrain.errors import UserError
from chattrain.files import make_folder
from chattrain.formats import Foreign, huggingface, nanochat

log = logging.getLogger("chattrain")

FORMAT_VERSION = 1  # part of the cache's key; raised when a conversion changes
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "model_*.pt", "tokenizer.pkl", "token_bytes.pt"]


def find_folder(name: str) -> Path:
    """The folder that a name means: itself, or a snapshot of the hub's repository. Raises UserError where there is neither."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if not HUB_NAME.fullmatch(name):
        raise UserError(f"{folder} is a file; name its folder" if folder.is_file() else
                        f"no folder {folder}; the path is looked up from {Path.cwd()}, and a hub name is owner/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # of the network, of the hub, of the disk: many kinds, one meaning here
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"there is no folder {name} (looked up from {Path.cwd()}), and the hub gives no repository of that "
                        f"name: {reason[0]}") from error


def hint(folder: Path) -> str:
    """`; did you mean ...?` where a model of nanochat lies one or two folders further down."""
    below = sorted(f for pattern in ("*/model_*.pt", "*/*/model_*.pt") for f in folder.glob(pattern))
    return f"; did you mean {below[0].parent}?" if below else ""


def is_foreign(folder: Path) -> bool:
    """Is it another program's model, and no run or checkpoint of ours?"""
    ours = (folder / "manifest.json").is_file() or (folder / "checkpoints").is_dir()
    return not ours and (nanochat.holds(folder) or huggingface.holds(folder))


def is_huggingface(folder: Path) -> bool:
    return is_foreign(folder) and not nanochat.holds(folder)


def read(folder: Path, tokenizer_path: str | None) -> Foreign:
    """A model of the GPT's architecture. Raises UserError for any other, and for files that are broken."""
    given = Path(tokenizer_path).expanduser() if tokenizer_path else None
    if nanochat.holds(folder):
        return nanochat.read(folder, given)
    kind = huggingface.model_type(folder)
    if kind != "nanochat":
        raise UserError(f"{folder} holds a Hugging Face model of type {kind}, which is trained as it is, without an import: "
                        f"model=hf init.from={folder}")
    return huggingface.read(folder)


def write(folder: Path, model: Foreign, stage: str, config_yaml: str) -> None:
    """The model as a checkpoint of ours in `folder`, with no optimizer state."""
    state = checkpoint.CheckpointState(step=model.step, tokens_seen=0, supervised_tokens=0, stage=stage, model=model.sizes,
                                       data_fingerprint="", num_steps=model.step)
    checkpoint.write(folder, state, model.weights, {}, model.tokenizer, config_yaml, {})


def as_checkpoint(folder: Path, tokenizer_path: str | None, cache: Path) -> Path:
    """The model of another program's folder as a checkpoint, converted once and kept in the cache. Raises UserError where it
    cannot be read."""
    kept = cache / "imported" / _key(folder, tokenizer_path)
    if kept.is_dir() and (damage := checkpoint.find_damage(_only(kept))):
        log.warning("%s is damaged (%s) and made anew", kept, damage)
        shutil.rmtree(kept)
    if not kept.is_dir():
        model = read(folder, tokenizer_path)
        stage = nanochat.stage_of(folder) or "imported"
        make_folder(kept, lambda scratch: write(scratch / f"step_{model.step:06d}", model, stage, _config_yaml(model)))
        log.info("%s was converted into a checkpoint, kept in %s", folder, kept)
    return _only(kept)


def _only(kept: Path) -> Path:
    return next(iter(kept.glob("step_*")), kept)


def _config_yaml(model: Foreign) -> str:
    sizes = {name: size for name, size in model.sizes.items() if name != "vocab_size"}
    return json.dumps({"model": sizes, "train": {"seq_len": model.seq_len}}, indent=1) + "\n"  # JSON is YAML


def _key(folder: Path, tokenizer_path: str | None) -> str:
    """Of what the files are: names, sizes, times. The hash of the bytes would read a large model twice."""
    given = Path(tokenizer_path).expanduser() if tokenizer_path else None
    places = [folder, folder / "tokenizer", nanochat.tokenizer_folder(folder), given]
    files = {f.resolve() for place in places if place and place.is_dir() for f in place.iterdir() if f.is_file()}
    facts = [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(files)]
    return hashlib.sha256(json.dumps([FORMAT_VERSION, facts]).encode()).hexdigest()[:24]
