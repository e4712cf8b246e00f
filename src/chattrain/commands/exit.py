"""How a command ends: one message on stderr and an exit status."""

from __future__ import annotations

import json
import sys
import time
import traceback

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from chattrain.config.compose import explain
from chattrain.errors import REPORT_DELAY_S, OtherRankFailed, RunFailed, UserError, explain_file_error
from chattrain.redact import redact
from chattrain.setup.names import is_main_process

SPEAK_FIRST_S = 2.0  # seconds that a silent rank waits before it ends: torchrun ends all ranks with it, and one must print first


def print_for_programs(found: dict) -> None:
    """The result of a command as a line of JSON. On a terminal its reader has seen it already."""
    if not sys.stdout.isatty():
        print(json.dumps(found, default=float))


def report_error(error: BaseException) -> int:
    """Print the error on stderr, one message or, for a bug, a traceback; returns the exit status. One rank prints for all."""
    if isinstance(error, HydraException | OmegaConfBaseException) or _is_of_composing(error):
        error = explain(error)
    if isinstance(error, OSError):
        error = explain_file_error(error) or error
    if isinstance(error, OtherRankFailed):
        time.sleep(SPEAK_FIRST_S + REPORT_DELAY_S)
        return error.exit_status
    if isinstance(error, UserError | RunFailed):
        if is_main_process() or error.reported_here:
            print(f"chattrain: {_printable(str(error))}", file=sys.stderr)
        else:
            time.sleep(SPEAK_FIRST_S)
        return error.exit_status
    print(redact("".join(traceback.format_exception(error))), end="", file=sys.stderr)
    return 1


def _is_of_composing(error: BaseException) -> bool:
    """Was it raised while Hydra read the YAML files? Some that are malformed end in a ValueError, or in one of yaml's own."""
    frames = traceback.extract_tb(error.__traceback__) if isinstance(error, Exception) else []
    return not isinstance(error, UserError | RunFailed) and any(f.filename.endswith("config_loader_impl.py") for f in frames)


def _printable(message: str) -> str:
    """One line: control characters, which a value that was typed or read may hold, as escapes.

    >>> print(_printable("no key a\\nb \\x1b[2J ü"))
    no key a\\nb \\x1b[2J ü
    """
    return "".join(repr(c)[1:-1] if ord(c) < 32 or 127 <= ord(c) < 160 else c for c in message)
