"""What a run starts from: `init.from`, resolved to a checkpoint or to random weights, never silently."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from chattrain import checkpoint
from chattrain.config import InitConfig, ModelConfig
from chattrain.errors import UserError

log = logging.getLogger("chattrain")


@dataclass(frozen=True)
class Start:
    """Where the weights come from; `checkpoint` None means random weights."""

    checkpoint: Path | None
    description: str  # goes into the log and summary.json


def resolve(init: InitConfig, root: Path, model: ModelConfig) -> Start:
    """Raises UserError for a folder that is no checkpoint or of another shape, and where strict forbids a fallback."""
    if init.source == "scratch":
        return Start(None, "random weights (init.from=scratch)")
    if init.source != "auto":
        folder = checkpoint.resolve(Path(init.source).expanduser())
        misfit = shape_misfit(folder, model)
        if misfit:
            raise UserError(f"init.from={init.source} holds another model: {misfit}; choose the model it holds "
                            "(model=...) or another checkpoint")
        return Start(folder, str(folder))
    return _auto(init, root, model)


def _auto(init: InitConfig, root: Path, model: ModelConfig) -> Start:
    if not init.after:
        return Start(None, "random weights")
    for stage in init.after:
        found = newest_finished(root, stage, model)
        if found is None:
            continue
        if stage != init.after[0]:
            _fall_back(init, f"no finished {init.after[0]} run of this model in {root}", f"the {stage} run {found}",
                       f"what {init.after[0]} would have taught is missing")
        return Start(found, str(found))
    _fall_back(init, f"no finished {' or '.join(init.after)} run of this model in {root}", "random weights",
               "the model knows no language; expect poor results")
    return Start(None, "random weights (nothing to start from)")


def _fall_back(init: InitConfig, missing: str, used: str, cost: str) -> None:
    if init.strict:
        raise UserError(f"init.strict=true and {missing}; train stage={init.after[0]} first, or name a folder with "
                        "init.from=<run or checkpoint>")
    log.warning("init.from=auto: %s. STARTING FROM %s: %s. init.strict=true refuses this.", missing, used.upper()
                if used == "random weights" else used, cost)


def newest_finished(root: Path, stage: str, model: ModelConfig | None) -> Path | None:
    """Newest valid checkpoint of the newest finished run of a stage whose model has this shape (None: any)."""
    runs = []
    for file in (root / stage).glob("*/summary.json"):
        try:
            summary = json.loads(file.read_text())
        except ValueError:
            continue
        if summary.get("status") == "completed":
            runs.append((summary.get("finished_at", 0.0), file.parent))
    for _, run_dir in sorted(runs, reverse=True):
        folder = checkpoint.newest_valid(run_dir)
        if folder is None:
            continue
        misfit = shape_misfit(folder, model) if model is not None else None
        if misfit is None:
            return folder
        log.info("init.from=auto: passing over %s: %s", run_dir, misfit)
    return None


def shape_misfit(folder: Path, model: ModelConfig) -> str | None:
    """How the model asked for differs from the one saved, or None."""
    saved = checkpoint.load_state(folder).model
    asked = {"n_layer": model.n_layer, "n_embd": model.n_embd, "n_head": model.n_head,
             "n_kv_head": model.n_kv_head or model.n_head}
    return ", ".join(f"it has {k}={saved.get(k)}, the config asks for {v}" for k, v in asked.items()
                     if saved.get(k) != v) or None
