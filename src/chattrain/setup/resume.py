"""Whether a run resumes, from which checkpoint, and whether it still is the same run."""

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
from chattrain.setup.identity import Identity, differences, read_identity
from chattrain.setup.start import shape_misfit
from chattrain.storage import checkpoint

log = logging.getLogger("chattrain")

NOT_COMPARED = (("train", "stop_after"), ("train", "compile"))  # one changes nothing yet, of the other the decision is compared


def find_resume(resume: Resume, run_dir: Path) -> Path | None:
    """The newest valid checkpoint of the run folder, to resume from; None for a run that starts anew.

    Raises UserError where the run has checkpoints but no valid one, and where resume is `must` and there is none.
    """
    if resume == Resume.never:
        return None
    newest = checkpoint.newest_valid(run_dir)
    if newest is None and (damaged := checkpoint.all_checkpoints(run_dir)):
        raise UserError(
            f"none of the {len(damaged)} checkpoints of {run_dir} is valid; restore one, or start anew with "
            "run.resume=never, which moves the folder aside"
        )
    if newest is None and resume == Resume.must:
        raise UserError(
            f"run.resume=must, but {run_dir} has no valid checkpoint; name the run with run.name or "
            "run.dir, or use run.resume=auto"
        )
    return newest


def check_resumed(cfg: Config, run_dir: Path, resume: Path, data: RunData, identity: Identity) -> dict | None:
    """Check that the run resumes as it began. Returns the summary of a run that has nothing left to do, else None.

    Raises UserError for another model, data or optimizer than it began with, for fewer steps than it has completed, and for a
    complete run in whatever differs from what is asked for: its numbers are not the answer.
    """
    state, anew = checkpoint.load_state(resume), "use another run.name, or run.resume=never to start anew"
    begun = read_identity(run_dir, resume)
    changed = ", ".join(differences(begun, identity))
    summary = _completed(run_dir) if state.step >= data.num_steps else None
    if summary is not None and changed:
        raise UserError(f"{run_dir} is complete, with other settings than asked for now: {changed}; {anew}")
    misfit = shape_misfit(resume, cfg.model)
    if misfit or state.data_fingerprint != data.fingerprint:
        began = misfit or f"other data, seed, seq_len or batch size ({changed})"
        raise UserError(f"{run_dir} began with {began}, so it cannot resume as the same run; {anew}")
    if summary is not None:
        log.info(
            "%s is complete (step %d of %d): nothing to do. run.resume=never starts anew", run_dir, state.step, data.num_steps
        )
        return summary
    before, now = (yaml.safe_load(text) for text in ((resume / "config.yaml").read_text(), to_yaml(cfg)))
    _refuse_other_optimizer(run_dir, before["optimizer"]["_target_"], now["optimizer"]["_target_"])
    _warn_of_changes(before, now, begun.compiled, identity.compiled)
    if state.num_steps != data.num_steps:
        log.warning(
            "the run was planned for %d steps, now for %d: the schedule changes from here on",
            state.num_steps,
            data.num_steps,
        )
    if state.step > data.num_steps:
        raise UserError(
            f"{run_dir} is at step {state.step}, beyond the {data.num_steps} steps asked for; ask for more "
            "(train.max_steps, train.num_epochs, train.max_tokens), or use another run.name"
        )
    log.info("resuming from %s (step %d of %d)", resume, state.step, data.num_steps)
    return None


def _completed(run_dir: Path) -> dict | None:
    """The summary of a run that is complete, else None."""
    file = run_dir / "summary.json"
    summary = json.loads(file.read_text()) if file.is_file() else {}
    return summary if summary.get("status") == "completed" else None


def _warn_of_changes(before: dict, now: dict, was_compiled: bool | None, compiled: bool | None) -> None:
    """Log the settings that differ between the configuration the run began with and today's. Of train.compile that is what was
    decided. Keys that an earlier version did not have are not compared."""
    changed = [
        f"{group}.{key} {before[group][key]} -> {value}"
        for group in ("init", "optimizer", "schedule", "train")
        for key, value in now[group].items()
        if key in before[group]
        and before[group][key] != value
        and (group != "init" or key == "from")
        and (group, key) not in NOT_COMPARED
    ]
    if was_compiled is not None and was_compiled != compiled:
        changed.append(f"train.compile {was_compiled} -> {compiled}")
    if changed:
        log.warning("the run resumes with other settings than it began with: %s", ", ".join(changed))


def _refuse_other_optimizer(run_dir: Path, before: str, now: str) -> None:
    if recorded_target(before) != recorded_target(now):
        raise UserError(
            f"{run_dir} began with the optimizer {before}, so it cannot resume "
            f"with {now}; use another run.name, or run.resume=never to start anew"
        )


def move_aside(run_dir: Path) -> None:
    """Rename a run folder that is not empty to `<run_dir>.old1` (or .old2, ...), so that a new run can take its name."""
    if not run_dir.exists() or not any(run_dir.iterdir()):
        return
    number = 1
    while (old := run_dir.with_name(f"{run_dir.name}.old{number}")).exists():
        number += 1
    run_dir.rename(old)
    log.warning("the earlier contents of %s are now in %s", run_dir, old)
