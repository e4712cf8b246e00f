"""What is decided and made once, before any process trains: run folder, start, tokenizer, token caches, number of steps,
compilation.

The user's mistakes are found here, before the run folder exists.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml

from chattrain.config import Config
from chattrain.config.run import RunConfig
from chattrain.config.schema import to_yaml
from chattrain.config.words import Resume
from chattrain.device import pick_device
from chattrain.errors import UserError
from chattrain.model import fp8
from chattrain.parallel import launch
from chattrain.redact import redact_tree
from chattrain.setup.audit import refuse
from chattrain.setup.compilation import Compilation, decide
from chattrain.setup.data import RunData, open_data
from chattrain.setup.identity import contents, differences, identify, read_identity, resumed
from chattrain.setup.job import current_job
from chattrain.setup.lineage import lineage_of_run
from chattrain.setup.names import run_folder
from chattrain.setup.resume import check_resumed, find_resume, move_aside
from chattrain.setup.start import Start, check_start, find_start
from chattrain.setup.tokenizer import choose_tokenizer
from chattrain.storage import checkpoint
from chattrain.storage.files import replace_text
from chattrain.storage.lineage import Ancestor
from chattrain.storage.lock import RunLock
from chattrain.tracking.metrics import read_metrics

log = logging.getLogger("chattrain")


@dataclass(frozen=True)
class RunSetup:
    """What was decided; every process gets it."""

    run_dir: Path
    start: Start
    resume: Path | None  # checkpoint to resume from; None: the run starts anew
    tokenizer_dir: Path
    compilation: Compilation  # is it compiled?
    lineage: list[Ancestor]  # of its checkpoints
    contents: dict[str, str | None]  # of the data: hashes of its parts
    finished: dict | None = None  # summary of a run that has nothing left to do


def setup_run(cfg: Config, world_size: int, lock: RunLock | None = None) -> tuple[RunSetup, RunData]:
    """Set the run up, and open its data. `lock`: of the run folder, taken before anything is written there. Raises UserError
    before anything is written for this run, except caches."""
    cfg.train.rows_a_step(world_size, padded=cfg.collator.has_varying_shapes)
    device = pick_device(cfg.train.device)
    launch.check_devices(device, world_size)
    if cfg.train.fp8:
        fp8.check(device)
    run_dir = choose_run_dir(cfg.run, cfg.stage)
    if lock:
        lock.check()
    resume = find_resume(cfg.run.resume, run_dir)
    setup, data = _open(cfg, world_size, run_dir, resume, device)
    refuse(data.audit, cfg.data.audit)
    identity = identify(cfg, data, None if resume else setup.start, setup.compilation.on)
    aside = cfg.run.resume == Resume.never
    if resume is None and not aside and read_metrics(run_dir / "metrics.jsonl"):
        log.warning("%s has no checkpoint to resume from, so the run begins at step 0", run_dir)
        aside = True
    if resume and _belongs_to_named_sweep(cfg) and (changed := differences(read_identity(run_dir, resume), identity)):
        log.warning("%s was made with other settings (%s); it is moved aside and run anew", run_dir, ", ".join(changed))
        resume, aside = None, True
        setup, data = _open(cfg, world_size, run_dir, resume, device)
        identity = identify(cfg, data, setup.start, setup.compilation.on)
    if resume and (finished := check_resumed(cfg, run_dir, resume, data, identity)):
        return replace(setup, finished=finished), data
    if lock:
        lock.take()
    if aside:
        move_aside(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    checkpoint.remove_leftovers(run_dir / "checkpoints")
    replace_text(run_dir / "config.yaml", to_yaml(cfg))
    if overrides := current_job().overrides:
        command = yaml.safe_dump(redact_tree(overrides), width=1000)
        replace_text(run_dir / "overrides.yaml", command)  # as Hydra's own file
    (resumed(read_identity(run_dir, resume), identity) if resume else identity).write(run_dir)
    (run_dir / "summary.json").unlink(missing_ok=True)  # of the part of the run before this one
    return setup, data


def open_on_rank(cfg: Config, setup: RunSetup, world_size: int) -> RunData:
    """The data of a run that was set up in another process. Raises UserError where it is other data here."""
    data = open_data(cfg, setup.tokenizer_dir, world_size)
    for part, here in contents(data).items():
        if here != setup.contents[part]:
            raise UserError(
                f"the {part} data is not the same in each process: {here} on this rank, {setup.contents[part]} where the run "
                "was set up. Of a source python:<module>.<function>, seed what is random; of a file, start again when nothing "
                "writes it"
            )
    return data


def _open(cfg: Config, world_size: int, run_dir: Path, resume: Path | None, device: torch.device) -> tuple[RunSetup, RunData]:
    """Find the start and the tokenizer, open the data, and decide whether to compile, for a run that resumes from this checkpoint
    (None: begins anew)."""
    start = Start(resume, f"{resume} (resumed)") if resume else find_start(cfg)
    check_start(cfg.model, start.checkpoint, cfg.train.seq_len)
    tokenizer_dir = choose_tokenizer(cfg, start.checkpoint)
    data = open_data(cfg, tokenizer_dir, world_size)
    began_with = read_identity(run_dir, resume).compiled if resume else None
    compilation = decide(cfg, data, start, world_size, device, began_with)
    lineage = lineage_of_run(cfg, run_dir, start.checkpoint, resumes=resume is not None)
    return RunSetup(run_dir, start, resume, tokenizer_dir, compilation, lineage, contents(data)), data


def _belongs_to_named_sweep(cfg: Config) -> bool:
    """A job of a sweep with a name is run anew where its settings have changed; any other run is refused."""
    return cfg.sweep.name is not None and current_job().sweep is not None


def choose_run_dir(run: RunConfig, stage: str) -> Path:
    """run.dir, or <root>/<stage>/<name>; without run.name the name is that of the launch, which is its time."""
    if run.dir:
        return Path(run.dir).expanduser().resolve()
    return run_folder(run.root, stage, run.name)
