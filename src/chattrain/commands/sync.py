"""command=sync: send to MLflow what it lacks of runs that have ended, as where its server was away while they ran."""

from __future__ import annotations

import logging
from pathlib import Path

from chattrain.config import Config
from chattrain.errors import RunFailed, UserError
from chattrain.redact import redact
from chattrain.setup.mlflow_target import absolute_uri, mlflow_target
from chattrain.setup.runs import check_stage, is_run, reference_of, run_folder, stage_of, typed
from chattrain.tracking import mlflow_store as store
from chattrain.tracking.mlflow_state import FILE, Busy, read_state
from chattrain.tracking.mlflow_sync import sync

log = logging.getLogger("chattrain")


def main(cfg: Config) -> dict:
    """Sync the run that run.name, run.dir or init.from names, else all in run.root whose mlflow.json says that something lacks.

    tracking.uri and tracking.experiment: where they get a copy; without them each goes to its own store. Returns the folders
    that were sent, had everything, or go on. Raises RunFailed where a store did not take something.
    """
    if not cfg.tracking.mlflow:
        raise UserError("tracking=none, but command=sync sends runs to MLflow; leave it out")
    named = _named(cfg)
    folders = [named] if named else _all(cfg)
    result: dict[str, list[str]] = {"sent": [], "complete": [], "going_on": []}
    failed = []
    for folder in folders:
        try:
            result[_sync(cfg, folder, named is not None)].append(str(folder))
        except UserError:
            raise
        except Exception as error:
            reason = store.reason_of(error)
            if isinstance(error, store.Deleted):
                reason += f"; command=sync run.dir={folder} restores it"
            failed.append(f"{_label(folder)}: {reason}")
    log.info(
        "%d sent, %d had everything, %d go on, %d failed, of %s",
        *(len(result[kind]) for kind in ("sent", "complete", "going_on")),
        len(failed),
        _label(named) if named else f"{len(folders)} runs and sweeps in {Path(cfg.run.root).resolve()}",
    )
    if failed:
        raise RunFailed(
            "MLflow did not take everything; the same command goes on (user and password of a store are not kept: give them "
            "by the environment or tracking.uri). " + "\n".join(failed)
        )
    return result


def _store(cfg: Config) -> str | None:
    """The store that the command line names."""
    return absolute_uri(cfg.tracking.uri) if cfg.tracking.uri else None


def _sync(cfg: Config, folder: Path, named: bool) -> str:
    """Sync one folder, and say what was sent. Returns sent, complete or going_on.

    Raises UserError where a named one goes on.
    """
    try:
        missing = sync(folder, *mlflow_target(cfg), to=(_store(cfg), cfg.tracking.experiment), restore=named)
    except Busy as busy:
        if named:
            raise UserError(f"{busy}: it sends its numbers itself; sync it once it has ended") from None
        log.info("%s goes on, and sends its numbers itself", _label(folder))
        return "going_on"
    state = read_state(folder)
    if missing and state:
        copy = state.copy_in(_store(cfg) or state.copies[0].uri, cfg.tracking.experiment) or state.copies[0]
        log.info("%s: sent %s to %s, run %s", _label(folder), missing, redact(copy.uri), copy.run_id)
    return "sent" if missing else "complete"


def _named(cfg: Config) -> Path | None:
    """The run, or the sweep, that the command line names."""
    reference = reference_of(cfg)
    if reference is None:
        return None
    folder = run_folder(reference)
    if not is_run(folder) and not (folder / FILE).is_file():
        raise UserError(f"{folder} is no folder of a run or a sweep")
    if is_run(folder):
        check_stage(cfg, stage_of(folder), folder)
    return folder.resolve()


def _all(cfg: Config) -> list[Path]:
    """Sweeps first, as their jobs are nested under them; then runs as they began, as one may start from another."""
    stage = cfg.stage if typed("stage") else "*"
    found = [
        (state, file.parent)
        for file in Path(cfg.run.root).resolve().glob(f"{stage}/*/{FILE}")
        if (state := read_state(file.parent))
    ]
    return [folder for state, folder in sorted(found, key=lambda f: (f[1].parent.name != "sweeps", f[0].started_at))]


def _label(folder: Path) -> str:
    return f"{folder.parent.name}/{folder.name}"
