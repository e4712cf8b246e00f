"""Which run a command reads: the one way to name it, for every command.

run.dir, run.name and init.from are alternatives. A name is `<name>` or `<stage>/<name>` of a run in run.root. Only where none of
them is given, the newest finished run of the stage is read, and the first line of output says which.
"""

from __future__ import annotations

import difflib
import logging
from pathlib import Path

from chattrain.config import Config
from chattrain.config.compose import key_of
from chattrain.config.model import ModelConfig
from chattrain.config.words import Pick
from chattrain.errors import UserError
from chattrain.setup.job import current_job
from chattrain.storage import checkpoint
from chattrain.storage.files import read_json

log = logging.getLogger("chattrain")

MARKS = ("config.yaml", "summary.json", "checkpoints")  # any of them makes a folder a run folder
NEWEST = ("auto", "scratch")  # values of init.from that name no run


def is_run(folder: Path) -> bool:
    return any((folder / mark).exists() for mark in MARKS) and not (folder / "manifest.json").exists()


def named_run(reference: str, root: Path, stage: str | None) -> Path:
    """The run folder of a reference: a folder, `<stage>/<name>`, or the name of a run in `root`.

    `stage`: where a bare name is looked up; None: in every stage. Raises UserError where there is no such run, and for a name
    that runs of several stages have.
    """
    folder = Path(reference).expanduser()
    if folder.is_dir() and is_run(folder):
        return folder.resolve()
    if run := run_of_name(reference, root, stage):
        return run
    if folder.is_dir():
        raise UserError(f"{folder.resolve()} is not a run folder: it holds none of {', '.join(MARKS)}")
    raise no_run(reference, root, stage)


def run_of_name(reference: str, root: Path, stage: str | None = None) -> Path | None:
    """The run of this name, `<name>` or `<stage>/<name>`; None where `root` has none. Raises UserError where it has several."""
    if reference.count("/") > 1 or reference.startswith((".", "~", "/")):
        return None
    within, _, name = reference.rpartition("/")
    found = [run for run in _runs(root) if run.name == name and (within or stage) in (run.parent.name, None)]
    if len(found) > 1:
        first, *others = (_label(run) for run in found)
        raise UserError(
            f"several runs in {root.resolve()} are called {name}: {', '.join([first, *others])}; give the stage too, "
            f"with stage={found[0].parent.name} or init.from={first}"
        )
    return found[0] if found else None


