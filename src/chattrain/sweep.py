"""Several jobs from one command line (`-m`): what is swept, what a failure means, the table at the end."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from chattrain.compose import key_of, say
from chattrain.errors import UserError
from chattrain.names import is_first


class ChainBroken(BaseException):
    """A stage of a chain failed, so the stages after it have nothing to start from. Not an Exception: Hydra lets it pass."""


class Sweep:
    """The jobs of one command line; without `-m` there is one and nothing is swept.

    A chain of stages stops at its first failure; any other sweep goes on and ends with the failure's exit status.
    """

    def __init__(self, arguments: list[str]):
        self.multirun = bool({"-m", "--multirun"} & set(arguments))
        self.overrides = [a for a in arguments if "=" in a and not a.startswith("-")]
        self.swept = _swept_keys(self.overrides) if self.multirun else set()
        self.chain = "stage" in self.swept
        self.first_stage: str | None = None
        self.status = 0
        self.results: list[dict] = []
        self.process = os.getpid()

    def check(self) -> None:
        if self.swept and any(key_of(o) == "run.dir" for o in self.overrides):
            raise UserError("run.dir names one folder, but -m starts several runs; use run.name, to which each run adds "
                            "what was swept")
        if self.swept and "RANK" in os.environ:
            raise UserError("-m starts one run after the other, torchrun one process group for all; leave torchrun out and "
                            "use distributed.nproc=<number> with -m")
        launcher = [o for o in self.overrides if key_of(o) == "hydra/launcher" and not o.endswith("=basic")]
        if self.chain and launcher:
            raise UserError(f"stage is swept, so each run starts from the one before, but {launcher[0]} would start them "
                            "at once; leave the launcher out")

    def goes_on(self, stage: str) -> bool:
        """Is this job a later stage of a chain, which starts from the stage before whatever init.from says?"""
        self.first_stage = self.first_stage or stage
        return self.chain and stage != self.first_stage

    def run(self, job: Callable[[], dict]) -> None:
        """Run one job; its error is said and remembered. In another process (a parallel launcher) errors are raised."""
        try:
            self.results.append(job())
        except Exception as error:
            if os.getpid() != self.process:
                raise
            self.status = max(self.status, say(error))
            if self.chain:
                raise ChainBroken from error

    def show_table(self) -> None:
        run_dirs = [Path(r["run_dir"]) for r in self.results if "steps" in r]
        trained = [run_dir for run_dir in run_dirs if (run_dir / "metrics.jsonl").is_file()]
        if self.multirun and trained and is_first():
            from chattrain.table import show_runs

            show_runs(trained)


def _swept_keys(overrides: list[str]) -> set[str]:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except HydraException:  # said by Hydra itself when it parses them
        return set()
    return {o.key_or_group for o in parsed if o.is_sweep_override()}
