"""command=report: write report.html again, of a run, a sweep (with its table), or several runs (`runs=[a,b]`) over each other."""

from __future__ import annotations

from pathlib import Path

from chattrain.config import Config
from chattrain.errors import UserError
from chattrain.setup.plan import choose_run_dir
from chattrain.setup.runs import named_run, run_to_read
from chattrain.tracking import sweep_record
from chattrain.tracking.comparison import write_comparison
from chattrain.tracking.console import setup_logging
from chattrain.tracking.report import write_report
from chattrain.tracking.table import show_sweep


def main(cfg: Config) -> dict:
    """Print the path of the report and return it. Raises UserError where there is no such run or sweep."""
    if cfg.runs:
        return _compare(cfg)
    sweep = _sweep_folder(cfg)
    return _report_sweep(sweep) if sweep else _report_run(cfg)


def _report_run(cfg: Config) -> dict:
    """The run that run.name, run.dir or init.from names, else the newest finished run of the stage."""
    close_log = setup_logging(None, console=True, resume=False)
    try:
        path = write_report(run_to_read(cfg))
    finally:
        close_log()
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
    elif cfg.run.name and not choose_run_dir(cfg.run, cfg.stage).is_dir():
        folder = sweeps / cfg.run.name
    else:
        return None
    return folder if (folder / sweep_record.FILE).is_file() else None


def _report_sweep(folder: Path) -> dict:
    """Print the table and the answer; write them and the report into the sweep's folder."""
    try:
        show_sweep(folder)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder / sweep_record.FILE} cannot be read: {error}") from error
    return {"report": str(folder / "report.html")}


def _compare(cfg: Config) -> dict:
    """The runs of `runs`, in <run.root>/comparisons/."""
    run_dirs = [named_run(name, Path(cfg.run.root), None) for name in cfg.runs]
    name = "+".join(f"{run_dir.parent.name}_{run_dir.name}" for run_dir in run_dirs)[:150]
    path = write_comparison(run_dirs, Path(cfg.run.root) / "comparisons" / f"{name}.html")
    print(path)
    return {"report": str(path)}
