"""What a run starts from: `init.from`, resolved to a checkpoint or to random weights, never silently."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from chattrain import checkpoint, importing
from chattrain.config import InitConfig
from chattrain.errors import UserError
from chattrain.model.config import HFModelConfig, ModelConfig

log = logging.getLogger("chattrain")


@dataclass(frozen=True)
class Start:
    """Where the weights come from; `checkpoint` None means random weights."""

    checkpoint: Path | None
    description: str  # goes into the log and summary.json
    warning: str | None = None  # what auto fell back to, said when all else is known to be right


def resolve(init: InitConfig, root: Path, model: ModelConfig | None, tokenizer_path: str | None, cache: Path) -> Start:
    """`model` None: any will do. A folder of another program is converted into a checkpoint, kept in `cache`; one of
    Hugging Face under model=hf is taken as it is.

    Raises UserError for a folder that is no model or of another shape, and where strict forbids a fallback.
    """
    if init.source in ("scratch", "auto"):
        start = _auto(init, root, model) if init.source == "auto" else Start(None, "random weights (init.from=scratch)")
        if start.checkpoint is None and isinstance(model, HFModelConfig):
            raise UserError(f"init.from={init.source} finds no weights, and model=hf has none of its own; name a Hugging Face "
                            "folder or hub name with init.from")
        return start
    try:
        folder = importing.find_folder(init.source).resolve()
        if isinstance(model, HFModelConfig) and importing.is_huggingface(folder):
            return Start(folder, str(folder))
        if importing.is_foreign(folder):
            found = importing.as_checkpoint(folder, tokenizer_path, cache)
        elif hint := importing.hint(folder):
            raise UserError(f"it holds no model{hint}")
        else:
            found = checkpoint.resolve(Path(init.source).expanduser())
    except UserError as error:
        raise UserError(f"init.from={init.source}: {error}") from error
    misfit = shape_misfit(found, model) if model is not None else None
    if misfit:
        raise UserError(f"init.from={init.source} holds another model: {misfit}; choose the model it holds "
                        "(model=...) or another checkpoint")
    return Start(found.resolve(), str(folder if importing.is_foreign(folder) else found.resolve()))


def _auto(init: InitConfig, root: Path, model: ModelConfig) -> Start:
    if not init.after:
        return Start(None, "random weights")
    first, *others = init.after
    found = newest_finished(root, first, model)
    if found:
        return Start(found, str(found))
    missing = f"no finished {first} run of this model in {root.resolve()}"
    if init.strict:
        raise UserError(f"init.strict=true and {missing}; train stage={first} first, or name a folder with "
                        "init.from=<run or checkpoint>")
    for stage in others:
        found = newest_finished(root, stage, model)
        if found:
            return Start(found, str(found), f"init.from=auto: {missing}. STARTING FROM THE {stage.upper()} "
                         f"RUN {found}: what {first} would have taught is missing. init.strict=true refuses this")
    return Start(None, "random weights (nothing to start from)", f"init.from=auto: {missing}. STARTING FROM RANDOM "
                 "WEIGHTS: the model knows no language, expect poor results. init.strict=true refuses this")


def newest_finished(root: Path, stage: str, model: ModelConfig | None) -> Path | None:
    """Newest valid checkpoint of the newest finished run of a stage whose model has this shape (None: any)."""
    runs = []
    for file in (root.resolve() / stage).glob("*/summary.json"):
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
    return model.misfit(checkpoint.load_state(folder).model)
