"""Whether a run resumes, from which checkpoint, and whether it still is the same run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from chattrain.config import Config
from chattrain.config.changes import flatten
from chattrain.config.on_resume import BY_CONTENT, Change, is_within, on_resume
from chattrain.config.plain_yaml import read_yaml
from chattrain.config.schema import to_yaml
from chattrain.config.targets import recorded_target
from chattrain.config.words import Resume
from chattrain.errors import UserError
from chattrain.setup.data import RunData
from chattrain.setup.identity import Identity, differences, read_identity
from chattrain.setup.learning_rates import build_lr_factor
from chattrain.setup.start import shape_misfit
from chattrain.storage import checkpoint
from chattrain.storage.files import read_json

log = logging.getLogger("chattrain")

# Keys whose change explains that a part of the data differs; where none of them has changed, the files have.
DECIDES = {
    "training": (*BY_CONTENT, "run.seed", "train.seq_len", "collator", "loss", "tokenizer"),
    "validation": ("data", "eval", "train.seq_len", "collator", "tokenizer"),
    "questions": ("data", "eval", "tokenizer"),
}


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

    Raises UserError for another model or optimizer than it began with, for other settings that decide its numbers and that
    run.allow_change does not name, for fewer steps than it has completed, and for a complete run in whatever differs from what is
    asked for: its numbers are not the answer.
    """
    state, anew = checkpoint.load_state(resume), "use another run.name, or run.resume=never to start anew"
    begun = read_identity(run_dir, resume)
    changed = ", ".join(differences(begun, identity))
    summary = _completed(run_dir) if state.step >= data.num_steps else None
    if summary is not None and changed:
        raise UserError(f"{run_dir} is complete, with other settings than asked for now: {changed}; {anew}")
    misfit = shape_misfit(resume, cfg.model)
    if misfit:
        raise UserError(f"{run_dir} began with {misfit}, so it cannot resume as the same run; {anew}")
    if summary is not None:
        log.info(
            "%s is complete (step %d of %d): nothing to do. run.resume=never starts anew", run_dir, state.step, data.num_steps
        )
        return summary
    _check_changes(cfg, run_dir, resume, contents_changed(state.data_fingerprint, begun, identity), anew)
    if begun.compiled is not None and begun.compiled != identity.compiled:
        log.warning("the run resumes with train.compile %s -> %s", begun.compiled, identity.compiled)
    if state.num_steps != data.num_steps:
        before, now = (build_lr_factor(cfg, n)(state.step) if state.step < n else 0.0 for n in (state.num_steps, data.num_steps))
        log.warning(
            "the run was planned for %d steps, now for %d: the schedule changes from here on (its factor at step %d is %.3g, "
            "not %.3g)",
            state.num_steps,
            data.num_steps,
            state.step + 1,
            now,
            before,
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
    summary = read_json(file) if file.is_file() else {}
    return summary if summary.get("status") == "completed" else None


def _check_changes(cfg: Config, run_dir: Path, resume: Path, contents: list[str], anew: str) -> None:
    """Compare the configuration that the run went with last with today's, by the table of config/on_resume.py.

    `contents`: parts of the data that differ in what they hold. Raises UserError for what run.allow_change does not name.
    """
    last, now = (flatten(read_yaml(text)) for text in ((resume / "config.yaml").read_text(), to_yaml(cfg)))
    changed = {
        key: f"{key} {last[key]} -> {now[key]}" for key in now if key in last and _recorded(last, key) != _recorded(now, key)
    }
    if not contents:
        changed = {key: text for key, text in changed.items() if not any(is_within(key, entry) for entry in BY_CONTENT)}
    refused = {key: text for key, text in changed.items() if on_resume(key) == Change.refused}
    edited = [part for part in contents if not any(is_within(key, entry) for key in refused for entry in DECIDES[part])]
    if edited:
        refused["data"] = f"the contents of the data: {', '.join(edited)}"
    allowed = {key for key in refused if any(is_within(key, entry) for entry in cfg.run.allow_change)}
    if fixed := [text for key, text in refused.items() if key.endswith("_target_") and key.startswith("optimizer")]:
        raise UserError(f"{run_dir} cannot resume with another optimizer ({fixed[0]}): its state is of the one before; {anew}")
    if left := [key for key in refused if key not in allowed]:
        raise UserError(
            f"{run_dir} began with other settings: {', '.join(refused[key] for key in left)}. To go on with them all the same: "
            f"run.allow_change=[{','.join(left)}]; else {anew}"
        )
    told = [text for key, text in changed.items() if on_resume(key) == Change.warned]
    told += [refused[key] for key in sorted(allowed)]
    if told:
        log.warning("the run resumes with other settings than it began with: %s", ", ".join(told))


def _recorded(settings: dict, key: str) -> Any:
    """The value of a key; of a `_target_`, the name that checkpoints have."""
    value = settings[key]
    return recorded_target(value) if key.endswith("_target_") and isinstance(value, str) else value


def contents_changed(last_training: str, begun: Identity, now: Identity) -> list[str]:
    """The parts of the data whose contents differ: training, from that of the last checkpoint; validation and questions."""
    parts = ["training"] if last_training != now.training else []
    for part in ("validation", "questions"):
        before = getattr(begun, part)
        parts += [part] if before is not None and before != getattr(now, part) else []
    return parts


def move_aside(run_dir: Path) -> None:
    """Rename a run folder that is not empty to `<run_dir>.old1` (or .old2, ...), so that a new run can take its name."""
    if not run_dir.exists() or not any(run_dir.iterdir()):
        return
    number = 1
    while (old := run_dir.with_name(f"{run_dir.name}.old{number}")).exists():
        number += 1
    run_dir.rename(old)
    log.warning("the earlier contents of %s are now in %s", run_dir, old)
