"""What a run starts from: `init.from`, resolved to a checkpoint or to random weights. A fallback is never silent."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, replace
from pathlib import Path

from chattrain.config import Config
from chattrain.config.model import HFModelConfig, ModelConfig
from chattrain.config.run import InitConfig
from chattrain.config.saved import with_saved
from chattrain.config.words import Command
from chattrain.errors import UserError
from chattrain.formats.convert import as_checkpoint
from chattrain.formats.folder import hint, locate
from chattrain.formats.imported import FolderFormat
from chattrain.model import hf
from chattrain.setup.job import current_job
from chattrain.setup.opening import cache_dir
from chattrain.setup.runs import (
    check_stage,
    newest_finished,
    newest_to_read,
    no_run,
    reference_of,
    shape_misfit,
    stage_of,
    start_of,
    typed,
)
from chattrain.storage import checkpoint

log = logging.getLogger("chattrain")


@dataclass(frozen=True)
class Start:
    """Where the weights come from; `checkpoint` None means random weights."""

    checkpoint: Path | None  # a checkpoint of ours; with model=hf it may be a Hugging Face folder
    description: str  # goes into the log and summary.json
    warning: str | None = None  # what auto fell back to; logged only once nothing else can be refused


def find_start(cfg: Config, any_model: bool = False) -> Start:
    """Resolve init.from. Raises UserError where it names no model, or (without any_model) one of another shape than cfg.model."""
    return resolve(cfg.init, Path(cfg.run.root), None if any_model else cfg.model, cfg.tokenizer.path, cache_dir(cfg.data))


def resolve(init: InitConfig, root: Path, model: ModelConfig | None, tokenizer_path: str | None, cache: Path) -> Start:
    """Resolve init.from against the runs in `root`. `model` None: a model of any shape is accepted.

    A folder of another program is converted into a checkpoint, which is kept in `cache`; with model=hf a Hugging Face folder is
    used as it is. Raises UserError for a folder that holds no model or one of another shape, and where init.strict forbids a
    fallback.
    """
    if init.source in ("scratch", "auto"):
        start = _auto(init, root, model) if init.source == "auto" else Start(None, "random weights (init.from=scratch)")
        if start.checkpoint is None and isinstance(model, HFModelConfig):
            raise UserError(
                f"init.from={init.source} finds no weights, and model=hf cannot start from random ones; name a Hugging Face "
                "folder or hub name with init.from"
            )
        return start
    try:
        source = start_of(init.source, root)
        located = locate(source)
        if isinstance(model, HFModelConfig) and located.format == FolderFormat.huggingface:
            return Start(located.path, str(located.path))
        if located.is_foreign:
            folder = as_checkpoint(located, tokenizer_path, cache)
        elif nearby := hint(located.path):
            raise UserError(f"it holds no model{nearby}")
        else:
            folder = checkpoint.resolve(Path(source).expanduser(), init.pick)
    except UserError as error:
        unknown = "/" not in init.source and not Path(init.source).exists()
        also = f"; {no_run(init.source, root, None)}" if unknown else ""
        raise UserError(f"init.from={init.source}: {error}{also}") from error
    misfit = shape_misfit(folder, model) if model is not None else None
    if misfit:
        raise UserError(
            f"init.from={init.source} holds another model: {misfit}; choose the model it holds (model=...) or another checkpoint"
        )
    return Start(folder.resolve(), str(located.path if located.is_foreign else folder.resolve()))


def find_checkpoint(cfg: Config) -> Path:
    """The checkpoint that a command reads: of the run, checkpoint or model folder that the command line names, else of the newest
    finished run of the stage, which is then logged.

    The model must be that of the configuration only where the command line chooses one. Raises UserError where there is none.
    """
    reference = reference_of(cfg)
    if reference is None:
        return newest_to_read(cfg)
    if cfg.command != Command.evaluate:  # which measures any checkpoint as another stage would, and says so
        check_stage(cfg, stage_of(Path(reference)), Path(reference))
    model = cfg.model if typed("model") else None
    start = resolve(start_at(cfg.init, reference), Path(cfg.run.root), model, cfg.tokenizer.path, cache_dir(cfg.data))
    assert start.checkpoint is not None  # only init.from=auto and scratch have none
    return start.checkpoint


def with_own_settings(cfg: Config, folder: Path, overrides: list[str] | None = None) -> Config:
    """The configuration to use the checkpoint `folder` with: its own settings, except what `overrides` give (None: those of the
    command line).

    A folder without a config.yaml (Hugging Face's, with model=hf) is used with the configuration as it is.
    """
    file, job = folder / "config.yaml", current_job()
    own = (
        with_saved(cfg, file, job.overrides if overrides is None else overrides, job.config_dirs)
        if file.is_file()
        else copy.copy(cfg)
    )
    own.check()
    own.init, own.run = start_at(cfg.init, str(folder)), replace(cfg.run, name=None, dir=None)
    return own


def start_at(init: InitConfig, reference: str) -> InitConfig:
    """The same, with `reference` as init.from."""
    named = InitConfig(strict=init.strict, after=init.after, pick=init.pick)
    setattr(named, "from", reference)
    return named


def check_start(model: ModelConfig, start: Path | None, seq_len: int) -> None:
    """Raises UserError where a run with rows of seq_len tokens cannot start from the folder."""
    if isinstance(model, HFModelConfig) and start is not None:
        hf.check_start(start, seq_len)


def _auto(init: InitConfig, root: Path, model: ModelConfig | None) -> Start:
    """The newest finished run of the first of init.after, else, with a warning, of a later one, else random weights."""
    if not init.after:
        return Start(None, "random weights")
    first, *others = init.after
    newest = newest_finished(root, first, model, init.pick)
    if newest:
        return Start(newest, str(newest))
    missing = f"no finished {first} run of this model in {root.resolve()}"
    if init.strict:
        raise UserError(
            f"init.strict=true and {missing}; train stage={first} first, or name a folder with init.from=<run or checkpoint>"
        )
    for stage in others:
        newest = newest_finished(root, stage, model, init.pick)
        if newest:
            return Start(
                newest,
                str(newest),
                f"init.from=auto: {missing}. STARTING FROM THE {stage.upper()} "
                f"RUN {newest}: the model skips what stage={first} teaches. init.strict=true refuses this",
            )
    return Start(
        None,
        "random weights (nothing to start from)",
        f"init.from=auto: {missing}. STARTING FROM RANDOM "
        "WEIGHTS: the model knows no language, expect poor results. init.strict=true refuses this",
    )
