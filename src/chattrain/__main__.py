"""The one entrypoint: `python -m chattrain [group=choice] [key=value] [-m]`. Hydra composes the configuration, a command runs.

Imports at the top stay light (no torch), so that `--help` and a mistake on the command line are answered at once.
"""

from __future__ import annotations

import os
import signal
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from chattrain.commands import help
from chattrain.commands.exit import report_error
from chattrain.commands.sweep import ChainBroken, Sweep
from chattrain.config import compose, schema
from chattrain.errors import RunFailed, UserError
from chattrain.setup import names
from chattrain.setup.job import Job, set_job


def main() -> None:
    """Exit status 0 only when the work was done; 2 for a user's mistake, 1 for a failed run, 130 when interrupted."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors, and we print them as one message
    if "RANK" not in os.environ:  # a rank may wait for others inside torch, where Python runs no signal handler
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    schema.register_schemas()
    names.set_launch()
    arguments = compose.settle_alternatives(sys.argv[1:])
    show_help = help.is_requested(arguments)
    sys.argv[1:] = help.hydra_arguments(arguments) if show_help else arguments
    sweep = Sweep(arguments)

    @hydra.main(version_base="1.3", config_path=str(compose.conf_dir()), config_name="config")
    def job(composed: DictConfig) -> None:
        sweep.run(lambda: run_job(composed, sweep))

    try:
        sweep.check()
        with sweep.workspace() as scratch:
            os.environ["CHATTRAIN_SCRATCH"] = str(scratch)
            help.show(job, arguments) if show_help else job()
    except ChainBroken:
        pass  # the failed stage was reported when it failed
    except KeyboardInterrupt:
        if names.is_main_process():
            print("chattrain: interrupted", file=sys.stderr)
        sweep.status = 130
    except (UserError, HydraException, OmegaConfBaseException) as error:
        sweep.status = report_error(error)
    except Exception as error:
        if sweep.launcher is None:
            raise
        sweep.status = report_error(RunFailed(f"hydra/launcher={sweep.launcher}: {error}"))
    sweep.collect_outcomes()
    sweep.show_table()
    sys.exit(sweep.status)


def run_job(composed: DictConfig, sweep: Sweep) -> dict:
    """One job of a launch: runs the command of one composed configuration and returns its result."""
    from chattrain.config.run import InitConfig

    cfg = schema.from_hydra(composed)
    from chattrain.commands.execute import execute  # imports torch: a wrong value is answered before

    set_job(Job(overrides=list(HydraConfig.get().overrides.task)))
    if sweep.swept and cfg.command.name in ("train", "import"):  # other commands read the run that run.name names
        suffix = names.sweep_suffix(list(HydraConfig.get().overrides.task), sweep.swept)
        cfg.run.name = (cfg.run.name or names.launch_name()) + suffix
    if sweep.is_later_stage(cfg.stage) and cfg.command.name == "train":
        cfg.init = InitConfig(strict=cfg.init.strict, after=cfg.init.after)
        # In a sweep over stages and other keys, the newest run of the stage before may belong to another job: start from
        # the run of the same name.
        if cfg.init.after and (previous := names.finished_run(cfg.run.root, cfg.init.after[0], cfg.run.name)):
            setattr(cfg.init, "from", previous)
    result = execute(cfg)
    if result.get("status") == "interrupted":
        raise KeyboardInterrupt
    return result


if __name__ == "__main__":
    main()
