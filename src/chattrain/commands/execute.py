"""From `command=` to the module that does it."""

from __future__ import annotations

import importlib

from chattrain.config import Config
from chattrain.errors import UserError
from chattrain.parallel import launch
from chattrain.setup.names import is_main_process
from chattrain.setup.runs import check_names
from chattrain.tracking.console import setup_logging

MANY_PROCESSES = ("train", "evaluate")  # commands that can run on several ranks


def execute(cfg: Config) -> dict:
    """Run the command of the configuration; returns its result (for train: the summary).

    Raises UserError where torchrun or srun started ranks for a command that runs in one process.
    """
    if cfg.command.name not in MANY_PROCESSES and launch.started_by_launcher():
        raise UserError(f"command={cfg.command.name} runs in one process; leave torchrun out")
    check_names(cfg)
    module = "import_" if cfg.command.name == "import" else cfg.command.name  # import is a keyword
    close_log = setup_logging(None, console=is_main_process(), resume=False)
    try:
        return importlib.import_module(f"chattrain.commands.{module}").main(cfg)
    finally:
        close_log()
