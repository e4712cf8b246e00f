"""What `command=` chooses: one small file each, a function from the configuration to a result."""

from __future__ import annotations

import importlib

from chattrain.config import Config


def execute(cfg: Config) -> dict:
    """Run the command of the configuration; returns its result (for train: the summary)."""
    module = "import_" if cfg.command.name == "import" else cfg.command.name  # import is a word of Python's own
    return importlib.import_module(f"chattrain.commands.{module}").main(cfg)
