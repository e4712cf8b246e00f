"""Runs the command of a configuration."""

from __future__ import annotations

import importlib

from chattrain.config import Config
from chattrain.errors import UserError
from chattrain.parallel import launch

MANY_PROCESSES = ("train", "evaluate")  # commands that know what to do with several


def execute(cfg: Config) -> dict:
    """Run the command of the configuration; returns its result (for train: the summary).

    Raises UserError where a launcher started several processes for a command of one.
    """
    if cfg.command.name not in MANY_PROCESSES and launch.started_by_launcher():
        raise UserError(f"command={cfg.command.name} is the work of one process; leave torchrun out")
    module = "import_" if cfg.command.name == "import" else cfg.command.name  # import is a word of Python's own
    return importlib.import_module(f"chattrain.commands.{module}").main(cfg)
