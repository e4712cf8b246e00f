"""Checkpoints: complete or absent, checksummed, self-contained, without pickle.

    checkpoints/step_000200/
        model.safetensors  optimizer.safetensors  state.json  config.yaml  tokenizer/  manifest.json

A checkpoint is written to a hidden folder, synced to disk, then renamed. `manifest.json` holds the SHA-256 of every file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import load_file, save_file
from torch import Tensor

from chattrain.errors import UserError

log = logging.getLogger("chattrain")

FORMAT_VERSION = 1


class Savable(Protocol):
    """The tokenizer, as far as a checkpoint needs to know it."""

    def save(self, folder: Path) -> None:
        """Write to the folder all files that loading needs."""


@dataclass
class CheckpointState:
    """state.json: everything that is not a tensor."""

    step: int
    tokens_seen: int
    supervised_tokens: int
    stage: str
    model: dict[str, Any]  # `shape` of the model: its sizes, vocab_size included
    data_fingerprint: str
    num_steps: int
    mlflow_run_id: str | None = None
    format_version: int = FORMAT_VERSION
    metrics: dict[str, float | None] = field(default_factory=dict)
    loss_weight: float | None = None  # None: an earlier version's, in which every target weighs 1


def save(
    run_dir: Path,
    state: CheckpointState,
    weights: dict[str, Tensor],
    optimizer_state: dict[str, Tensor],
    tokenizer: Savable,
    config_yaml: str,
    keep: int,
    files: dict[str, str],
) -> Path:
    """Write the checkpoint of this step, then remove all but the newest `keep` checkpoints. Returns its folder.

    `config_yaml`: content of config.yaml. `files`: relative path -> text of further files.
    """
    folder = run_dir / "checkpoints" / f"step_{state.step:06d}"
    write(folder, state, weights, optimizer_state, tokenizer, config_yaml, files)
    checkpoints = all_checkpoints(run_dir)
    newest = checkpoints.index(folder) + 1
    damaged = checkpoints[newest:]  # of later steps: had they been valid, the run would have resumed from them
    for unused in [*checkpoints[:newest][:-keep], *damaged]:
        shutil.rmtree(unused)
    return folder


def write(
    folder: Path,
    state: CheckpointState,
    weights: dict[str, Tensor],
    optimizer_state: dict[str, Tensor],
    tokenizer: Savable,
    config_yaml: str,
    files: dict[str, str],
) -> None:
    """Write one checkpoint, completely or not at all. It replaces an existing folder. `files`: relative path -> further text."""
    scratch = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    save_file(
        {k: v.detach().contiguous().cpu() for k, v in weights.items()}, scratch / "model.safetensors", metadata={"format": "pt"}
    )
    save_file({k: v.detach().contiguous().cpu() for k, v in optimizer_state.items()}, scratch / "optimizer.safetensors")
    tokenizer.save(scratch / "tokenizer")
    (scratch / "config.yaml").write_text(config_yaml)
    (scratch / "state.json").write_text(json.dumps(state.__dict__, indent=1))
    for name, text in files.items():
        (scratch / name).parent.mkdir(parents=True, exist_ok=True)
        (scratch / name).write_text(text)
    written = sorted(f for f in scratch.rglob("*") if f.is_file())
    manifest = {str(f.relative_to(scratch)): _sha256(f) for f in written}
    (scratch / "manifest.json").write_text(json.dumps(manifest, indent=1))
    for f in [*written, scratch / "manifest.json"]:
        _sync(f)
    if folder.exists():
        shutil.rmtree(folder)
    scratch.rename(folder)
    _sync(folder.parent)


def all_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first."""
    folders = [f for f in (run_dir / "checkpoints").glob("step_*") if f.name.removeprefix("step_").isdigit()]
    return sorted(folders, key=lambda f: int(f.name.removeprefix("step_")))


def newest_valid(run_dir: Path) -> Path | None:
    """The newest valid checkpoint of a run, or None. Damaged ones are skipped with a warning."""
    for folder in reversed(all_checkpoints(run_dir)):
        damage = find_damage(folder)
        if damage is None:
            return folder
        log.warning("checkpoint %s is damaged (%s) and passed over", folder, damage)
    return None


def find_damage(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint; None: all files of its manifest exist and have the right checksum."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError):
        return "no readable manifest.json"
    if not isinstance(manifest, dict) or not manifest:
        return "manifest.json names no file"
    for name, expected in manifest.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _sha256(folder / name) != expected:
            return f"{name} has another checksum"
    return None


def load_state(folder: Path) -> CheckpointState:
    """The content of state.json. Raises UserError if its format is newer than this version can read."""
    state = json.loads((folder / "state.json").read_text())
    if state.get("format_version", 0) > FORMAT_VERSION:
        raise UserError(
            f"{folder} has format_version {state['format_version']}, this chattrain reads up to "
            f"{FORMAT_VERSION}; install a newer one"
        )
    return CheckpointState(**state)


def load_optimizer(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "optimizer.safetensors")


def resolve(path: Path) -> Path:
    """The checkpoint at a path: the folder itself, or the newest valid checkpoint if it is a run folder.

    Raises UserError if there is none or it is damaged.
    """
    if not path.is_dir():
        raise UserError(f"no folder {path}; the path is looked up from {Path.cwd()}")
    if (path / "manifest.json").is_file():
        damage = find_damage(path)
        if damage:
            raise UserError(f"checkpoint {path} is damaged: {damage}; take another one")
        return path
    newest = newest_valid(path)
    if newest is None:
        raise UserError(
            f"{path} is neither a checkpoint nor a run with a valid one: it holds no manifest.json "
            "and no valid checkpoints/step_*"
        )
    return newest


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
