"""The one entrypoint: `python -m chattrain [group=choice] [key=value] [-m]`. Hydra composes the configuration, a command runs.

Imports at the top stay light (no torch), so that `--help` and a mistake on the command line are answered at once.
"""

from __future__ import annotations

import os
import signal
import sys

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from chattrain.commands import completion, flags, help
from chattrain.commands.exit import report_error
from chattrain.config import compose, schema
from chattrain.errors import RunFailed, UserError
from chattrain.setup import names
from chattrain.sweeps.callback import Refused
from chattrain.sweeps.launching import Launch


def main() -> None:
    """Exit status 0 only when the work was done; 2 for a user's mistake, 1 for a failed run, 130 when interrupted."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors, and we print them as one message
    if "RANK" not in os.environ:  # a rank may wait for others inside torch, where Python runs no signal handler
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` turns it off
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # asks a run to save: before its first step there is nothing to save
    try:
        schema.register_schemas()
        names.set_launch()
        for page in (completion, help):
            if page.is_requested(sys.argv[1:]):
                show(page.text(sys.argv[1:]))
                sys.exit(0)
        if flags.VERSION in sys.argv[1:]:
            show(flags.version())
            sys.exit(0)
        typed, arguments = sys.argv[1:], flags.first(compose.settle_alternatives(sys.argv[1:]))
    except UserError as error:
        sys.exit(report_error(error))
    except KeyboardInterrupt:
        print("chattrain: interrupted", file=sys.stderr)
        sys.exit(130)
    sys.argv[1:] = arguments
    launch = Launch(typed)
    sweep = launch.sweep

    @hydra.main(version_base="1.3", config_path=str(compose.conf_dir()), config_name="config")
    def job(composed: DictConfig) -> float | None:
        return sweep.run_job(composed)

    with launch.workspace():
        for act in (job, launch.show):
            try:
                act()
            except BaseException as error:
                launch.collect()
                launch.status = max(launch.status, _status(error, launch))
            else:
                launch.collect()
    sys.exit(launch.status)


def show(text: str) -> None:
    """Print a page, of which `| head` or a pager that is left may read a part."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends


def _status(error: BaseException, launch: Launch) -> int:
    """The exit status of a launch that ended with this error, which is printed unless a job's own message has said it."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, Refused):
        return report_error(error.error)
    if isinstance(error, KeyboardInterrupt):
        if names.is_main_process():
            print(f"chattrain: interrupted{launch.resume_with()}", file=sys.stderr)
        return 130
    if launch.explains(error):
        return 0
    if launch.sweep.launcher and not isinstance(error, UserError | RunFailed | HydraException | OmegaConfBaseException):
        error = RunFailed(f"hydra/launcher={launch.sweep.launcher}: {error}")
    return report_error(error)


if __name__ == "__main__":
    main()
