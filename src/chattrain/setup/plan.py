"""What is decided and made once, before any process trains: run folder, start, tokenizer, token caches, number of steps.

The user's mistakes are found here, before the run folder exists.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from chattrain.config import Config
from chattrain.config.run import RunConfig
from chattrain.config.schema import to_yaml
from chattrain.config.words import Resume
from chattrain.device import pick_device
from chattrain.model import fp8
from chattrain.parallel import launch
from chattrain.setup.data import RunData, open_data
from chattrain.setup.names import launch_name
from chattrain.setup.resume import check_resumed, find_resume, move_aside
from chattrain.setup.start import Start, check_start, find_start
from chattrain.setup.tokenizer import choose_tokenizer
from chattrain.storage.files import replace_text


@dataclass(frozen=True)
class RunSetup:
    """What was decided; every process gets it."""

    run_dir: Path
    start: Start
    resume: Path | None  # checkpoint to resume from; None: the run starts anew
    tokenizer_dir: Path
    finished: dict | None = None  # summary of a run that has nothing left to do


def setup_run(cfg: Config, world_size: int) -> tuple[RunSetup, RunData]:
    """Set the run up, and open its data. Raises UserError before anything is written for this run, except caches."""
    cfg.train.rows_a_step(world_size)
    device = pick_device(cfg.train.device)
    launch.check_devices(device, world_size)
    if cfg.train.fp8:
        fp8.check(device)
    run_dir = choose_run_dir(cfg.run, cfg.stage)
    resume = find_resume(cfg.run.resume, run_dir)
    start = Start(resume, f"{resume} (resumed)") if resume else find_start(cfg)
    check_start(cfg.model, start.checkpoint, cfg.train.seq_len)
    tokenizer_dir = choose_tokenizer(cfg, start.checkpoint)
    data = open_data(cfg, tokenizer_dir, world_size)
    finished = check_resumed(cfg, run_dir, resume, data) if resume else None
    if cfg.run.resume == Resume.never:
        move_aside(run_dir)
    if finished is None:
        run_dir.mkdir(parents=True, exist_ok=True)
        replace_text(run_dir / "config.yaml", to_yaml(cfg))
        (run_dir / "summary.json").unlink(missing_ok=True)  # of the part of the run before this one
    return RunSetup(run_dir, start, resume, tokenizer_dir, finished), data


def choose_run_dir(run: RunConfig, stage: str) -> Path:
    """run.dir, or <root>/<stage>/<name>; without run.name the name is that of the launch, which is its time."""
    if run.dir:
        return Path(run.dir).expanduser().resolve()
    return (Path(run.root) / stage / (run.name or launch_name())).resolve()
