"""command=report: write report.html again, for the run that run.name, run.dir or init.from names, else for the newest."""

from __future__ import annotations

from chattrain.config import Config
from chattrain.setup.runs import run_to_read
from chattrain.tracking.console import setup_logging
from chattrain.tracking.report import write_report


def main(cfg: Config) -> dict:
    """Print the path of the report and return it. Raises UserError where there is no such run."""
    close_log = setup_logging(None, console=True, resume=False)
    try:
        path = write_report(run_to_read(cfg))
    finally:
        close_log()
    print(path)
    return {"report": str(path)}
