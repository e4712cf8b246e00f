"""How a command ends: one message on stderr and an exit status."""

from __future__ import annotations

import sys
import time
import traceback

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from chattrain.config.compose import explain
from chattrain.errors import REPORT_DELAY_S, OtherRankFailed, RunFailed, UserError
from chattrain.setup.names import is_first

SPEAK_FIRST_S = 2.0  # seconds that other ranks leave the first to say what is wrong: a launcher ends it when they end


def report_error(error: BaseException) -> int:
    """Put the error on stderr: one message for what a user can mend, a traceback for what only we can. The exit status."""
    if isinstance(error, HydraException | OmegaConfBaseException):
        error = explain(error)
    if isinstance(error, OtherRankFailed):
        time.sleep(SPEAK_FIRST_S + REPORT_DELAY_S)
        return error.exit_status
    if isinstance(error, UserError | RunFailed):
        if is_first() or error.reported_here:
            print(f"chattrain: {error}", file=sys.stderr)
        else:
            time.sleep(SPEAK_FIRST_S)
        return error.exit_status
    traceback.print_exception(error)
    return 1
