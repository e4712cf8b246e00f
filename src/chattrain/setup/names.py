"""Names of runs, and which process prints.

The process that the user started chooses a name once; ranks inherit it. They would not agree on one from their own clocks.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from pathlib import Path

LAUNCH_VARIABLE = "CHATTRAIN_LAUNCH"  # inherited by the processes that a launch starts


def new_launch() -> str:
    """The time and four random digits, so that two runs that start in the same second do not share a folder."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def set_launch(name: str | None = None) -> None:
    """Begin a launch under a new name, or join the launch `name` that another process began."""
    os.environ[LAUNCH_VARIABLE] = name or new_launch()


def launch_name() -> str:
    """The name of this launch; a new one where no command line began a launch, as in a notebook."""
    return os.environ.get(LAUNCH_VARIABLE) or new_launch()


def is_main_process() -> bool:
    """Does this process print for the run? It is rank 0, the first of Slurm's tasks, or one that no launcher started."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0))) == 0


def run_folder(root: str, stage: str, name: str | None) -> Path:
    """<root>/<stage>/<name>, absolute; None: the name of the launch, which is its time."""
    return (Path(root).expanduser() / stage / (name or launch_name())).resolve()


def finished_run(root: str, stage: str, name: str | None) -> str | None:
    """The folder of the completed run of this stage and name (None: the launch's name); None where there is none."""
    folder = run_folder(root, stage, name)
    summary = folder / "summary.json"
    return str(folder) if summary.is_file() and json.loads(summary.read_text()).get("status") == "completed" else None
