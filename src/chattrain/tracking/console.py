"""Messages of a run: the logger `chattrain` to stderr and to a file in the run folder."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from chattrain.redact import redact

logger = logging.getLogger("chattrain")


def _redacted(record: logging.LogRecord) -> bool:
    """Take passwords and tokens out of a message, and of its traceback, before any handler sees it."""
    with suppress(Exception):  # of arguments that do not fit the text: logging reports them itself
        record.msg, record.args = redact(record.getMessage()), None
    if record.exc_info and not record.exc_text:
        record.exc_text = redact(logging.Formatter().formatException(record.exc_info))
    return True


logger.addFilter(_redacted)

QUIET_VARIABLE = "CHATTRAIN_QUIET"  # set for jobs side by side: their lines would mix, and the launching process shows a table


def is_quiet() -> bool:
    """Does another process show what this one does? It then prints nothing but what goes wrong."""
    return bool(os.environ.get(QUIET_VARIABLE))


class _StderrHandler(logging.Handler):
    """Prints to sys.stderr as it is at that moment: a rich progress bar replaces it, to print above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "file_only", False):
            return
        try:
            text = self.format(record)
            terminal = getattr(sys.stderr, "rich_proxied_file", sys.stderr)  # a bar's own says that it is none, before rich 15
            yellow = record.levelno >= logging.WARNING and terminal.isatty()
            print(f"\033[33m{text}\033[0m" if yellow else text, file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


def setup_logging(run_dir: Path | None, console: bool, resume: bool, name: str = "train.log") -> Callable[[], None]:
    """Send the logger "chattrain" to run_dir/<name> (None: no file) and, with `console`, to stderr; returns what undoes this.

    `resume`: append to the file instead of replacing it. A call within another replaces it until it is undone, so that each line
    is printed once. `propagate` stays on for pytest's caplog; a handler of the root logger would print each line twice.
    """
    handlers: list[logging.Handler] = [logging.NullHandler()]  # without a handler, logging prints warnings to stderr
    if run_dir is not None:
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        if not resume:
            (Path(run_dir) / name).unlink(missing_ok=True)
        file = logging.FileHandler(Path(run_dir) / name, encoding="utf-8")  # appends, as parallel.failures.Watch writes to it too
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        handlers.append(file)
    if console and not is_quiet():
        handlers.append(_StderrHandler())
    replaced, level = [handler for handler in logger.handlers if handler.name == logger.name], logger.level
    for handler in replaced:
        logger.removeHandler(handler)
    for handler in handlers:
        handler.set_name(logger.name)  # by this name the next call finds them
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)

    def undo() -> None:
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()
            handler.set_name("")
        for handler in replaced:
            if handler.name:  # it was not undone in the meantime
                logger.addHandler(handler)
        if not any(handler.name == logger.name for handler in logger.handlers):
            logger.setLevel(level)

    return undo
