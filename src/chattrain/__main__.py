"""The one entrypoint: `python -m chattrain [group=choice] [key=value] [-m]`. Hydra composes, a command runs.

Imports stay light up here, so that `--help` answers at once.
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


def main() -> None:
    """Exit status 0 only when the work was done; 2 for a user's mistake, 1 for a failed run, 130 when interrupted."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra's errors reach us as they are; we say them in one message
    if "RANK" not in os.environ:  # a rank that has nothing to save yet may be waiting for others where Python hears nothing
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    schema.register_schemas()
    names.set_launch()
    arguments = compose.settle_alternatives(sys.argv[1:])
    helps = help.is_asked(arguments)
    sys.argv[1:] = help.for_keys(arguments) if helps else arguments
    sweep = Sweep(arguments)

    @hydra.main(version_base="1.3", config_path=str(compose.conf_dir()), config_name="config")
    def job(composed: DictConfig) -> None:
        sweep.run(lambda: run_job(composed, sweep))

    try:
        sweep.check()
        with sweep.workspace() as scratch:
            os.environ["CHATTRAIN_SCRATCH"] = str(scratch)
            help.show(job, arguments) if helps else job()
    except ChainBroken:
        pass
    except KeyboardInterrupt:
        if names.is_first():
            print("chattrain: interrupted", file=sys.stderr)
        sweep.status = 130
    except (UserError, HydraException, OmegaConfBaseException) as error:
        sweep.status = report_error(error)
    except Exception as error:
        if sweep.launcher is None:
            raise
        sweep.status = report_error(RunFailed(f"hydra/launcher={sweep.launcher}: {error}"))
    sweep.collect()
    sweep.show_table()
    sys.exit(sweep.status)


def run_job(composed: DictConfig, sweep: Sweep) -> dict:
    """One job of a launch: the command of one composed configuration."""
    from chattrain.commands.execute import execute
    from chattrain.config.run import InitConfig

    cfg = schema.from_hydra(composed)
    if sweep.swept:
        suffix = names.sweep_suffix(list(HydraConfig.get().overrides.task), sweep.swept)
        cfg.run.name = (cfg.run.name or names.launch_name()) + suffix
    if sweep.goes_on(cfg.stage) and cfg.command.name == "train":
        cfg.init = InitConfig(strict=cfg.init.strict, after=cfg.init.after)
        if cfg.init.after and (before := names.before(cfg.run.root, cfg.init.after[0], cfg.run.name)):
            setattr(cfg.init, "from", before)  # of the same job of the sweep: the newest may be that of another
    result = execute(cfg)
    if result.get("status") == "interrupted":
        raise KeyboardInterrupt
    return result


if __name__ == "__main__":
    main()
