"""Checkpoints: complete or absent, checksummed, self-contained, without pickle.

    checkpoints/step_000200/
        model.safetensors  optimizer.safetensors  state.json  config.yaml  tokenizer/  manifest.json

A checkpoint is written to a hidden folder, synced to disk, then renamed. `manifest.json` holds the SHA-256 of every file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from chattrain.config.words import Pick
from chattrain.errors import RunFailed, UserError
from chattrain.storage.files import read_json
from chattrain.storage.tensors import read_tensors

log = logging.getLogger("chattrain")

FORMAT_VERSION = 1
NEEDED = ("model.safetensors", "optimizer.safetensors", "state.json", "config.yaml")  # files of every checkpoint
STATE_TYPES = {
    **dict.fromkeys(("step", "tokens_seen", "supervised_tokens", "num_steps"), int),
    **dict.fromkeys(("stage", "data_fingerprint"), str),
    "model": dict,
}
SCRATCH = ".writing"  # end of the name of a folder that a checkpoint is written to


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
    skipped: int = 0  # steps that were not finite
    lineage: list[dict[str, Any]] = field(default_factory=list)  # storage/lineage.py; the last entry is this checkpoint
    best: dict[str, Any] | None = None  # metric, value and maximize, if it is the best so far by checkpoint.keep_best


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
    """Write the checkpoint of this step, then remove all but the newest `keep` checkpoints and the best. Returns its folder.

    `config_yaml`: content of config.yaml. `files`: relative path -> text of further files.
    """
    folder = run_dir / "checkpoints" / f"step_{state.step:06d}"
    write(folder, state, weights, optimizer_state, tokenizer, config_yaml, files)
    checkpoints = all_checkpoints(run_dir)
    newest = checkpoints.index(folder) + 1
    damaged = checkpoints[newest:]  # of later steps: had they been valid, the run would have resumed from them
    found = best(run_dir)
    for unused in [*checkpoints[:newest][:-keep], *damaged]:
        if found is None or unused != found[0]:
            shutil.rmtree(unused)
    return folder


def best(run_dir: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that was the best when it was saved, and what makes it so; None: none was kept for that."""
    for folder in reversed(all_checkpoints(run_dir)):
        try:
            found = read_json(folder / "state.json").get("best")
        except UserError:
            continue
        if isinstance(found, dict):
            return folder, found
    return None


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
    remove_leftovers(folder.parent)
    scratch = folder.with_name(f".{folder.name}{SCRATCH}")
    try:
        scratch.mkdir(parents=True)
        _fill(scratch, state, weights, optimizer_state, tokenizer, config_yaml, files)
        before = folder.with_name(f".{folder.name}.before{SCRATCH}")
        if folder.exists():
            folder.rename(before)
        scratch.rename(folder)
        _sync(folder.parent)
        shutil.rmtree(before, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(scratch, ignore_errors=True)
        size = sum(t.numel() * t.element_size() for t in (*weights.values(), *optimizer_state.values()))
        raise RunFailed(
            f"cannot save {folder}: {_reason(error, folder.parent, size)}; earlier checkpoints are as they were"
        ) from error


def remove_leftovers(folder: Path) -> None:
    """Remove what a process that was killed while it wrote a checkpoint has left in the folder of checkpoints."""
    for scratch in folder.glob(f".*{SCRATCH}"):
        shutil.rmtree(scratch, ignore_errors=True)


def _reason(error: OSError | SafetensorError, folder: Path, size: int) -> str:
    """Why a checkpoint of `size` bytes could not be written, in words."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    if not full:
        return str(error) if isinstance(error, SafetensorError) else error.strerror or str(error)
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(there).free
    return f"no space left on device (it needs about {size / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB are free)"


def _fill(
    scratch: Path,
    state: CheckpointState,
    weights: dict[str, Tensor],
    optimizer_state: dict[str, Tensor],
    tokenizer: Savable,
    config_yaml: str,
    files: dict[str, str],
) -> None:
    """Write all files of a checkpoint into an empty folder, and sync them to disk."""
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
    for f in [*written, scratch / "manifest.json", *(d for d in scratch.rglob("*") if d.is_dir()), scratch]:
        _sync(f)


def all_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first."""
    folders = [f for f in (run_dir / "checkpoints").glob("step_*") if re.fullmatch(r"step_[0-9]{1,18}", f.name)]
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
    """What is wrong with the files of a checkpoint; None: all files of its manifest exist and have the right checksum, and those
    that every checkpoint has are among them."""
    try:
        manifest = read_json(folder / "manifest.json")
    except UserError:
        return "no readable manifest.json"
    if missing := [name for name in NEEDED if name not in manifest]:
        return f"manifest.json names no {missing[0]}"
    for name, expected in manifest.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            return f"manifest.json names {name!r:.100}, which is outside the checkpoint"
        try:
            if _sha256(folder / name) != expected:
                return f"{name} has another checksum"
        except FileNotFoundError:
            return f"{name} is missing"
        except (OSError, ValueError) as error:  # ValueError: NUL in a name
            return f"{name!r:.100} cannot be read: {getattr(error, 'strerror', None) or error}"
    return None


def load_state(folder: Path) -> CheckpointState:
    """The content of state.json. Raises UserError if its format is newer than this version can read, or is none."""
    state = read_json(folder / "state.json")
    version = state.get("format_version", 0)
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise UserError(
            f"{folder} has format_version {version}, this chattrain reads up to {FORMAT_VERSION}; install a newer one"
        )
    known = {field.name: state[field.name] for field in fields(CheckpointState) if field.name in state}
    for name, kind in STATE_TYPES.items():
        if type(state.get(name)) is not kind:
            raise UserError(
                f"{folder / 'state.json'}: {name}={state.get(name)!r:.80} is no {kind.__name__}; take another checkpoint"
            )
    return CheckpointState(**known)


def load_optimizer(folder: Path) -> dict[str, Tensor]:
    """Raises UserError if the file is none of tensors."""
    return read_tensors(folder / "optimizer.safetensors")


def resolve(path: Path, pick: Pick = Pick.last) -> Path:
    """The checkpoint at a path: the folder itself, or of a run folder the newest valid checkpoint or the best one.

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
    if newest is not None and pick == Pick.best:
        return best_valid(path)
    if newest is None:
        raise UserError(
            f"{path} is neither a checkpoint nor a run with a valid one: it holds no manifest.json "
            "and no valid checkpoints/step_*"
        )
    return newest


def best_valid(run_dir: Path) -> Path:
    """The best checkpoint of a run. Raises UserError if none was kept, or it is damaged."""
    found = best(run_dir)
    if found is None:
        raise UserError(f"init.pick=best, but {run_dir} has kept no best checkpoint; train it with checkpoint.keep_best=<metric>")
    damage = find_damage(found[0])
    if damage:
        raise UserError(f"init.pick=best, but the best checkpoint, {found[0]}, is damaged: {damage}; use init.pick=last")
    return found[0]


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
