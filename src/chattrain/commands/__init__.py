"""What `command=` chooses: one small file each, a function from the configuration to a result."""

from __future__ import annotations

import importlib

from chattrain.config import Config


def execute(cfg: Config) -> dict:
    """Run the command of the configuration; returns its result (for train: the summary)."""
    return importlib.import_module(f"chattrain.commands.{cfg.command.name}").main(cfg)
