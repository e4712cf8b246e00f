"""chattrain: turn a language model into a chat model."""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

__version__ = "0.1.0"


_running = threading.RLock()


def run(overrides: Sequence[str] | Mapping[str, Any] = ()) -> dict:
    """Compose the configuration with these overrides and run its command.

    overrides: as typed on the command line, or a dict of keys, in which a section may be a dict of its own. Returns the summary
    (for command=train, what summary.json holds). The caller's Hydra, signal handlers, logging and environment are as before once
    it returns. Raises UserError for a user's mistake, and in a second thread while one is at it (both would set the process's
    environment and random numbers); RunFailed where the run went wrong.

    >>> run(["stage=sft", "train.max_steps=20"])  # doctest: +SKIP
    >>> run({"stage": "sft", "optimizer": "adamw", "train": {"max_steps": 20}})  # doctest: +SKIP
    """
    from chattrain.commands.execute import execute
    from chattrain.config.compose import compose, config_dirs
    from chattrain.config.quoting import as_overrides
    from chattrain.errors import UserError
    from chattrain.setup.job import Job, as_job

    if not _running.acquire(blocking=False):
        raise UserError("another thread of this process is inside chattrain.run(); wait for it, or start a process of its own")
    try:
        if isinstance(overrides, str):
            raise UserError(f"chattrain.run({overrides!r}) is given one text; give a list of them, or a dict")
        typed = as_overrides(overrides) if isinstance(overrides, Mapping) else list(overrides)
        cfg = compose(typed)
        with as_job(Job(overrides=typed, config_dirs=config_dirs(typed))):
            return execute(cfg)
    finally:
        _running.release()
