"""command=report: write report.html again, of a run, a sweep (with its table), or several runs (`runs=[a,b]`) over each other."""

from __future__ import annotations

from pathlib import Path

from chattrain.config import Config
from chattrain.errors import UserError
from chattrain.setup.plan import choose_run_dir
from chattrain.setup.start import newest_finished
from chattrain.tracking import sweep_record
from chattrain.tracking.comparison import write_comparison
from chattrain.tracking.report import write_report
from chattrain.tracking.table import show_sweep


def main(cfg: Config) -> dict:
    """Print the path of the report and return it. Raises UserError where there is no such run or sweep."""
    if cfg.runs:
        return _compare(cfg)
    sweep = _sweep_folder(cfg)
    return _report_sweep(sweep) if sweep else _report_run(cfg)


def _report_run(cfg: Config) -> dict:
    """The run of run.dir or run.name, else the newest finished run of the stage."""
    if cfg.run.dir or cfg.run.name:
        run_dir = choose_run_dir(cfg.run, cfg.stage)
    else:
        newest = newest_finished(Path(cfg.run.root), cfg.stage, model=None)
        if newest is None:
            raise UserError(f"no finished {cfg.stage} run in {Path(cfg.run.root).resolve()}; name a run with run.dir")
        run_dir = newest.parents[1]
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{run_dir} is not a run folder: it has no config.yaml")
    path = write_report(run_dir)
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
    run_dirs = [_find_run(Path(cfg.run.root), name) for name in cfg.runs]
    name = "+".join(f"{run_dir.parent.name}_{run_dir.name}" for run_dir in run_dirs)[:150]
    path = write_comparison(run_dirs, Path(cfg.run.root) / "comparisons" / f"{name}.html")
    print(path)
    return {"report": str(path)}


def _find_run(root: Path, name: str) -> Path:
    """The run folder that `name` stands for: a folder, `<stage>/<name>`, or a `<name>` that one stage has."""
    for folder in (Path(name).expanduser(), root / name):
        if (folder / "config.yaml").is_file():
            return folder.resolve()
    found = sorted(file.parent.resolve() for file in root.glob(f"*/{name}/config.yaml")) if "/" not in name else []
    if len(found) != 1:
        what = "no run" if not found else f"several runs ({', '.join(f.parent.name + '/' + f.name for f in found)})"
        raise UserError(f"runs: {what} named {name} in {root.resolve()}; name a folder, or <stage>/<name>")
    return found[0]
