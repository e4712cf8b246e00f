"""command=report: write report.html again, for the run of run.dir or run.name, else for the newest finished run of the stage."""

from __future__ import annotations

from pathlib import Path

from chattrain.config import Config
from chattrain.errors import UserError
from chattrain.setup.plan import choose_run_dir
from chattrain.setup.start import newest_finished
from chattrain.tracking.report import write_report


def main(cfg: Config) -> dict:
    """Print the path of the report and return it. Raises UserError where there is no such run."""
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
