"""command=report: write report.html again, of a run, a sweep (with its table), or several runs (`runs=[a,b]`) over each other."""

from __future__ import annotations

import json
from pathlib import Path

from chattrain.config import Config
from chattrain.errors import UserError
from chattrain.setup.runs import named_run, run_of_name, run_to_read, typed
from chattrain.tracking import sweep_record
from chattrain.tracking.answer import find_answer
from chattrain.tracking.comparison import write_comparison
from chattrain.tracking.ranking import read_runs
from chattrain.tracking.report import write_report
from chattrain.tracking.sweep_record import SweepRecord
from chattrain.tracking.table import show_sweep


def main(cfg: Config) -> dict:
    """Print the path of the report and return it. Raises UserError where there is no such run or sweep."""
    if cfg.runs:
        return _compare(cfg)
    sweep = _sweep_folder(cfg)
    return _report_sweep(sweep) if sweep else _report_run(cfg)


def _report_run(cfg: Config) -> dict:
    """The run that run.name, run.dir or init.from names, else the newest finished run of the stage."""
    path = write_report(run_to_read(cfg))
    print(path)
    return {"report": str(path)}


def _sweep_folder(cfg: Config) -> Path | None:
    """The sweep of sweep.name; of run.name or run.dir where that is a sweep's; else None."""
    sweeps = Path(cfg.run.root) / "sweeps"
    if cfg.sweep.name:
        if not (sweeps / cfg.sweep.name / sweep_record.FILE).is_file():
            known = ", ".join(sorted(file.parent.name for file in sweeps.glob(f"*/{sweep_record.FILE}"))) or "none"
            raise UserError(f"sweep.name={cfg.sweep.name}: there is no such sweep in {sweeps.resolve()}; there are: {known}")
        return sweeps / cfg.sweep.name
    if cfg.run.dir:
        folder = Path(cfg.run.dir).expanduser()
    elif cfg.run.name and run_of_name(cfg.run.name, Path(cfg.run.root), cfg.stage if typed("stage") else None) is None:
        folder = sweeps / cfg.run.name
    else:
        return None
    return folder if (folder / sweep_record.FILE).is_file() else None


def _report_sweep(folder: Path) -> dict:
    """Print the table and the answer; write them and the report into the sweep's folder."""
    try:
        show_sweep(folder, _known_test(folder))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder / sweep_record.FILE} cannot be read: {error}") from error
    return {"report": str(folder / "report.html")}


def _known_test(folder: Path) -> dict | None:
    """Metrics of the best on the test part, as answer.json has them; None where it has none, or of another best."""
    try:
        answer = json.loads((folder / "answer.json").read_text())
        measured = [(row["run_dir"], row["objective"]) for row in answer["rows"] if row["best"]]
    except (OSError, ValueError, TypeError, KeyError):  # it is written again
        return None
    record = SweepRecord.read(folder)
    best = [(row.job.run_dir, row.job.objective) for row in find_answer(record, read_runs(record)).ranking.winners]
    return answer.get("test") if best == measured else None


def _compare(cfg: Config) -> dict:
    """The runs of `runs`, in <run.root>/comparisons/."""
    run_dirs = [named_run(name, Path(cfg.run.root), cfg.stage if typed("stage") else None) for name in cfg.runs]
    name = "+".join(f"{run_dir.parent.name}_{run_dir.name}" for run_dir in run_dirs)[:150]
    path = write_comparison(run_dirs, Path(cfg.run.root) / "comparisons" / f"{name}.html")
    print(path)
    return {"report": str(path)}
