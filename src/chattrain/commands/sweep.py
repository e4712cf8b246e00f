"""Several jobs from one command line (`-m`): what is swept, what a failure means, the table at the end."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from chattrain.commands.exit import report_error
from chattrain.config.compose import key_of
from chattrain.errors import RunFailed, UserError
from chattrain.setup.names import is_first, launch_name, set_launch
from chattrain.storage.files import replace_text


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
        named = [o.partition("=")[2] for o in self.overrides if key_of(o) == "hydra/launcher"]
        elsewhere = self.multirun and named and named[-1] != "basic"
        self.launcher = named[-1] if elsewhere else None  # starts the jobs in other processes, all at once
        self.launch, self.scratch = launch_name(), Path()

    def check(self) -> None:
        if self.swept and any(key_of(o) == "run.dir" for o in self.overrides):
            raise UserError(
                "run.dir names one folder, but -m starts several runs; use run.name, to which each run adds what was swept"
            )
        if self.swept and "RANK" in os.environ:
            raise UserError(
                "-m starts one run after the other, torchrun one process group for all; leave torchrun out and "
                "use distributed.nproc=<number> with -m"
            )
        if self.chain and self.launcher:
            raise UserError(
                f"stage is swept, so each run starts from the one before, but hydra/launcher={self.launcher} would "
                "start them at once; leave the launcher out"
            )

    def goes_on(self, stage: str) -> bool:
        """Is this job a later stage of a chain, which starts from the stage before whatever init.from says?"""
        self.first_stage = self.first_stage or stage
        return self.chain and stage != self.first_stage

    @contextmanager
    def workspace(self) -> Iterator[Path]:
        """Where Hydra writes, for the time of the launch: each run has its config.yaml already. What a launcher writes of jobs
        elsewhere is kept beside the runs, where other nodes can write and the user can read it."""
        if self.launcher:
            roots = [o.partition("=")[2] for o in self.overrides if key_of(o) == "run.root"]
            self.scratch = Path(roots[-1] if roots else "runs").resolve() / ".sweeps" / self.launch
            self.scratch.mkdir(parents=True, exist_ok=True)
            yield self.scratch
            return
        with tempfile.TemporaryDirectory(prefix="chattrain-") as scratch:
            yield Path(scratch)

    def run(self, job: Callable[[], dict]) -> None:
        """Run one job; its error is said and remembered. In another process (a parallel launcher) it is left for `collect`."""
        if os.getpid() != self.process:
            self._run_elsewhere(job)
            return
        try:
            self.results.append(job())
        except Exception as error:
            self.status = max(self.status, report_error(error))
            if self.chain:
                raise ChainBroken from error

    def _run_elsewhere(self, job: Callable[[], dict]) -> None:
        set_launch(self.launch)  # the environment need not have come with the job
        hydra = HydraConfig.get()
        swept = [o for o in hydra.overrides.task if key_of(o) in self.swept]
        outcome = {"job": f"job {hydra.job.num} ({' '.join(swept)})"}
        try:
            outcome["result"] = job()
        except KeyboardInterrupt:
            outcome |= {"error": "interrupted", "status": 130}
        except Exception as error:
            outcome |= {"error": str(error), "status": report_error(error)}
        if is_first():
            replace_text(self.scratch / f"outcome_{hydra.job.num}.json", json.dumps(outcome, default=str))

    def collect(self) -> None:
        """What jobs in other processes have left: results for the table, errors said by job."""
        for file in sorted(self.scratch.glob("outcome_*.json")) if self.launcher else []:
            outcome = json.loads(file.read_text())
            if "error" in outcome:
                report_error(RunFailed(f"{outcome['job']}: {outcome['error']}"))
                self.status = max(self.status, outcome["status"])
            else:
                self.results.append(outcome["result"])

    def show_table(self) -> None:
        run_dirs = [Path(r["run_dir"]) for r in self.results if "steps" in r]
        trained = [run_dir for run_dir in run_dirs if (run_dir / "metrics.jsonl").is_file()]
        if self.multirun and trained and is_first():
            from chattrain.tracking.table import show_runs

            show_runs(trained)


def _swept_keys(overrides: list[str]) -> set[str]:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except HydraException:  # said by Hydra itself when it parses them
        return set()
    return {o.key_or_group for o in parsed if o.is_sweep_override()}