def start_of(source: str, root: Path, stage: str | None = None) -> str:
    """What init.from names, other than auto and scratch: a folder or a run as its absolute path; else a hub name or what is no
    folder, as given."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return str(folder.resolve())
    return str(run_of_name(source, root, stage) or source)


def typed(section: str) -> bool:
    """Does the command line give this key, group, or a key below it?"""
    return any(key_of(override).partition(".")[0] == section for override in current_job().overrides)


def reference_of(cfg: Config) -> str | None:
    """The run, checkpoint or model folder that the command line names, as an absolute path or a hub name; None: it names none.

    Raises UserError where run.dir, run.name and init.from name different runs, and where a name is not found.
    """
    root, stage = Path(cfg.run.root), cfg.stage if typed("stage") else None
    given: dict[str, str] = {}
    if cfg.run.dir:
        given[f"run.dir={cfg.run.dir}"] = str(Path(cfg.run.dir).expanduser().resolve())
    if cfg.run.name:
        run = run_of_name(cfg.run.name, root, stage)
        if run is None:
            raise no_run(cfg.run.name, root, stage)
        given[f"run.name={cfg.run.name}"] = str(run)
    if cfg.init.source == "scratch":
        raise UserError(
            f"init.from=scratch names no run for command={cfg.command.name} to read; name one with run.name, run.dir or init.from"
        )
    if cfg.init.source not in NEWEST:
        given[f"init.from={cfg.init.source}"] = start_of(cfg.init.source, root, stage)
    if len({run_folder(Path(path).expanduser().absolute()) for path in given.values()}) > 1:
        raise UserError(f"{' and '.join(given)} name different runs; keep one of them")
    return next(reversed(given.values()), None)  # init.from last: it may name one checkpoint of the run


def run_folder(path: str | Path) -> Path:
    """The run folder of a run or of one of its checkpoints; the path itself, where it is neither."""
    path = Path(path)
    return path.parents[1] if path.parent.name == "checkpoints" else path


def run_to_read(cfg: Config) -> Path:
    """The run folder that a command reads: the named one, else that of the newest finished run of the stage, which is logged.

    Raises UserError where there is none, and where a typed stage contradicts the run's.
    """
    reference = reference_of(cfg)
    if reference is None:
        return run_folder(newest_to_read(cfg))
    folder = run_folder(reference)
    if not folder.exists() and cfg.init.source not in NEWEST:
        raise no_run(cfg.init.source, Path(cfg.run.root), cfg.stage if typed("stage") else None)
    if not is_run(folder):
        raise UserError(f"{folder} is not a run folder: it holds none of {', '.join(MARKS)}")
    check_stage(cfg, stage_of(folder), folder)
    return folder


def newest_to_read(cfg: Config) -> Path:
    """The newest checkpoint of the newest finished run of the stage. Raises UserError where there is none."""
    model = cfg.model if typed("model") else None
    newest = newest_finished(Path(cfg.run.root), cfg.stage, model, cfg.init.pick)
    if newest is None:
        others = sorted({run.parent.name for run in _runs(Path(cfg.run.root))} - {cfg.stage})
        raise UserError(
            f"no finished {cfg.stage} run{' of this model' if model else ''} in {Path(cfg.run.root).resolve()}; train one, "
            f"or name a run with run.name, run.dir or init.from{f', or another stage: stage={others[-1]}' if others else ''}"
        )
    log.info(
        "no run is named, so this is the newest finished %s run, %s. Name another with run.name",
        cfg.stage,
        newest.parents[1].name,
    )
    return newest


def newest_finished(root: Path, stage: str, model: ModelConfig | None, pick: Pick = Pick.last) -> Path | None:
    """The newest valid or the best checkpoint of the newest finished run of a stage whose model has this shape (None: any
    shape)."""
    runs = []
    for file in (root.resolve() / stage).glob("*/summary.json"):
        try:
            summary = read_json(file)
        except UserError:
            continue
        if summary.get("status") == "completed":
            finished = summary.get("finished_at")
            runs.append((finished if isinstance(finished, int | float) else 0.0, file.parent))
    for _, run_dir in sorted(runs, reverse=True):
        folder = checkpoint.newest_valid(run_dir)
        if folder is None:
            continue
        misfit = shape_misfit(folder, model) if model is not None else None
        if misfit is None:
            return checkpoint.best_valid(run_dir) if pick == Pick.best else folder
        log.info("skipping %s: %s", run_dir, misfit)
    return None


def shape_misfit(folder: Path, model: ModelConfig) -> str | None:
    """How the model of the configuration differs from that of a checkpoint; None where they agree."""
    return model.misfit(checkpoint.load_state(folder).model)


def resume_hint(run_dir: Path) -> str | None:
    """What the user types so that an interrupted run resumes; None in a sweep, which says at its end how it goes on."""
    job = current_job()
    if job.sweep:
        return None
    named = any(key_of(override) in ("run.name", "run.dir") for override in job.overrides)
    return f"to resume from its checkpoint, give the same command again{'' if named else f', with run.name={run_dir.name}'}"


def stage_of(folder: Path) -> str | None:
    """The stage of a run or checkpoint folder, by its own record; None where it has none."""
    for name in ("state.json", "summary.json"):
        try:
            return str(read_json(folder / name)["stage"])
        except (UserError, KeyError):
            continue
    return next((text.partition(":")[2].strip() for text in _lines(folder / "config.yaml") if text.startswith("stage:")), None)


def check_stage(cfg: Config, stage: str | None, folder: Path) -> None:
    """Raises UserError where the command line gives another stage than that of the folder, which would be ignored."""
    if stage and typed("stage") and cfg.stage != stage:
        raise UserError(f"{folder} is a {stage} run, so stage={cfg.stage} would have no effect; leave it out")


def check_names(cfg: Config) -> None:
    """Raises UserError for `runs=` with a command that does not read it, and where `runs` or, of a report, sweep.name stands
    beside another name of what is read, which would be ignored."""
    if cfg.runs and cfg.command.name not in ("report", "evaluate"):
        raise UserError(f"runs={cfg.runs} has no effect on command={cfg.command.name}: only report and evaluate compare runs")
    start = None if cfg.init.source == "auto" else cfg.init.source
    given = {"sweep.name": cfg.sweep.name, "run.name": cfg.run.name, "run.dir": cfg.run.dir, "init.from": start}
    named = [f"{key}={value}" for key, value in given.items() if value]
    if not cfg.runs and not (cfg.command.name == "report" and cfg.sweep.name):
        return
    first, *others = [f"runs=[{','.join(cfg.runs)}]", *named] if cfg.runs else named
    if others:
        raise UserError(f"{first} takes the place of {' and '.join(others)}; keep one of them")


def _runs(root: Path) -> list[Path]:
    return sorted(folder for folder in root.resolve().glob("*/*") if folder.is_dir() and is_run(folder))


def _label(run: Path) -> str:
    return f"{run.parent.name}/{run.name}"


def no_run(reference: str, root: Path, stage: str | None) -> UserError:
    """With the run of the most similar name, else the newest runs that there are."""
    runs = sorted(_runs(root), key=lambda run: run.stat().st_mtime, reverse=True)
    names = {name: _label(run) for run in reversed(runs) for name in (run.name, _label(run))}
    same = [_label(run) for run in runs if run.name == reference.rpartition("/")[2]]
    near = same or [names[name] for name in difflib.get_close_matches(reference, names, n=1, cutoff=0.6)]
    shown = ", ".join(_label(run) for run in runs[:8])
    way_out = f"; did you mean init.from={near[0]}?" if near else f"; there are {shown}" if shown else ", which holds no run"
    return UserError(f"no{f' {stage}' if stage else ''} run {reference} in {root.resolve()}{way_out}")


def _lines(file: Path) -> list[str]:
    return file.read_text(errors="replace").splitlines() if file.is_file() else []
