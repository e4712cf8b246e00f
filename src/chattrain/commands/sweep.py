"""Several jobs from one command line (`-m`): the keys that are swept, the errors of jobs, the table at the end."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig

from chattrain.commands.exit import report_error
from chattrain.config.compose import key_of
from chattrain.errors import RunFailed, UserError
from chattrain.setup.names import is_main_process, launch_name, set_launch
from chattrain.storage.files import replace_text


class ChainBroken(BaseException):
    """A stage of a chain failed, so later stages have nothing to start from. No Exception, so that Hydra does not catch it."""


class Sweep:
    """The jobs of one command line. Without `-m` there is one job, and nothing is swept.

    Where `stage` is swept, the jobs are a chain: each starts from the one before, and the first failure ends it. Any other sweep
    runs all its jobs and exits with the highest status of a failed one.
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
        launchers = [o.partition("=")[2] for o in self.overrides if key_of(o) == "hydra/launcher"]
        parallel = self.multirun and launchers and launchers[-1] != "basic"
        self.launcher = launchers[-1] if parallel else None  # a Hydra launcher that runs all jobs at once, in other processes
        self.launch, self.scratch = launch_name(), Path()

    def check(self) -> None:
        """Raises UserError where `-m` does not go with the other arguments or with torchrun."""
        if self.swept and any(key_of(o) == "run.dir" for o in self.overrides):
            raise UserError(
                "run.dir names one folder, but -m starts several runs; use run.name, to which each run adds what was swept"
            )
        if self.swept and "RANK" in os.environ:
            raise UserError(
                "-m starts one run after another, but torchrun starts one process group for all of them; leave torchrun out and "
                "use distributed.nproc=<number> with -m"
            )
        if self.chain and self.launcher:
            raise UserError(
                f"stage is swept, so each run starts from the one before, but hydra/launcher={self.launcher} would "
                "start them at once; leave the launcher out"
            )

    def is_later_stage(self, stage: str) -> bool:
        """Is this job a later stage of a chain? It starts from the stage before, whatever init.from says."""
        self.first_stage = self.first_stage or stage
        return self.chain and stage != self.first_stage

    @contextmanager
    def workspace(self) -> Iterator[Path]:
        """The folder that Hydra writes to. It is removed after the launch: each run has a config.yaml of its own.

        A parallel launcher gets a folder beside the runs instead, which stays: other nodes write to it, and the user may read it.
        """
        if self.launcher:
            roots = [o.partition("=")[2] for o in self.overrides if key_of(o) == "run.root"]
            self.scratch = Path(roots[-1] if roots else "runs").resolve() / ".sweeps" / self.launch
            self.scratch.mkdir(parents=True, exist_ok=True)
            yield self.scratch
            return
        with tempfile.TemporaryDirectory(prefix="chattrain-") as scratch:
            yield Path(scratch)

    def run(self, job: Callable[[], dict]) -> None:
        """Run one job and report its error. In another process (a parallel launcher) write the outcome for `collect_outcomes`."""
        if os.getpid() != self.process:
            self._run_in_other_process(job)
            return
        try:
            self.results.append(job())
        except Exception as error:
            self.status = max(self.status, report_error(error))
            if self.chain:
                raise ChainBroken from error

    def _run_in_other_process(self, job: Callable[[], dict]) -> None:
        set_launch(self.launch)  # a launcher need not hand the environment on
        hydra = HydraConfig.get()
        swept = [o for o in hydra.overrides.task if key_of(o) in self.swept]
        outcome: dict[str, Any] = {"job": f"job {hydra.job.num} ({' '.join(swept)})"}
        try:
            outcome["result"] = job()
        except KeyboardInterrupt:
            outcome |= {"error": "interrupted", "status": 130}
        except Exception as error:
            outcome |= {"error": str(error), "status": report_error(error)}
        if is_main_process():
            replace_text(self.scratch / f"outcome_{hydra.job.num}.json", json.dumps(outcome, default=str))

    def collect_outcomes(self) -> None:
        """Read the outcomes of jobs that ran in other processes: keep results for the table, report errors by job."""
        for file in sorted(self.scratch.glob("outcome_*.json")) if self.launcher else []:
            outcome = json.loads(file.read_text())
            if "error" in outcome:
                report_error(RunFailed(f"{outcome['job']}: {outcome['error']}"))
                self.status = max(self.status, outcome["status"])
            else:
                self.results.append(outcome["result"])

    def show_table(self) -> None:
        """Print the runs of a sweep side by side; nothing without `-m`."""
        run_dirs = [Path(r["run_dir"]) for r in self.results if "steps" in r]
        trained = [run_dir for run_dir in run_dirs if (run_dir / "metrics.jsonl").is_file()]
        if self.multirun and trained and is_main_process():
            from chattrain.tracking.table import show_runs

            show_runs(trained)
        elif self.multirun and is_main_process() and (found := [r for r in self.results if "part" in r]):
            from chattrain.tracking.table_evaluations import show_evaluations

            show_evaluations(found)


def _swept_keys(overrides: list[str]) -> set[str]:
    """The keys and groups that have several values."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except HydraException:  # Hydra raises it again when it parses them itself
        return set()
    return {o.key_or_group for o in parsed if o.is_sweep_override()}
