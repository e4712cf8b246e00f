"""Whether a run goes on, and from which checkpoint."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import yaml

from chattrain.config import Config
from chattrain.config.schema import to_yaml
from chattrain.config.targets import recorded_target
from chattrain.config.words import Resume
from chattrain.errors import UserError
from chattrain.setup.data import RunData
from chattrain.setup.start import shape_misfit
from chattrain.storage import checkpoint

log = logging.getLogger("chattrain")


def find_resume(resume: Resume, run_dir: Path) -> Path | None:
    """The checkpoint to go on from; None for a run that starts anew.

    Raises UserError where the run has checkpoints and none is whole, and where resume is `must` and there is none.
    """
    found = checkpoint.newest_valid(run_dir) if resume != Resume.never else None
    damaged = checkpoint.all_checkpoints(run_dir)
    if found is None and damaged and resume != Resume.never:
        raise UserError(
            f"none of the {len(damaged)} checkpoints of {run_dir} is whole; restore one, or begin anew with "
            "run.resume=never, which moves the folder aside"
        )
    if resume == Resume.must and found is None:
        raise UserError(
            f"run.resume=must, but {run_dir} has no valid checkpoint; name the run with run.name or "
            "run.dir, or use run.resume=auto"
        )
    return found


def check_resumed(cfg: Config, run_dir: Path, resume: Path, data: RunData) -> dict | None:
    """Check that the run goes on as it began. Returns the summary of a run that has nothing left to do, else None.

    Raises UserError for another model, data or optimizer than it began with, and for fewer steps than it has made.
    """
    state = checkpoint.load_state(resume)
    misfit = shape_misfit(resume, cfg.model)
    if misfit or state.data_fingerprint != data.fingerprint:
        raise UserError(
            f"{run_dir} was begun with {misfit or 'other data, seed, seq_len or batch size'}, so it "
            "cannot go on as the same run; use another run.name, or run.resume=never to start anew"
        )
    before, now = (yaml.safe_load(text) for text in ((resume / "config.yaml").read_text(), to_yaml(cfg)))
    _refuse_other_optimizer(run_dir, before["optimizer"]["_target_"], now["optimizer"]["_target_"])
    changed = [
        f"{group}.{key} {before[group].get(key)} -> {value}"
        for group in ("init", "optimizer", "schedule", "train")
        for key, value in now[group].items()
        if before[group].get(key) != value and (group != "init" or key == "from")
    ]
    if changed:
        log.warning("the run goes on with other settings than it began with: %s", ", ".join(changed))
    if state.num_steps != data.num_steps:
        log.warning(
            "the run was planned for %d steps, now for %d: the schedule is another one from here on",
            state.num_steps,
            data.num_steps,
        )
    summary = run_dir / "summary.json"
    if state.step >= data.num_steps and summary.is_file():
        finished = json.loads(summary.read_text())
        if finished.get("status") == "completed":
            log.info(
                "%s is complete (step %d of %d): nothing to do. run.resume=never starts anew", run_dir, state.step, data.num_steps
            )
            return finished
    if state.step > data.num_steps:
        raise UserError(
            f"{run_dir} is at step {state.step}, beyond the {data.num_steps} steps asked for; ask for more "
            "(train.max_steps, train.num_epochs), or use another run.name"
        )
    log.info("going on from %s (step %d of %d)", resume, state.step, data.num_steps)
    return None


def _refuse_other_optimizer(run_dir: Path, before: str, now: str) -> None:
    if recorded_target(before) != recorded_target(now):
        raise UserError(
            f"{run_dir} was begun with the optimizer {before}, so it cannot go on "
            f"with {now}; use another run.name, or run.resume=never to start anew"
        )


def move_aside(run_dir: Path) -> None:
    """Keep what a folder holds under another name, `<run_dir>.old1`, so that a new run can have its place."""
    if not run_dir.exists() or not any(run_dir.iterdir()):
        return
    number = 1
    while (old := run_dir.with_name(f"{run_dir.name}.old{number}")).exists():
        number += 1
    run_dir.rename(old)
    log.warning("run.resume=never: what %s held is now in %s", run_dir, old)
